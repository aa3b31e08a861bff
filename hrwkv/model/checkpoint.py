"""Safetensors in and out: strict, sharded, streamed, never half-written.

A directory is written beside its final name and renamed when complete, so a reader never meets half of one.
Loading names every tensor that is missing, left over or of another shape; nothing is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hrwkv.model.config import HybridConfig
from hrwkv.model.families import config_from_teacher, family_of
from hrwkv.model.modeling import HybridModel

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
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
)


class CheckpointError(ValueError):
    """A model directory that cannot be read or written; the message says which file and what to do."""


class ShardReader:
    """Named tensors of a directory of safetensors files, read one at a time.

    Raises CheckpointError for a missing directory, no weights, a truncated shard, or a name in two shards.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is not a directory: expected a model directory with safetensors"
            )
        self._files: dict[str, Path] = {}
        for file in self._weight_files():
            for name in self._open(file).keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in self._files:
                    raise CheckpointError(
                        f"{name} is in {self._files[name].name} and in {file.name}: remove one"
                    )
                self._files[name] = file
        self._check_index()

    def _weight_files(self) -> list[Path]:
        """``model.safetensors``, else what the index names, else every safetensors file.

        This is Transformers' rule: directories hold other files too (Mistral's consolidated, adapters).
        """
        if (self.path / WEIGHTS).exists():
            return [self.path / WEIGHTS]
        if (self.path / INDEX).exists():
            files = [self.path / name for name in sorted(set(_weight_map(self.path).values()))]
            if missing := [file.name for file in files if not file.exists()]:
                raise CheckpointError(
                    f"{self.path} lacks {_some(missing)}, named in {INDEX}: copy or download it again"
                )
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.path} has no *.safetensors file: convert other formats first")
        return files

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a complete safetensors file ({error}): copy or download it again"
            ) from error

    def _check_index(self) -> None:
        if (self.path / WEIGHTS).exists() or not (self.path / INDEX).exists():
            return
        if missing := sorted(_weight_map(self.path).keys() - self._files.keys()):
            raise CheckpointError(
                f"{self.path / INDEX} names {_some(missing)}, which no shard holds: download it again"
            )

    def names(self) -> list[str]:
        """All tensor names, shard by shard, so that reading in this order opens each shard once."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor."""
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU in its stored dtype. Raises CheckpointError if its bytes are cut off."""
        try:
            return self._open(self._files[name]).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._files[name]}: cannot read {name} ({error})") from error


class ShardWriter:
    """Writes a model directory beside ``path`` and renames it there when the ``with`` block ends well.

    Raises CheckpointError if ``path`` exists. On an error inside the block nothing is left behind.
    """

    def __init__(self, path: Path | str, *, max_shard_bytes: int = 4 * 1024**3) -> None:
        self.path = Path(path).resolve()  # gives "." and ".." a name
        self.max_shard_bytes = max_shard_bytes
        self._partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._new_parents: list[Path] = []

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
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        with self._naming_errors():
            (self._partial / name).write_text(text, encoding="utf-8")

    def copy_companions(self, source: Path) -> None:
        """Tokenizer, generation config and chat template of another model directory."""
        with self._naming_errors():
            for name in COMPANIONS:
                if (source / name).exists():
                    shutil.copyfile(source / name, self._partial / name)

    def _flush(self) -> None:
        file = self._partial / f"shard-{len(self._shards):05d}"
        with self._naming_errors():
            save_file(self._pending, file, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        count = len(self._shards)
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            with self._naming_errors():
                (self._partial / f"shard-{number:05d}").rename(self._partial / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            self.write_json(INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        with self._naming_errors():
            self._partial.rename(self.path)


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


def load_config(path: Path | str) -> HybridConfig:
    """The config of one of our directories or of a teacher's. Raises CheckpointError or ValueError."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: expected a model directory with a config.json")
    config = read_json(path / "config.json")
    if config.get("model_type") == HybridConfig.model_type:
        return HybridConfig.from_dict(config)
    return config_from_teacher(config)


def carried_names(path: Path, names: list[str]) -> Iterator[str]:
    """The tensor names that carry something; a teacher family's known empty ones are left out."""
    config = read_json(path / "config.json")
    is_ours = config.get("model_type") == HybridConfig.model_type
    dropped = () if is_ours else family_of(config).dropped
    if config.get("tie_word_embeddings"):
        dropped = (*dropped, "lm_head.weight")
    return (name for name in names if not name.endswith(dropped))


def check_tied_head(reader: ShardReader, config: HybridConfig) -> None:
    """Raise CheckpointError if the files hold a head of its own although the config says that it is tied."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not (config.tie_word_embeddings and {head, embedding} <= set(reader.names())):
        return
    if not torch.equal(reader.read(head), reader.read(embedding)):
        raise CheckpointError(
            f"{reader.path}: {head} differs from {embedding}, but config.json has tie_word_embeddings true: "
            "set it to false"
        )


def check_names(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """Raise CheckpointError unless both hold the same names with the same shapes."""
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{where} lacks {_some(missing)}: the weights do not fit the config.json beside them"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{where} holds {_some(extra)}, which this model has no place for")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{where}: {name} has shape {list(found[name])}, expected {list(shape)}")


def expected_shapes(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a directory of this config holds."""
    with torch.device("meta"):
        model = HybridModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def load_model(
    path: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> HybridModel:
    """A model from one of our directories, or from a teacher's, in evaluation mode.

    Raises CheckpointError for anything missing, left over, mis-shaped or truncated; ValueError for a config
    that we do not carry.
    """
    path = Path(path)
    config = load_config(path)
    reader = ShardReader(path)
    names = list(carried_names(path, reader.names()))
    check_names({name: reader.shape(name) for name in names}, expected_shapes(config), path)
    check_tied_head(reader, config)
    with torch.device("meta"):
        model = HybridModel(config)
    weights = {name: reader.read(name).to(device=device, dtype=dtype) for name in names}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def save_model(
    model: HybridModel, path: Path | str, *, companions: Path | str, dtype: torch.dtype | None = None
) -> None:
    """Write a complete model directory; tokenizer and the like come from the directory ``companions``.

    dtype: of the written weights; None keeps each parameter's own. Raises CheckpointError if ``path`` exists.
    """
    with ShardWriter(path) as writer:
        write_config(writer, model.config, dtype or next(model.parameters()).dtype)
        for name, tensor in model.state_dict().items():
            if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                writer.add(name, tensor if dtype is None else tensor.to(dtype))
        writer.copy_companions(Path(companions))


def write_config(writer: ShardWriter, config: HybridConfig, dtype: torch.dtype) -> None:
    """``config.json`` of one of our directories, with the class that Transformers is to open it with."""
    values = config.to_dict()
    values.update(architectures=["HybridForCausalLM"], dtype=str(dtype).removeprefix("torch."))
    writer.write_json("config.json", values)


def _some(names: list[str]) -> str:
    """A few names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
