"""Models in and out of directories: names and shapes are checked whole, nothing is skipped.

Loading names every tensor that is missing, left over or of another shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hrwkv.model.config import HybridConfig
from hrwkv.model.families import config_from_teacher, family_of
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter, read_json, some


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
            f"{where} lacks {some(missing)}: the weights do not fit the config.json beside them"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{where} holds {some(extra)}, which this model has no place for")
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


def open_weights(path: Path | str) -> tuple[HybridConfig, ShardReader, list[str]]:
    """The config of a model directory, its tensors unread, and the names of those that the model has.

    Raises as ``load_model`` does.
    """
    path = Path(path)
    config = load_config(path)
    reader = ShardReader(path)
    names = list(carried_names(path, reader.names()))
    check_names({name: reader.shape(name) for name in names}, expected_shapes(config), path)
    check_tied_head(reader, config)
    return config, reader, names


class Fitting(Protocol):
    """Gives parts of a model another form before weights are read, and takes those parts' weights."""

    def prepare(self, model: HybridModel) -> None:
        """Replace modules of a model on the meta device."""

    def take(self, model: HybridModel, name: str, weight: Tensor) -> bool:
        """See each weight as it is read, mapped on the CPU; True if it has been dealt with."""


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    fitting: Fitting | None = None,
) -> HybridModel:
    """A model from one of our directories, or from a teacher's, in evaluation mode.

    One tensor after another goes to its device, so nothing is held twice. fitting: what takes some of them.
    Raises CheckpointError for anything missing, left over, mis-shaped or truncated; ValueError for a config
    that we do not carry.
    """
    config, reader, names = open_weights(path)
    with torch.device("meta"):
        model = HybridModel(config)
    if fitting is not None:
        fitting.prepare(model)
    weights = {}
    for name in names:
        weight = reader.read(name)
        if fitting is None or not fitting.take(model, name, weight):
            weights[name] = weight.to(device=device, dtype=dtype)
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
