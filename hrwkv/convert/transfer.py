"""A teacher's directory in, a student's directory out, tensor by tensor.

What happens to every tensor is planned from names and shapes alone, so what does not fit is told before the
first byte is written; then each tensor is read, scaled and handed to the writer, which holds one shard in
memory. Nothing here trains.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrwkv.convert.initialise import copy_factors, initial_value, rank_sizes
from hrwkv.model.checkpoint import (
    carried_names,
    check_names,
    check_tied_head,
    expected_shapes,
    load_config,
    write_config,
)
from hrwkv.model.config import FULL, LINEAR, RANKS, HybridConfig, spread_layers
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter
from hrwkv.settings import ConvertSettings

Report = Callable[[str, int, int], None]

# Mixer module -> the teacher's attention module that it starts from.
MIXER_SOURCES = {
    "receptance": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "r_norm": "q_norm",
    "k_norm": "k_norm",
}
# What must agree before another student's mixers fit.
MIXER_FIELDS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "attention_output_bias",
    "qk_norm",
    "rope_parameters",
    "linear_rope",
    "variant",
)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Below the first, more files would save nothing that is noticed; two of the second are in memory at once.
SMALL_SHARD_BYTES, LARGE_SHARD_BYTES = 64 * 1024**2, 512 * 1024**2
PACKAGES = ("hrwkv", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    attention_layers: those kept. copied, fresh, aligned: number of tensors from the teacher, by the
    initialisation, and from ``mixers_from``. dropped: teacher tensors left behind. parameters: of the
    student, a tied head counted once.
    """

    path: Path
    config: HybridConfig
    attention_layers: tuple[int, ...]
    copied: int
    fresh: int
    aligned: int
    dropped: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Step:
    """Where one tensor of the student comes from.

    reader: the directory that holds ``source``, which is multiplied with ``factor``; None for fresh values.
    """

    name: str
    shape: tuple[int, ...]
    reader: ShardReader | None = None
    source: str = ""
    factor: float = 1.0


def convert(
    teacher: Path,
    out: Path,
    settings: ConvertSettings,
    *,
    mixers_from: Path | None = None,
    report: Report | None = None,
) -> Conversion:
    """Write the student of ``teacher`` to ``out``, a directory that must not exist.

    mixers_from: a student of the same teacher whose RWKV layers are copied instead of initialised.
    report: called before each tensor with its name, its number from 1, and the number of tensors.
    Raises ValueError for settings or a teacher that do not fit, CheckpointError for files that cannot be read
    or written. On any error ``out`` does not exist.
    """
    teacher_config, reader = _open_teacher(Path(teacher))
    mixers_config, mixers = _open_mixers(mixers_from, teacher_config) if mixers_from else (None, None)
    config = student_config(teacher_config, settings, mixers=mixers_config)
    steps = plan(config, settings, reader, mixers=mixers)
    used = {step.source for step in steps if step.reader is reader}
    dropped = tuple(name for name in reader.names() if name not in used)
    dtype = reader.read("model.embed_tokens.weight").dtype
    with ShardWriter(out, max_shard_bytes=_shard_bytes(steps, settings, dtype)) as writer:
        for number, step in enumerate(steps, start=1):
            if report is not None:
                report(step.name, number, len(steps))
            writer.add(step.name, _tensor(step, config, settings, dtype=dtype))
        write_config(writer, config, dtype)
        writer.write_json("conversion.json", _record(config, settings, reader.path, mixers_from, dropped))
        writer.copy_companions(reader.path)
    return Conversion(
        path=writer.path,
        config=config,
        attention_layers=tuple(config.full_layers),
        copied=len(used),
        fresh=sum(step.reader is None for step in steps),
        aligned=sum(step.reader is not None and step.reader is mixers for step in steps),
        dropped=dropped,
        parameters=sum(math.prod(step.shape) for step in steps),
    )


def choose_layers(settings: ConvertSettings, num_layers: int) -> tuple[int, ...]:
    """The layers that stay attention, in order.

    ``keep_attention = n`` takes ``spread_layers``, so the first is none of them; n = L keeps all.
    Raises ValueError for layers that do not exist, or for layer 0 in a hybrid.
    """
    last = num_layers - 1
    count = settings.keep_attention
    if count is not None:
        if count > num_layers:
            raise ValueError(
                f"keep_attention is {count}, but the teacher has {num_layers} layers: keep fewer"
            )
        if count == num_layers:
            return tuple(range(num_layers))
        return spread_layers(count, num_layers)
    layers = tuple(sorted(settings.attention_layers or ()))
    if outside := [layer for layer in layers if not 0 <= layer <= last]:
        raise ValueError(
            f"attention_layers names layer {outside[0]}, but the teacher has layers 0 to {last}: name those"
        )
    if 0 in layers and len(layers) < num_layers:
        raise ValueError(
            "attention_layers names layer 0, expected 1 or higher: the value and key residuals of all other "
            "RWKV layers lead to layer 0, so keep another layer as attention"
        )
    return layers


def student_config(
    teacher: HybridConfig, settings: ConvertSettings, *, mixers: HybridConfig | None = None
) -> HybridConfig:
    """The teacher's config with the student's layers and sizes.

    mixers: config of the student whose RWKV layers are to be copied; its sizes hold.
    Raises ValueError where layers or sizes do not fit.
    """
    kept = choose_layers(settings, teacher.num_hidden_layers)
    linear = [layer for layer in range(teacher.num_hidden_layers) if layer not in kept]
    ranks: dict[str, int] = {}
    if linear and mixers is None:
        ranks = rank_sizes(teacher, settings)
    elif linear and mixers is not None:
        ranks = _ranks_of(mixers, settings, linear)
    changes = {
        "layer_types": [FULL if layer in kept else LINEAR for layer in range(teacher.num_hidden_layers)],
        "attention_rope": settings.attention_rope or not linear,
        **ranks,
    }
    return HybridConfig.from_dict({**teacher.to_dict(), **changes})


def plan(
    config: HybridConfig, settings: ConvertSettings, reader: ShardReader, *, mixers: ShardReader | None = None
) -> list[Step]:
    """Where every tensor of the student comes from, in the order of its layers; nothing is read."""
    factors = copy_factors(settings)
    linear = {f"model.layers.{layer}" for layer in config.linear_layers}
    steps = []
    for name, shape in expected_shapes(config).items():
        layer, _, parameter = name.partition(".self_attn.")
        module, _, kind = parameter.partition(".")
        if not parameter or layer not in linear:
            steps.append(Step(name, shape, reader, name))
        elif mixers is not None:
            steps.append(Step(name, shape, mixers, name))
        elif module in MIXER_SOURCES:
            source = f"{layer}.self_attn.{MIXER_SOURCES[module]}.{kind}"
            steps.append(Step(name, shape, reader, source, factors.get(module, 1.0)))
        else:
            steps.append(Step(name, shape))
    return steps


def _tensor(step: Step, config: HybridConfig, settings: ConvertSettings, *, dtype: torch.dtype) -> Tensor:
    """A step's tensor; copied ones keep their dtype, fresh ones get ``dtype``."""
    if step.reader is None:
        layer, _, parameter = step.name.removeprefix("model.layers.").partition(".self_attn.")
        value = initial_value(parameter, step.shape, layer=int(layer), config=config, settings=settings)
        return value.to(dtype)
    tensor = step.reader.read(step.source)
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{step.reader.path}: {step.source} has dtype {tensor.dtype}, expected bfloat16, float16 or "
            "float32: save the model in one of those first"
        )
    return tensor if step.factor == 1.0 else tensor * step.factor


def _shard_bytes(steps: list[Step], settings: ConvertSettings, dtype: torch.dtype) -> int:
    """The limit that is given, else the largest layer."""
    if settings.max_shard_gib is not None:
        return int(settings.max_shard_gib * 1024**3)
    return largest_layer_bytes({step.name: math.prod(step.shape) * dtype.itemsize for step in steps})


def largest_layer_bytes(sizes: Mapping[str, int]) -> int:
    """A limit for shards, two of which a streamed model holds in memory. sizes: bytes of every tensor."""
    layers: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith("model.layers."):
            layers[name.split(".")[2]] += size
    return min(LARGE_SHARD_BYTES, max(SMALL_SHARD_BYTES, *layers.values()))


def _open_teacher(path: Path) -> tuple[HybridConfig, ShardReader]:
    """The teacher's config and weights, names and shapes checked."""
    config = load_config(path)
    if config.linear_layers:
        raise ValueError(f"{path} is a hybrid already, expected a teacher whose layers are all attention")
    return config, checked_reader(path, config)


def _open_mixers(path: Path, teacher: HybridConfig) -> tuple[HybridConfig, ShardReader]:
    """Config and weights of an aligned student, checked against the teacher that it should come from."""
    config = load_config(path)
    for name in MIXER_FIELDS:
        ours, theirs = getattr(teacher, name), getattr(config, name)
        if ours != theirs:
            raise ValueError(
                f"{path} has {name} {theirs}, but the teacher has {ours}: "
                "take mixers from a student of this teacher"
            )
    return config, checked_reader(path, config)


def checked_reader(path: Path, config: HybridConfig) -> ShardReader:
    """The weights of a model directory; CheckpointError unless names and shapes are those of its config."""
    reader = ShardReader(path)
    names = carried_names(path, reader.names())
    check_names({name: reader.shape(name) for name in names}, expected_shapes(config), path)
    check_tied_head(reader, config)
    return reader


def _ranks_of(mixers: HybridConfig, settings: ConvertSettings, linear: list[int]) -> dict[str, int]:
    """The sizes of mixers that are copied, if they are there and agree with the settings."""
    if missing := [layer for layer in linear if layer not in mixers.linear_layers]:
        raise ValueError(
            f"layer {missing[0]} becomes RWKV, but the student that mixers come from has attention there: "
            "keep it as attention, or take mixers from a student with more RWKV layers"
        )
    ranks = {name: getattr(mixers, name) for name in RANKS}
    for name, rank in ranks.items():
        if getattr(settings, name) not in (None, rank):
            raise ValueError(
                f"{name} is {getattr(settings, name)}, but the copied mixers have {rank}: leave it out"
            )
    return ranks


def _record(
    config: HybridConfig,
    settings: ConvertSettings,
    teacher: Path,
    mixers_from: Path | None,
    dropped: tuple[str, ...],
) -> dict[str, Any]:
    """``conversion.json``: enough to repeat the conversion; names of directories, no places on a machine."""
    return {
        "teacher": teacher.resolve().name,
        "teacher_config_sha256": hashlib.sha256((teacher / "config.json").read_bytes()).hexdigest(),
        "mixers_from": Path(mixers_from).resolve().name if mixers_from else None,
        "settings": asdict(settings),
        "attention_layers": config.full_layers,
        "ranks": {name: getattr(config, name) for name in RANKS},
        "factors": copy_factors(settings),
        "dropped": list(dropped),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a conversion depends on, for its record."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # run from a source tree
