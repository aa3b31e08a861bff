"""One of our directories out, as RWKV-Infer reads it: a flat ``.pth``, or safetensors with a config.

A model that RWKV-Infer would run with other arithmetic than ours (another RoPE, rotated attention, biases
that it ignores) is refused: a file that loads and speaks nonsense helps nobody.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import sys
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from hrwkv.convert.formats import ROW_VECTORS, pth_name
from hrwkv.convert.importing import DTYPES, EMBEDDING, HEAD
from hrwkv.convert.transfer import Report, checked_reader
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.checkpoint import expected_shapes, load_config
from hrwkv.model.config import HybridConfig
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter, read_json

Format = Literal["rwkv-infer-pth", "rwkv-infer-safetensors"]
# What each form can say: RWKV-Infer takes a .pth without k0 for another architecture.
VARIANTS_OF = {"rwkv-infer-pth": ("hxa079",), "rwkv-infer-safetensors": ("hxa079", "hxa07a", "hxa07c")}
# What torch.save writes besides the tensors: a pickle in front, and up to a KiB before each.
SLACK = 2**20
# Every hxa079 file says 78; its readers know.
LAYER_ARCHITECTURE = 78.0
# Held in memory while it is written; readers of these directories take any number of files.
SHARD_BYTES = 1024**3


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the path, its tensors and their bytes."""

    path: Path
    tensors: int
    bytes: int


def export_model(
    model: Path, out: Path, *, form: Format, dtype: str | None = None, report: Report | None = None
) -> Exported:
    """Write one of our directories in a form that RWKV-Infer reads; ``out`` must not exist.

    dtype: of the written weights; None keeps bfloat16, which is what RWKV-Infer's files have, and refuses
    others. report: called before each tensor with its name, its number from 1, and the number of tensors.
    Raises CheckpointError for a model that RWKV-Infer would run differently, for files that cannot be read or
    written, and if ``out`` exists. On any error ``out`` does not exist.
    """
    model = Path(model)
    config = load_config(model)
    check_exportable(config, model, form)
    reader = checked_reader(model, config)
    stored = reader.dtype(EMBEDDING)
    if dtype is None and stored != "bfloat16":
        raise CheckpointError(f"{model} is {stored}, RWKV-Infer's files are bfloat16: give --dtype bfloat16")
    target = DTYPES[dtype or stored]
    export = Export(config, reader, target, constants=_has_constants(model, config))
    if form == "rwkv-infer-pth":
        return _write_pth(export, Path(out), report)
    return _write_directory(export, Path(out), report, model)


def check_exportable(config: HybridConfig, where: Path, form: Format) -> None:
    """Raise CheckpointError, naming what RWKV-Infer would do differently."""
    rope_type = config.rope_parameters["rope_type"]
    different = {
        f"variant {config.variant} (this form holds {', '.join(VARIANTS_OF[form])})": config.variant
        not in VARIANTS_OF[form],
        "no RWKV layer": not config.linear_layers,
        f"RoPE of type {rope_type} (RWKV-Infer computes the plain one)": rope_type != "default",
        "RoPE in its attention layers (RWKV-Infer applies none)": config.attention_rope
        and config.full_layers,
        "no RoPE in its RWKV layers (RWKV-Infer applies it)": not config.linear_rope,
        "a bias behind the mixer (RWKV-Infer ignores it)": config.attention_output_bias,
        "biases in its MLPs (RWKV-Infer has no place for them)": config.mlp_bias,
    }
    if found := [what for what, is_so in different.items() if is_so]:
        raise CheckpointError(f"{where} has {found[0]}: it cannot be exported as {form}")


@dataclass(frozen=True)
class Export:
    """The tensors of a model as published files hold them."""

    config: HybridConfig
    reader: ShardReader
    dtype: torch.dtype
    constants: bool

    def names(self, *, with_head: bool) -> list[str]:
        """Our names, layer by layer, the constants of every RWKV layer behind it."""
        names = list(expected_shapes(self.config))
        if with_head and HEAD not in names:
            names.append(HEAD)
        if self.constants:
            for layer in self.config.linear_layers:
                names += [f"model.layers.{layer}.self_attn.{name}" for name in self._constants]
        return sorted(names, key=_natural)

    def tensor(self, name: str) -> Tensor:
        """The tensor in its published shape."""
        parameter = name.rpartition(".")[2]
        if parameter in self._constants:
            return torch.tensor(self._constants[parameter], dtype=self.dtype)
        tensor = self.reader.read(EMBEDDING if name == HEAD and self._is_tied else name).to(self.dtype)
        return tensor.view(1, 1, -1) if parameter in ROW_VECTORS else tensor

    @property
    def _is_tied(self) -> bool:
        return self.config.tie_word_embeddings

    @property
    def _constants(self) -> dict[str, float]:
        return {"layer_architecture": LAYER_ARCHITECTURE, "head_size_record": float(self.config.head_dim)}


def _has_constants(model: Path, config: HybridConfig) -> bool:
    """As the source of an import had it; else as the trainer of hxa079 writes them."""
    record = model / "import.json"
    stated = read_json(record).get("constants") if record.exists() else None
    return VARIANTS[config.variant].key_residual if stated is None else bool(stated)


def _write_pth(export: Export, out: Path, report: Report | None) -> Exported:
    """``torch.save`` of the mapped tensors, beside ``out`` and renamed, with ``OUT.sha256``.

    Where the dtype stays, memory stays small: what was written is let go of. Another dtype is computed whole
    first.
    """
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another output or remove it first")
    names = export.names(with_head=True)
    tensors = {pth_name(name): export.tensor(name) for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    try:
        with partial.open("wb") as file:
            sink = _Sink(file, tensors, report)
            torch.save(tensors, sink)  # type: ignore[arg-type]  # anything with write() is taken
        out.with_name(f"{out.name}.sha256").write_text(f"{sink.sha256.hexdigest()}  {out.name}\n")
        partial.rename(out)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk into a RuntimeError
        raise CheckpointError(
            f"cannot write {out} ({' '.join(str(error).split())[:120]}): "
            "free some space or choose another output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return Exported(out, len(tensors), total)


class _Sink:
    """A file that takes the sha256 of what ``torch.save`` writes and lets go of the tensors behind it.

    Pages of a mapped file count as resident until they are let go, and a model is larger than the memory.
    """

    def __init__(self, file: IO[bytes], tensors: dict[str, Tensor], report: Report | None) -> None:
        self.sha256 = hashlib.sha256()
        self._file, self._report, self._count = file, report, len(tensors)
        slack = SLACK + 1024 * len(tensors)
        ends = accumulate(tensor.nbytes for tensor in tensors.values())
        self._behind = deque(
            (end + slack, name, tensors[name]) for end, name in zip(ends, tensors, strict=True)
        )
        self._written = 0

    def write(self, data: memoryview) -> int:
        """Write a piece of the file."""
        count = self._file.write(data)
        self.sha256.update(data)
        self._written += count
        while self._behind and self._behind[0][0] < self._written:
            _, name, tensor = self._behind.popleft()
            _let_go(tensor)
            if self._report is not None:
                self._report(name, self._count - len(self._behind), self._count)
        return count

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()


def _let_go(tensor: Tensor) -> None:
    """Drop the whole pages of a tensor that nobody reads again; a file's would come back if somebody did."""
    if not sys.platform.startswith("linux"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A key that sorts layer 10 behind layer 9."""
    return tuple((1, int(part)) if part.isdigit() else (0, part) for part in name.split("."))


def _write_directory(export: Export, out: Path, report: Report | None, model: Path) -> Exported:
    names = export.names(with_head=False)
    total = 0
    with ShardWriter(out, max_shard_bytes=SHARD_BYTES) as writer:
        for number, name in enumerate(names, start=1):
            if report is not None:
                report(name, number, len(names))
            tensor = export.tensor(name)
            total += tensor.nbytes
            writer.add(name, tensor)
        writer.write_json("config.json", published_config(export.config, export.dtype))
        writer.copy_companions(model)
    return Exported(writer.path, len(names), total)


def published_config(config: HybridConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` with the keys that RWKV-Infer reads and those that describe the model."""
    ranks = {
        "lora_rank_decay": config.decay_rank,
        "lora_rank_iclr": config.iclr_rank,
        "lora_rank_value_residual_mix": config.value_rank,
        "lora_rank_key_residual_mix": config.key_rank,
        "lora_rank_gate": config.gate_rank,
    }
    copied = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return {
        **{name: getattr(config, name) for name in copied},
        **{name: rank for name, rank in ranks.items() if rank is not None},
        "rwkv_architecture": config.variant,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "transformer_layers": config.full_layers,
        "rwkv_layers": config.linear_layers,
        "enable_qk_norm": config.qk_norm,
        "nope_in_transformer": True,
        "nope_in_rwkv": False,
        "attention_out_bias": config.attention_output_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
