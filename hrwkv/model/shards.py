"""Safetensors in and out: strict, sharded, streamed, never half-written, with checksums.

A directory is written beside its final name and renamed when complete, so a reader never meets half of one.
Two shards are in memory: while one is filled, a thread writes the last, and another takes the sha256 of the
one before.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# safetensors' names of the dtypes that weights, and what lies beside them, have had.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
# As ``sha256sum`` writes it, so ``sha256sum -c SHA256SUMS`` checks a directory too.
CHECKSUMS = "SHA256SUMS"
# Transformers' place for a template with a name.
NO_REASONING = "additional_chat_templates/no_reasoning.jinja"
# What makes a model directory complete beside its weights; copied along from the teacher.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    NO_REASONING,
)


class CheckpointError(ValueError):
    """A model directory that cannot be read or written; the message says which file and what to do."""


class ShardReader:
    """Named tensors of a directory of safetensors files, or of one such file, read one at a time.

    Raises CheckpointError for a missing directory, no weights, a truncated shard, or a name in two shards.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path.is_dir() or self.path.suffix == ".safetensors"):
            raise CheckpointError(
                f"{self.path} is not a directory: expected a model directory with safetensors"
            )
        self._files: dict[str, Path] = {}
        self._entries: dict[str, _Entry] = {}
        for file in self._weight_files():
            for name, entry in _header(file).items():
                if name in self._files:
                    raise CheckpointError(
                        f"{name} is in {self._files[name].name} and in {file.name}: remove one"
                    )
                self._files[name] = file
                self._entries[name] = entry
        self._check_index()

    def _weight_files(self) -> list[Path]:
        """``model.safetensors``, else what the index names, else every safetensors file.

        This is Transformers' rule: directories hold other files too (Mistral's consolidated, adapters).
        """
        if not self.path.is_dir():
            return [self.path]
        if (self.path / WEIGHTS).exists():
            return [self.path / WEIGHTS]
        if (self.path / INDEX).exists():
            files = [self.path / name for name in sorted(set(_weight_map(self.path).values()))]
            if missing := [file.name for file in files if not file.exists()]:
                raise CheckpointError(
                    f"{self.path} lacks {some(missing)}, named in {INDEX}: copy or download it again"
                )
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} has no *.safetensors file: convert other formats first")
        return files

    def _check_index(self) -> None:
        if (self.path / WEIGHTS).exists() or not (self.path / INDEX).exists():
            return
        if missing := sorted(_weight_map(self.path).keys() - self._files.keys()):
            raise CheckpointError(
                f"{self.path / INDEX} names {some(missing)}, which no shard holds: download it again"
            )

    def names(self) -> list[str]:
        """All tensor names, shard by shard, so that reading in this order opens each shard once."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """The dtype as torch calls it, without reading the tensor."""
        return str(self._entries[name].dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file, on the CPU in its stored dtype."""
        entry = self._entries[name]
        count = math.prod(entry.shape)
        return map_tensor(self._files[name], entry.start, dtype=entry.dtype, count=count).view(entry.shape)


class ShardWriter:
    """Writes a model directory beside ``path`` and renames it there when the ``with`` block ends well.

    check: sees each tensor right before it is written; what it raises ends the writing. Not earlier, because
    a mapped tensor is in memory from then on. Raises CheckpointError if ``path`` exists. On an error inside
    the block nothing is left behind.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        max_shard_bytes: int = 4 * 1024**3,
        check: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.path = Path(path).resolve()  # gives "." and ".." a name
        self.max_shard_bytes, self._check = max_shard_bytes, check
        self._partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._new_parents: list[Path] = []
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sha256")
        self._checksums: list[Future[str]] = []
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._writing: Future[None] | None = None
        self._writing_bytes = 0

    def __enter__(self) -> ShardWriter:
        if self.path.exists():
            raise CheckpointError(f"{self.path} exists already: choose another output or remove it first")
        self._new_parents = [parent for parent in self.path.parents if not parent.exists()]
        try:
            with self._naming_errors():
                self._partial.mkdir(parents=True)
        except CheckpointError:
            self._remove_partial()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._hasher.shutdown(cancel_futures=True)
            self._remove_partial()

    def _remove_partial(self) -> None:
        """Nothing is left but a finished directory and what holds it."""
        shutil.rmtree(self._partial, ignore_errors=True)
        for parent in self._new_parents:  # the innermost first
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        """Turn a full disk or a missing right into one line that names the output."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write {self.path} ({error}): free some space or choose another output"
            ) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor; a shard is written as soon as it is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """A JSON file beside the weights."""
        self.write_text(name, json.dumps(value, indent=2, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A text file beside the weights, in a folder of its own if ``name`` says so."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """A file beside the weights, in a folder of its own if ``name`` says so."""
        with self._naming_errors():
            (self._partial / name).parent.mkdir(exist_ok=True)
            (self._partial / name).write_bytes(content)

    def copy_companions(self, *sources: Path) -> None:
        """Tokenizer, generation config and chat template of the first of these directories that has each."""
        with self._naming_errors():
            for name in COMPANIONS:
                for source in sources:
                    if (source / name).exists():
                        (self._partial / name).parent.mkdir(exist_ok=True)
                        shutil.copyfile(source / name, self._partial / name)
                        break

    def has(self, name: str) -> bool:
        """True if a file of this name was written beside the weights."""
        return (self._partial / name).exists()

    def read_json(self, name: str) -> dict[str, Any]:
        """What a JSON file that came along says; nothing if there is none."""
        return read_json(self._partial / name) if self.has(name) else {}

    def _flush(self) -> None:
        """Hand the pending shard to the writing thread, which has one at a time."""
        if self._writing_bytes + self._pending_bytes > 2 * self.max_shard_bytes:
            self._wait()  # a tensor larger than a shard: not two of that size in memory
        if self._check is not None:
            for name, tensor in self._pending.items():
                self._check(name, tensor)
        self._wait()
        file = self._partial / f"shard-{len(self._shards):05d}"
        self._writing = self._writer.submit(save_file, self._pending, file, metadata={"format": "pt"})
        self._writing_bytes = self._pending_bytes
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _wait(self) -> None:
        """Wait until the shard that was handed over is written; its sha256 is another thread's work."""
        if self._writing is not None:
            with self._naming_errors():
                self._writing.result()
            file = self._partial / f"shard-{len(self._shards) - 1:05d}"
            self._checksums.append(self._hasher.submit(file_sha256, file))
            self._writing, self._writing_bytes = None, 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        self._wait()
        count = len(self._shards)
        checksums = [future.result() for future in self._checksums]  # renaming waits for the last one
        weight_map, sums = {}, ""
        for number, names in enumerate(self._shards):
            final = WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            with self._naming_errors():
                (self._partial / f"shard-{number:05d}").rename(self._partial / final)
            weight_map.update(dict.fromkeys(names, final))
            sums += f"{checksums[number]}  {final}\n"
        self.write_text(CHECKSUMS, sums)
        if count > 1:
            self.write_json(INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        with self._naming_errors():
            self._partial.rename(self.path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify_checksums(path: Path) -> Iterator[tuple[str, int]]:
    """Compare every recorded file with its sha256; yields each name and its bytes once it was right.

    path: a directory with ``SHA256SUMS``, or a file with its ``.sha256`` beside it. Raises CheckpointError
    for the first file that differs or is missing, and if nothing was recorded.
    """
    record = path / CHECKSUMS if path.is_dir() else path.with_name(f"{path.name}.sha256")
    if not record.exists():
        raise CheckpointError(f"{path} has no {record.name}: it was not written with checksums")
    for line in record.read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        file = record.parent / name
        if not file.is_file():
            raise CheckpointError(f"{record} names {name}, which is missing: copy or download it again")
        if (found := file_sha256(file)) != expected:
            raise CheckpointError(
                f"{file} has sha256 {found[:12]}..., recorded is {expected[:12]}...: "
                "copy or download it again"
            )
        yield name, file.stat().st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, if it is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _weight_map(path: Path) -> dict[str, str]:
    """The index's table from tensor name to file name."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path / INDEX} has no weight_map: copy or download it again")
    return weight_map


@dataclass(frozen=True)
class _Entry:
    """A tensor's place in a safetensors file; start: of its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


def _header(file: Path) -> dict[str, _Entry]:
    """The tensors of a safetensors file. Raises CheckpointError for one that is cut off or something else.

    The library checks the file, but reads tensors only through a writable map of all of it, which Linux
    refuses where a file is larger than the memory; so their places are taken from the header: its length in 8
    bytes, and JSON, from whose end offsets count.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            names = set(opened.keys())
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}): copy or download it again"
        ) from error
    if unknown := [name for name in names if header[name]["dtype"] not in DTYPES]:
        raise CheckpointError(f"{file}: {unknown[0]} has dtype {header[unknown[0]]['dtype']}, not supported")
    entries = {}
    for name, said in header.items():
        if name in names:
            start = 8 + length + said["data_offsets"][0]
            entries[name] = _Entry(tuple(said["shape"]), DTYPES[said["dtype"]], start)
    return dict(sorted(entries.items(), key=lambda entry: entry[1].start))


def map_tensor(file: Path, start: int, *, dtype: torch.dtype, count: int) -> Tensor:
    """[count] numbers of a file from byte ``start``, mapped: read when touched, resident while they live.

    Raises CheckpointError if the file cannot be mapped.
    """
    if not count:
        return torch.empty(0, dtype=dtype)
    page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        with file.open("rb") as opened:
            size = start - page + count * dtype.itemsize
            mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY, offset=page)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start - page)


def some(names: list[str]) -> str:
    """A few names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
