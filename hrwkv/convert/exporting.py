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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from hrwkv.convert.formats import ROW_VECTORS, pth_name
from hrwkv.convert.importing import DTYPES, EMBEDDING, HEAD
from hrwkv.convert.transfer import LARGE_SHARD_BYTES, Report, checked_reader
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.checkpoint import expected_shapes, load_config
from hrwkv.model.config import HybridConfig
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter, read_json

Format = Literal["rwkv-infer-pth", "rwkv-infer-safetensors"]
# What each form can say: RWKV-Infer takes a .pth without k0 for another architecture.
VARIANTS_OF = {"rwkv-infer-pth": ("hxa079",), "rwkv-infer-safetensors": ("hxa079", "hxa07a", "hxa07c")}
# What torch.save writes besides the tensors: a pickle in front, and up to a KiB before each.
SLACK = 2**20
# Pieces from here on are tensors: no pickle and no header is so large.
LARGE_BYTES = 2**24
# Every hxa079 file says 78; its readers know.
LAYER_ARCHITECTURE = 78.0


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
        names = [name for name in expected_shapes(self.config) if name != HEAD]
        if self.constants:
            for layer in self.config.linear_layers:
                names += [f"model.layers.{layer}.self_attn.{name}" for name in self._constants]
        # The two largest tensors far apart: neighbours are in memory together while they are written.
        has_head = with_head or not self.config.tie_word_embeddings
        return sorted(names, key=_natural) + ([HEAD] if has_head else [])

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
        with partial.open("wb") as file, _Sink(file, tensors, report) as sink:
            sink.save()
        partial.rename(out)
        record = f"{sink.sha256.hexdigest()}  {out.name}\n"
        out.with_name(f"{out.name}.sha256").write_text(record, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out} ({error}): free some space or choose another output"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return Exported(out, len(tensors), total)


class _Sink:
    """A file whose bytes are written and hashed beside ``torch.save``, and whose tensors are let go of.

    While a thread writes one tensor, ``torch.save`` takes the checksum of the next. Pages of a mapped file
    count as resident until they are let go, and a model is larger than the memory.
    """

    def __init__(self, file: IO[bytes], tensors: dict[str, Tensor], report: Report | None) -> None:
        self.sha256, self._tensors = hashlib.sha256(), tensors
        self._file, self._report, self._written = file, report, 0
        slack = SLACK + 1024 * len(tensors)
        ends = accumulate(tensor.nbytes for tensor in tensors.values())
        pairs = zip(ends, tensors.items(), strict=True)
        self._behind = deque((end + slack, name, tensor) for end, (name, tensor) in pairs)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._running: Future[None] | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *unused: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def save(self) -> None:
        """Write all tensors; raises what stopped it, not the lost place that ``torch.save`` makes of it."""
        try:
            torch.save(self._tensors, self)  # type: ignore[arg-type]  # anything with write() is taken
            self.flush()
        except RuntimeError as error:
            raise self._error or error from None

    def write(self, data: memoryview) -> int:
        """Take a piece of the file; raises OSError if an earlier one could not be written."""
        try:
            self.flush()
        except BaseException as error:
            self._error = self._error or error
            raise
        # Small pieces are torch.save's own and gone when this returns; large ones are tensors, which we hold.
        piece = bytes(data) if len(data) < LARGE_BYTES else data
        self._running = self._thread.submit(self._put, piece)
        return len(data)

    def flush(self) -> None:
        """Wait until everything that was taken is written."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def _put(self, piece: memoryview | bytes) -> None:
        self._file.write(piece)
        self.sha256.update(piece)
        self._written += len(piece)
        while self._behind and self._behind[0][0] < self._written:
            _, name, tensor = self._behind.popleft()
            _let_go(tensor)
            if self._report is not None:
                count = len(self._tensors)
                self._report(name, count - len(self._behind), count)


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
    with ShardWriter(out, max_shard_bytes=LARGE_SHARD_BYTES) as writer:
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
