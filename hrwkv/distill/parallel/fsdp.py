"""FSDP2, and one process as the case without shards.

Every parameter is a DTensor, cut along its first axis. Each mixer is a group of its own beside the rest of
its block, so that stage 1 gathers no MLP of the student. In bfloat16 the blocks are gathered in it and their
gradients summed in fp32; embeddings and head are gathered as they are, so the residual stream is what it is
on one GPU. While one layer computes, the next is gathered.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from hrwkv.distill.parallel.engine import Engine, ReadState
from hrwkv.distill.parallel.ranks import Ranks, blocks_of, release, whole
from hrwkv.distill.parallel.states import load_state, save_state
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import open_weights
from hrwkv.model.modeling import HybridModel


def open_sharded(
    path: Path, ranks: Ranks, *, dtype: torch.dtype, trains: Callable[[str], bool]
) -> HybridModel:
    """A model of which this process reads and holds its shards only, in evaluation mode.

    dtype: what blocks are gathered in, and what parameters are kept in that do not train; others are fp32.
    Raises what ``load_model`` raises.
    """
    config, reader, names = open_weights(path)
    with torch.device("meta"):
        model = HybridModel(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    shard(model, mesh, dtype=dtype)
    weights = {
        name: _own_shard(reader.read(name), mesh, dtype=torch.float32 if trains(name) else dtype)
        for name in names
    }
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    _name_the_root(model, ranks, dtype)
    return model.eval()


def shard(model: HybridModel, mesh: DeviceMesh, *, dtype: torch.dtype) -> None:
    """Cut every parameter along its first axis over the mesh."""
    narrow = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(
        param_dtype=narrow, reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    blocks, groups = blocks_of(model), []
    for block in blocks:
        # What the last block gathered is needed again at once by its backward.
        cut = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=block is not blocks[-1])
        mixer: FSDPModule = cut(block.self_attn)
        rest: FSDPModule = cut(block)
        groups.append((mixer, rest))
    fully_shard(model, mesh=mesh)
    for (mixer, rest), (next_mixer, next_rest) in pairwise(groups):
        rest.set_modules_to_forward_prefetch([mixer, next_rest])
        mixer.set_modules_to_forward_prefetch([next_mixer])


def _own_shard(tensor: Tensor, mesh: DeviceMesh, *, dtype: torch.dtype) -> DTensor:
    """This process's rows of a mapped tensor: the pages of the others are never touched."""
    rows = tensor.shape[0]
    share = math.ceil(rows / mesh.size())
    start = min(mesh.get_local_rank() * share, rows)
    own = tensor[start : min(start + share, rows)].to(mesh.device_type).to(dtype)  # cast there
    return DTensor.from_local(
        own.contiguous(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _name_the_root(model: HybridModel, ranks: Ranks, dtype: torch.dtype) -> None:
    """Call the root once: FSDP takes the module that is called first for it, and stage 1 calls blocks."""
    narrow = dtype != torch.float32
    with torch.no_grad(), torch.autocast(ranks.device.type, dtype if narrow else None, enabled=narrow):
        model(
            torch.zeros(1, dtype=torch.int64, device=ranks.device),
            TokenBatch.from_lengths([1], device=ranks.device),
        )
    release(model)


class ShardedEngine(Engine):
    """The optimiser works on this process's shards; gradients arrive there by FSDP2's reduce-scatter."""

    def __init__(
        self,
        student: HybridModel,
        optimiser: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        read_state: ReadState,
        reduce_always: bool,
    ) -> None:
        super().__init__(student, optimiser, ranks)
        self._read_state, self._reduce_always = read_state, reduce_always
        self._used = False

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Before the last one gradients stay whole on each process, unless that is too much memory."""
        if self._used:
            self.discard()
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(last or self._reduce_always)
        yield

    def backward(self, loss: Tensor) -> None:
        """FSDP2's gradient is the mean over processes, the loss is their sum."""
        (loss * self.ranks.world).backward()

    def step(self, max_norm: float) -> Tensor:
        """The gradients can be read until the next micro-batch."""
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), max_norm or math.inf)
        self.optimiser.step()
        self._used = True
        return whole(norm)

    def discard(self) -> None:
        """Free the gradients."""
        self.optimiser.zero_grad(set_to_none=True)
        self._used = False

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters are their own masters."""
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                yield name, whole(parameter.detach())

    def save_moments(self, folder: Path) -> None:
        """Each process writes its shards."""
        save_state(self._read_state(self.student, self.optimiser), folder, self.ranks)

    def load_moments(self, folder: Path) -> None:
        """Each process reads its shards, however they were cut when they were written."""
        load_state(self._read_state(self.student, self.optimiser, fresh=True), folder, self.ranks)
