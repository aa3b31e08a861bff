"""What does not train in mode ``frozen-mlp``, or in stage 1: kept once for both models, in 8 bits if wanted.

A teacher's MLPs and attention projections may be held as 8-bit rows (``layers/linear.py``). Teacher and
student then compute with the very same rounded MLPs, so the student is not taught the rounding. Checkpoints
and finished models get these weights from the directory that the student came from, never from here.
Embeddings, head and norms stay in the run's dtype. Models are fitted while they are read: no weight is ever
held in both forms, or for both models.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from hrwkv.distill.parallel import Ranks, agree, blocks_of
from hrwkv.layers.linear import FrozenLinear, FrozenSwiGLU
from hrwkv.model.checkpoint import open_weights
from hrwkv.model.modeling import HybridModel

FROZEN = re.compile(r"(model\.embed_tokens|model\.layers\.\d+\.mlp\..*|model\.norm|lm_head)\.(weight|bias)")
NOT_THE_TEACHERS = (
    "mode is 'frozen-mlp', but {} of the student is not the teacher's: use mode 'all', or a student that was "
    "converted from this teacher and never trained in mode 'all'"
)
EIGHT_BITS = {"float8": torch.float8_e4m3fn, "int8": torch.int8}


class Quantised:
    """Fits a teacher: its MLPs and its attention's projections in 8 bits, on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def prepare(self, model: HybridModel) -> None:
        """Put the 8-bit modules, still empty, in place."""
        config = model.config
        for block in blocks_of(model):
            block.mlp = FrozenSwiGLU(
                config.hidden_size, config.intermediate_size, dtype=self.dtype, bias=config.mlp_bias
            )
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                linear = getattr(block.self_attn, name)
                own = FrozenLinear(
                    linear.in_features, linear.out_features, dtype=self.dtype, bias=linear.bias is not None
                )
                setattr(block.self_attn, name, own)
        model.to("meta")

    def take(self, model: HybridModel, name: str, weight: Tensor) -> bool:
        """Round a weight that has such a place."""
        owner, leaf = _place(model, name)
        if not isinstance(owner, FrozenLinear) or leaf != "weight":
            return False
        owner.fill(weight.to(self.device))
        return True


class Shared:
    """Fits a student: what is frozen is the teacher's own, after a check that it is the same.

    required: raise ValueError where it is not, because the student has been trained in mode ``all`` or has
    another teacher; otherwise the student keeps its own.
    """

    def __init__(self, teacher: HybridModel, *, required: bool = True) -> None:
        self.teacher, self.required = teacher, required

    def prepare(self, model: HybridModel) -> None:
        """Put the teacher's 8-bit MLPs in place."""
        for block, other in zip(blocks_of(model), blocks_of(self.teacher), strict=True):
            if isinstance(other.mlp, FrozenSwiGLU):
                block.mlp = other.mlp

    def take(self, model: HybridModel, name: str, weight: Tensor) -> bool:
        """Put the teacher's parameter in place of a frozen weight."""
        if FROZEN.fullmatch(name) is None:
            return False
        (owner, leaf), (source, _) = _place(model, name), _place(self.teacher, name)
        if isinstance(source, FrozenLinear) and leaf == "weight":
            same = source.holds(weight)
        else:
            theirs = getattr(source, leaf, None)
            same = isinstance(theirs, Tensor) and torch.equal(weight.to(theirs), theirs)
            if same:
                setattr(owner, leaf, theirs)
        if not same and self.required:
            raise ValueError(NOT_THE_TEACHERS.format(name))
        return same


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def check_frozen(student: Path, teacher: Path, *, ranks: Ranks, dtype: torch.dtype) -> None:
    """The check of ``Shared`` on model directories: sharded models keep their weights apart.

    dtype: in which both are compared. Each process reads its share of the tensors; raises on all of them.
    """
    (_, ours, names), (_, theirs, known) = open_weights(student), open_weights(teacher)
    error = None
    for name in [name for name in names if FROZEN.fullmatch(name)][ranks.rank :: ranks.world]:
        if name not in known or not torch.equal(ours.read(name).to(dtype), theirs.read(name).to(dtype)):
            error = ValueError(NOT_THE_TEACHERS.format(name))
    agree(error, ranks)
