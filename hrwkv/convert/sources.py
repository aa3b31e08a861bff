"""Published weights, whatever file they lie in, as named tensors that are read one at a time.

A ``TensorReader`` is a directory or file of safetensors (``ShardReader``) or of ``torch.save``
(``TorchReader``). A torch file is a pickle, and a pickle can hold a program: only ``weights_only`` loading is
used, and a file that needs more is refused with what it wanted to call.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hrwkv.model.shards import CheckpointError, ShardReader, map_tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
GLOBAL = re.compile(r"GLOBAL\s+`?([\w.]+)")


class TensorReader(Protocol):
    """What a conversion reads from."""

    path: Path

    def names(self) -> list[str]:
        """All tensor names, file by file."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def dtype(self, name: str) -> str:
        """A tensor's dtype, as torch calls it, without reading it."""

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype."""


class TorchReader:
    """Named tensors of one file of ``torch.save``, or of a folder of them, each mapped when it is read.

    Raises CheckpointError for a file that is truncated, no torch file, holds anything but a flat dictionary
    of tensors, or repeats a name of another file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        files = [self.path] if self.path.is_file() else torch_files(self.path)
        if not files:
            suffixes = ", ".join(f"*{suffix}" for suffix in TORCH_SUFFIXES)
            raise CheckpointError(f"{self.path} has no {suffixes} file: expected weights of torch.save")
        self._tensors: dict[str, tuple[Path, Tensor]] = {}
        for file in files:
            for name, tensor in tensor_index(file).items():
                if name in self._tensors:
                    raise CheckpointError(
                        f"{name} is in {self._tensors[name][0].name} and in {file.name}: remove one"
                    )
                self._tensors[name] = file, tensor

    def names(self) -> list[str]:
        """All tensor names, file by file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor."""
        return tuple(self._tensors[name][1].shape)

    def dtype(self, name: str) -> str:
        """The dtype as torch calls it, without reading the tensor."""
        return str(self._tensors[name][1].dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file, on the CPU in its stored dtype."""
        file, fake = self._tensors[name]
        if not fake.numel():
            return torch.empty(fake.shape, dtype=fake.dtype)
        place = fake.untyped_storage()._checkpoint_offset
        assert place is not None, "a storage that was loaded fake knows its place"
        start = place + int(fake.storage_offset()) * fake.element_size()
        count = 1 + sum((size - 1) * step for size, step in zip(fake.shape, fake.stride(), strict=True))
        flat = map_tensor(file, start, dtype=fake.dtype, count=int(count))
        return flat.as_strided(fake.shape, fake.stride()).contiguous()


def open_reader(path: Path | str) -> TensorReader:
    """The reader for a file or a directory. Raises CheckpointError if no weights can be read from it."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a file of weights or a model directory")
    if path.is_dir():
        if any(path.glob("*.safetensors")):
            return ShardReader(path)
        if torch_files(path):
            return TorchReader(path)
        raise CheckpointError(
            f"{path} is not a model: expected *.safetensors, or *.pth, *.pt, *.bin of torch.save in it"
        )
    return ShardReader(path) if path.suffix == ".safetensors" else TorchReader(path)


def torch_files(folder: Path) -> list[Path]:
    """Files of ``torch.save`` in a folder, by their names."""
    return sorted(file for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES and file.is_file())


def tensor_index(file: Path) -> dict[str, Tensor]:
    """The tensors of one file without their data: fake ones, whose storages know their place in the file.

    ``torch.load(mmap=True)`` would map the whole file with the right to write, which Linux refuses for a file
    larger than the memory. Raises CheckpointError, naming the file and what is wrong with it.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:  # a missing right is told as such
            start = opened.read(4)
        raise CheckpointError(
            f"{file} starts with {start!r} and has no end of a torch file: it is cut off or something else "
            "(files older than torch 1.6: load and save them again); copy or download it again"
        )
    try:
        with FakeTensorMode():
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is refused: {_wanted(error)}, and only tensors are loaded; "
            "ask its maker for a file of tensors"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{file} is not a complete torch file ({reason}): copy or download it again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, expected a dictionary of tensors")
    for name, value in found.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise CheckpointError(
                f"{file}: {name!r} is a {type(value).__name__}, expected a flat dictionary of tensors: "
                "save the model's state_dict alone"
            )
    return found


def _wanted(error: pickle.UnpicklingError) -> str:
    """What a pickle asked for beyond tensors, in a few words."""
    found = GLOBAL.search(str(error))
    return f"its pickle calls {found.group(1)}" if found else "its pickle holds more than tensors"
