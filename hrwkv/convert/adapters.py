"""Adapters merged into a model: LoRA, DoRA and Bone as RWKV's trainers write them, and PEFT's through PEFT.

An adapter of RWKV's trainers holds parts (``att.key.lora_A``) and whole trained tensors (norms, ``w0``,
``r_k``), under any of the spellings in formats.py. What becomes of every tensor is planned from names and
shapes before the first byte is written; then the model is streamed, one layer in memory. PEFT needs it whole.
Left out: PiSSA, which also needs the factors that training started from.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hrwkv.convert.formats import ADAPTER_PARTS, CONSTANTS, spelled
from hrwkv.convert.sources import TensorReader, open_reader
from hrwkv.convert.transfer import FLOAT_DTYPES, Report, checked_reader, largest_layer_bytes
from hrwkv.model.checkpoint import expected_shapes, load_config, load_model, write_config
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import CheckpointError, ShardReader, ShardWriter, read_json, some

# Keeps DoRA's division finite; the trainers' value.
DORA_EPS = 1e-6
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Beside an adapter's parts: a value of its own, in place of the model's.
WHOLE = "whole"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."

# Our name of a tensor -> part (or ``WHOLE``) -> the adapter's name.
Changes = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Merge:
    """What a merge wrote: the directory, weights with parts merged, tensors replaced by the adapter's own."""

    path: Path
    merged: int
    replaced: int


@dataclass(frozen=True)
class Merged:
    """The tensors of the model behind a merge. changed: names of those that may differ from the model's."""

    read: Callable[[str], Tensor]
    changed: frozenset[str]
    merged: int
    replaced: int


def merge_adapter(
    model: Path, adapter: Path, out: Path, *, scaling: float | None = None, report: Report | None = None
) -> Merge:
    """Write ``model`` with ``adapter`` merged to ``out``, a directory that must not exist.

    adapter: torch or safetensors weights of RWKV's trainers, a file or a folder of them, or a PEFT directory.
    scaling: of LoRA and DoRA, which RWKV's adapters do not tell; None for Bone and PEFT. report: called
    before each tensor with its name, its number from 1, and the number of tensors. All tensors keep their
    dtypes.
    Raises CheckpointError for files that cannot be read or written, for a name or shape that the model does
    not have, and for a result that is not finite; ValueError for a scaling that is missing or has no use, and
    where the peft library is needed and missing. On any error ``out`` does not exist.
    """
    model, adapter = Path(model), Path(adapter)
    config = load_config(model)
    reader = checked_reader(model, config)
    shapes = expected_shapes(config)
    dtypes = {name: stored_dtype(reader, name) for name in shapes}
    is_peft = (adapter / PEFT_CONFIG).exists()
    if is_peft and scaling is not None:
        raise ValueError(f"scaling is {scaling}, but {adapter} is of PEFT and tells its own: leave it out")
    result = _through_peft(model, adapter, dtypes) if is_peft else _planned(reader, adapter, shapes, scaling)
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    with ShardWriter(out, max_shard_bytes=largest_layer_bytes(sizes)) as writer:
        for number, name in enumerate(shapes, start=1):
            if report is not None:
                report(name, number, len(shapes))
            tensor = result.read(name).to(dtypes[name])
            # aminmax is the one reduction that is vectorised for bf16, and it passes NaN and infinity on.
            if name in result.changed and not all(end.isfinite() for end in tensor.aminmax()):
                raise CheckpointError(
                    f"{name} holds NaN or infinity with {adapter} merged: expected finite numbers, check the "
                    "adapter, its scaling and the model"
                )
            writer.add(name, tensor)
        write_config(writer, config, dtypes[EMBEDDING])
        record = {
            "model": model.resolve().name,
            "adapter": adapter.resolve().name,
            "form": "peft" if is_peft else "rwkv",
            "scaling": scaling,
            "merged": result.merged,
            "replaced": result.replaced,
        }
        writer.write_json("adapter.json", record)
        writer.copy_companions(model)
    return Merge(writer.path, result.merged, result.replaced)


def stored_dtype(reader: TensorReader, name: str) -> torch.dtype:
    """The dtype of a tensor that can be computed with. Raises CheckpointError for any other."""
    for dtype in FLOAT_DTYPES:
        if str(dtype) == f"torch.{reader.dtype(name)}":
            return dtype
    raise CheckpointError(
        f"{reader.path}: {name} has dtype {reader.dtype(name)}, expected bfloat16, float16 or float32: "
        "save it in one of those first"
    )


def needs_scaling(parts: Mapping[str, object]) -> bool:
    """True for LoRA and DoRA, whose scaling is in no file; Bone has none."""
    return "lora_A" in parts


def checked_scaling(scaling: float | None) -> float:
    """The scaling of LoRA parts. Raises ValueError if none is given, or none that multiplies."""
    if scaling is None:
        raise ValueError(
            "LoRA parts are there and no scaling, which no file tells: give --scaling as the adapter was "
            "trained, both 0.5 (the default of RWKVInside) and 2.0 (of RWKV-Infer) are in circulation"
        )
    if not math.isfinite(scaling):
        raise ValueError(f"scaling is {scaling}, expected a finite number such as 0.5 or 2.0")
    return scaling


def check_parts(weight: tuple[int, ...], parts: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the parts are one whole adapter that fits a weight of this shape.

    parts: shape of each, by "lora_A", "lora_B", "lora_M" and "bone".
    """
    if set(parts) not in ({"lora_A", "lora_B"}, {"lora_A", "lora_B", "lora_M"}, {"bone"}):
        raise ValueError(
            f"found {', '.join(sorted(parts)) or 'no part'}, expected lora_A and lora_B, with lora_M for "
            "DoRA, or bone alone: take the adapter's complete file"
        )
    if len(weight) != 2:
        raise ValueError(f"the weight has shape {list(weight)}, expected [out, in]: only matrices have parts")
    outputs, inputs = weight
    if "bone" in parts:
        shape = parts["bone"]
        rank = shape[-1] if len(shape) == 3 else 0
        if not rank or outputs % rank or inputs % rank or shape != (inputs // rank, rank, rank):
            raise ValueError(
                f"bone has shape {list(shape)}, expected [in / r, r, r] with an r that divides both axes of "
                f"the weight's {list(weight)}: check that the adapter is of this model"
            )
        return
    low = parts["lora_A"][:1]
    expected = {"lora_A": (*low, inputs), "lora_B": (outputs, *low), "lora_M": (1, inputs)}
    for part, shape in parts.items():
        if shape != expected[part] and (part, shape) != ("lora_M", (inputs,)):
            raise ValueError(
                f"{part} has shape {list(shape)}, expected {list(expected[part])} for a weight of "
                f"{list(weight)}: check that the adapter is of this model"
            )


def merge_weight(weight: Tensor, parts: Mapping[str, Tensor], *, scaling: float | None) -> Tensor:
    """The weight with an adapter merged: computed in fp32, in the weight's shape and dtype.

    weight: [out, in]. LoRA: ``W + s B A`` with lora_A [r, in], lora_B [out, r] (arXiv 2106.09685). DoRA: that
    times lora_M [1, in] over the norm of its columns (arXiv 2402.09353, with the norms of RWKV's trainers).
    Bone: each r x r block ``W_ij`` becomes ``W_ij + W_ij bone_j + bone_j``, bone [in / r, r, r] (arXiv
    2409.15371). scaling: s, not read for Bone.
    Raises ValueError for parts that do not fit one another or the weight, and for LoRA without a scaling.
    """
    check_parts(tuple(weight.shape), {part: tuple(tensor.shape) for part, tensor in parts.items()})
    base = weight.float()
    values = {part: tensor.float() for part, tensor in parts.items()}
    if "bone" in values:
        return _with_bone(base, values["bone"]).to(weight.dtype)
    merged = base + checked_scaling(scaling) * (values["lora_B"] @ values["lora_A"])
    if "lora_M" in values:
        merged = values["lora_M"] * merged / (merged.norm(dim=0, keepdim=True) + DORA_EPS)
    return merged.to(weight.dtype)


def _with_bone(weight: Tensor, bone: Tensor) -> Tensor:
    rank = bone.shape[-1]
    blocks = weight.unflatten(1, (-1, rank)).unflatten(0, (-1, rank)).transpose(1, 2)  # [out/r, in/r, r, r]
    return weight + (blocks @ bone + bone).transpose(1, 2).reshape(weight.shape)


def plan_changes(adapter: TensorReader, shapes: Mapping[str, tuple[int, ...]]) -> Changes:
    """What an adapter of RWKV's trainers changes in a model whose tensors have these shapes; nothing is read.

    Raises CheckpointError for a name, dtype or shape that does not fit, and if nothing is changed.
    """
    changes: Changes = {}
    for theirs in adapter.names():
        module, _, last = spelled(theirs).rpartition(".")
        if last in CONSTANTS:
            continue  # the config says these
        part = last if last in ADAPTER_PARTS else WHOLE
        ours = f"{module}.{last if part == WHOLE else 'weight'}"
        if ours not in shapes:  # one name for r_norm and q_norm: the layer's kind in the model decides
            ours = ours.replace(".r_norm.", ".q_norm.")
        if ours not in shapes:
            raise CheckpointError(_unmatched(theirs, ours, adapter.path))
        stored_dtype(adapter, theirs)
        change = changes.setdefault(ours, {})
        if part in change:
            raise CheckpointError(
                f"{adapter.path}: {change[part]} and {theirs} are one tensor, {ours}: remove one"
            )
        change[part] = theirs
    if not changes:
        raise CheckpointError(
            f"{adapter.path} changes nothing: expected LoRA, DoRA or Bone parts, or tensors"
        )
    for ours, change in changes.items():
        _check_change(ours, change, adapter, shapes)
    return changes


def _unmatched(theirs: str, ours: str, where: Path) -> str:
    """Why a name of the adapter has no place, in one line."""
    advice = "check that the adapter is of this model"
    if theirs.startswith(PEFT_PREFIX):
        advice = f"this is a name of PEFT, give the directory that holds {PEFT_CONFIG} too"
    elif ours == HEAD:
        advice = "the model's head is its embedding (tie_word_embeddings), remove the name from the adapter"
    return f"{where}: {theirs} is no tensor of the model and no part of one: {advice}"


def _check_change(
    ours: str, change: Mapping[str, str], adapter: TensorReader, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless the shapes of one tensor's change fit."""
    parts = {part: adapter.shape(theirs) for part, theirs in change.items() if part != WHOLE}
    if WHOLE in change:
        found, expected = adapter.shape(change[WHOLE]), shapes[ours]
        if found not in (expected, (1, 1, *expected)):  # published vectors are [1, 1, C]
            raise CheckpointError(
                f"{adapter.path}: {change[WHOLE]} has shape {list(found)}, expected {list(expected)}: "
                "check that the adapter is of this model"
            )
    if not parts:
        return
    if ours == EMBEDDING and HEAD not in shapes:
        raise CheckpointError(_tied(adapter.path))
    try:
        check_parts(shapes[ours], parts)
    except ValueError as error:
        raise CheckpointError(f"{adapter.path}: {ours.removesuffix('.weight')}: {error}") from error


def _tied(adapter: Path) -> str:
    return (
        f"{adapter} adapts the embedding or the head, but in this model both are one tensor "
        "(tie_word_embeddings) and would change together: untie the model first"
    )


def _planned(
    reader: ShardReader, path: Path, shapes: Mapping[str, tuple[int, ...]], scaling: float | None
) -> Merged:
    """The merge of an adapter of RWKV's trainers, planned; tensors are computed when they are read."""
    adapter = open_reader(path)
    changes = plan_changes(adapter, shapes)
    if any(needs_scaling(change) for change in changes.values()):
        checked_scaling(scaling)
    elif scaling is not None:
        raise ValueError(
            f"scaling is {scaling}, but {path} has no LoRA or DoRA parts that it would scale: leave it out"
        )

    def read(name: str) -> Tensor:
        change = changes.get(name, {})
        value = adapter.read(change[WHOLE]).reshape(shapes[name]) if WHOLE in change else reader.read(name)
        parts = {part: adapter.read(theirs) for part, theirs in change.items() if part != WHOLE}
        return merge_weight(value, parts, scaling=scaling) if parts else value

    return Merged(
        read=read,
        changed=frozenset(changes),
        merged=sum(any(part in ADAPTER_PARTS for part in change) for change in changes.values()),
        replaced=sum(WHOLE in change for change in changes.values()),
    )


def _through_peft(model: Path, path: Path, dtypes: Mapping[str, torch.dtype]) -> Merged:
    """The merge of a PEFT adapter; what does not fit is told with PEFT's own reason."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{path} is a PEFT adapter and needs the peft library: pip install 'hrwkv[train]'")
    kind, names = read_json(path / PEFT_CONFIG).get("peft_type"), _peft_names(path)
    if HEAD not in dtypes and any("embed_tokens" in name or "lm_head" in name for name in names):
        raise CheckpointError(_tied(path))
    # Wide enough for all; every tensor is written in its own dtype again.
    core = load_model(model, dtype=functools.reduce(torch.promote_types, dtypes.values()))
    try:
        # FutureWarning: Transformers' words to PEFT.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            weights, merged = _merge_in_peft(core, path)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"PEFT cannot merge {path} of type {kind} ({reason}): check that the adapter is of this model"
        ) from error
    plain = {name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for name in names}
    return Merged(weights.__getitem__, frozenset(dtypes), merged=merged, replaced=len(plain & dtypes.keys()))


def _merge_in_peft(core: HybridModel, path: Path) -> tuple[dict[str, Tensor], int]:
    """All weights, and how many the adapter was merged into; names that PEFT would warn of are errors."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    from hrwkv.model.hf import HybridForCausalLM  # Transformers' models, which no other conversion waits for

    config = peft.PeftConfig.from_pretrained(str(path))
    if config.is_prompt_learning:
        raise ValueError("prompts are no weights, so nothing can be merged")
    config.inference_mode = True
    wrapped = peft.PeftModel(HybridForCausalLM.from_core(core), config)
    loaded = wrapped.load_adapter(str(path), "default", torch_device="cpu")
    if loaded.unexpected_keys:
        raise ValueError(f"the model has no place for {some(loaded.unexpected_keys)}")
    if loaded.missing_keys:
        raise ValueError(f"its weights lack {some(loaded.missing_keys)}, which its config names")
    merged = sum(isinstance(module, BaseTunerLayer) for module in wrapped.modules())
    return wrapped.merge_and_unload().state_dict(), merged


def _peft_names(path: Path) -> list[str]:
    """The tensors of a PEFT directory; PEFT would look for a missing file on the network."""
    for name in PEFT_WEIGHTS:
        if (path / name).exists():
            return open_reader(path / name).names()
    raise CheckpointError(f"{path} has {PEFT_CONFIG} and no {' or '.join(PEFT_WEIGHTS)}: copy it again")
