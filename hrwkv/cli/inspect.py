"""``hrwkv inspect``: what a file or directory is, without loading its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.text import Text

from hrwkv.cli.display import Display, count
from hrwkv.cli.recipes import RECIPES

if TYPE_CHECKING:
    from hrwkv.convert.inspection import Inspection, Memory

EXAMPLES = """
hrwkv inspect HRWKV7-Reka-Flash3.pth
hrwkv inspect student/ --verify
hrwkv inspect student/ --json
"""
FORMS = {
    "hrwkv": "directory of this package",
    "teacher": "Transformer, not converted",
    "rwkv-infer-pth": "RWKV-Infer .pth",
    "rwkv-infer-safetensors": "hybrid as published in safetensors",
    "rwkv-inside": "RWKVInside training checkpoint",
    "radlads": "RADLADS model",
    "adapter": "adapter of RWKV's trainers",
    "peft-adapter": "PEFT adapter",
    "unknown": "layers of no known form",
}
NOT_SAID = "not said"


def inspect(
    path: Annotated[Path, Parameter(help="A model directory, a file of weights, or an adapter.")],
    /,
    *,
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="One JSON object and nothing else.")
    ] = False,
    verify: Annotated[
        bool, Parameter(negative="", help="Compare every file of weights with its checksum.")
    ] = False,
) -> None:
    """Say what a file or directory of weights is, and what it lacks; no weights are loaded."""
    from hrwkv.convert.inspection import inspect_path
    from hrwkv.convert.presets import presets_of

    display = Display()
    found = inspect_path(path, presets=presets_of(RECIPES))
    if not as_json:
        show(display, found)
    if verify:
        found = dataclasses.replace(found, verified_files=run_verify(display, path, found, quiet=as_json))
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))


def run_verify(display: Display, path: Path, found: Inspection, *, quiet: bool) -> int:
    """The number of files, all as they were recorded; raises CheckpointError for the first that is not."""
    from hrwkv.model.shards import verify_checksums

    if quiet:
        return sum(1 for _ in verify_checksums(path))
    with display.task("Verifying", found.files) as task:
        for name, size in verify_checksums(path):
            task.advance(task.value + 1, f"{name}, {size:,} bytes")
    display.line("1 file matches" if task.value == 1 else f"{task.value} files match")
    return task.value


def show(display: Display, found: Inspection) -> None:
    """A table of what is known, then a line for each thing that is missing."""
    from hrwkv.model.shards import some

    table = rows(found)
    width = max(len(name) for name, _ in table)
    for name, value in table:
        display.console.print(Text.assemble((name.ljust(width), "bold"), f"  {value}"))
    for line in found.missing:
        display.line(f"Missing: {line}")
    if found.left:
        display.line(f"Carry nothing: {some(list(found.left))}")


def rows(found: Inspection) -> list[tuple[str, str]]:
    """Name and value of each line; what a source of this form does not have is left out."""
    lines = [("path", found.path), ("form", f"{found.form}: {FORMS[found.form]}")]
    if found.linear_layers or found.attention_layers:
        lines += model_rows(found)
    if found.adapters:
        kinds = ", ".join(f"{number:,} by {kind}" for kind, number in found.adapters.items())
        lines.append(("adapted weights", f"{kinds}, rank {_numbers(found.adapter_ranks)}"))
    dtypes = found.dtypes.items()
    named = ", ".join(name if len(dtypes) == 1 else f"{name} ({number:,} tensors)" for name, number in dtypes)
    lines += [
        ("parameters", f"{found.parameters:,} ({count(found.parameters)})"),
        ("weights", f"{found.weight_bytes:,} bytes, {named}, in {_of(found.files, 'file')}"),
        ("checksums", "recorded" if found.checksums else "not recorded"),
    ]
    return lines


def model_rows(found: Inspection) -> list[tuple[str, str]]:
    """The lines of a model: what it computes and what its caches take."""
    linear, full = len(found.linear_layers), len(found.attention_layers)
    lines = [("family", found.model_type)] if found.model_type else []
    if linear:
        lines.append(("variant", found.variant or NOT_SAID))
    lines.append(("layers", f"{linear + full}: {linear} RWKV-7, {full} attention"))
    if linear and full:
        lines.append(("attention layers", _numbers(found.attention_layers)))
    lines += [(_words(name), _value(size)) for name, size in found.sizes.items() if size is not None]
    if found.ranks:
        lines.append(("ranks", ", ".join(f"{_words(name)} {size:,}" for name, size in found.ranks.items())))
    of_no_layer = {"linear_rope": not linear, "attention_rope": not full}
    for name, feature in found.features.items():
        if not of_no_layer.get(name):
            lines.append((_words(name), _value(feature)))
    for name, fact in found.facts.items():
        source = f" ({fact.said_by})" if fact.said_by else ""
        lines.append((_words(name), _value(fact.value) + source))
    return lines + memory_rows(found.memory)


def memory_rows(memory: Memory | None) -> list[tuple[str, str]]:
    """The lines of what a sequence takes."""
    if memory is None:
        return []
    own, full = f"{memory.kv_bytes_per_token:,} bytes per token, bf16", memory.full_kv_bytes_per_token
    if memory.kv_bytes_per_token != full:
        ratio = f" (1 : {memory.kv_ratio:.2f})" if memory.kv_ratio is not None else ""
        own += f"; with full attention {full:,}{ratio}"
    return [("state", f"{memory.state_bytes:,} bytes per sequence, fp32"), ("KV cache", own)]


def _value(value: bool | float | str | None) -> str:
    """A value for a reader: yes and no, 8,000,000, 1e-06."""
    if value is None:
        return NOT_SAID
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{int(value):,}" if value == int(value) else str(value)


def _words(name: str) -> str:
    """A config's key for a reader."""
    return name.removeprefix("num_").removesuffix("_rank").replace("_", " ")


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _of(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
