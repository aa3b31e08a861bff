"""The report of an evaluation: ``report.json`` (all numbers), ``report.md`` (tables), and pictures.

Each file is written beside its place and renamed, so a reader of the folder never meets half of one. The
table rows are made here once, for the Markdown file and for the screen alike. The pictures are in
``plots.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrwkv.eval import plots
from hrwkv.eval.memory import Memory, break_even_context
from hrwkv.eval.needle import Grid
from hrwkv.eval.perplexity import Comparison, Scores

Table = tuple[list[str], list[list[str]]]
MISSING = "-"


@dataclass(frozen=True)
class Result:
    """What was measured of one model; what was not is None."""

    name: str
    comparison: Comparison | None = None
    grid: Grid | None = None
    memory: Memory | None = None


def write_report(
    out: Path | str, results: Sequence[Result], *, title: str, facts: Mapping[str, Any]
) -> list[Path]:
    """Write report.json, report.md, and the pictures for which there are numbers; existing ones are replaced.

    out: a folder, made if absent. results: the teacher first, if there is one. facts: how it was measured
    (text, split, sizes, seeds, versions), in JSON values. Returns the files.

    Raises ValueError if ``results`` is empty, OSError if a file cannot be written.
    """
    if not results:
        raise ValueError("a report needs at least one result")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = [_write(out / "report.json", lambda path: _write_json(path, results, title, facts))]
    grids = {result.name: result.grid for result in results if result.grid}
    if grids:
        written.append(_write(out / "passkey.png", lambda path: plots.passkey_heatmaps(path, grids)))
    curves = {
        result.name: result.comparison.by_position
        for result in results
        if result.comparison and result.comparison.overall.kl
    }
    if curves:
        written.append(_write(out / "position.png", lambda path: plots.position_curves(path, curves)))
    text = _markdown(results, title, facts, [path.name for path in written if path.suffix == ".png"])
    written.insert(1, _write(out / "report.md", lambda path: path.write_text(text, encoding="utf-8")))
    return written


def summary_table(results: Sequence[Result]) -> Table:
    """Header and rows: one model per row, the numbers that answer "how much was kept, at which memory"."""
    header = ["model", "perplexity", "ratio", "KL", "top-1", "passkey", "state", "KV/token"]
    rows = []
    for result in results:
        cells = _score_cells(result.comparison.overall) if result.comparison else [MISSING] * 4
        passkey = percent(result.grid.accuracy if result.grid else None)
        memory = [MISSING] * 2
        if result.memory:
            memory = [size(result.memory.state_bytes), size(result.memory.kv_bytes_per_token)]
        rows.append([result.name, *cells, passkey, *memory])
    return header, rows


def _score_cells(scores: Scores) -> list[str]:
    perplexity, ratio = _number(scores.student_perplexity), _number(scores.ratio)
    return [perplexity, ratio, _number(scores.kl, digits=4), percent(scores.agreement)]


def position_table(results: Sequence[Result]) -> Table:
    """KL and top-1 agreement of every student by context length."""
    compared = [r for r in results if r.comparison and r.comparison.overall.kl]
    buckets = compared[0].comparison.by_position if compared and compared[0].comparison else ()
    header = ["model", *(f"{scores.first}-{scores.last}" for scores in buckets)]

    def row(result: Result, text: Callable[[Scores], str]) -> list[str]:
        assert result.comparison is not None
        by_first = {scores.first: text(scores) for scores in result.comparison.by_position}
        return [by_first.get(scores.first, MISSING) for scores in buckets]

    rows = []
    for result in compared:
        rows.append([f"{result.name}, KL", *row(result, lambda scores: _number(scores.kl))])
        rows.append([f"{result.name}, top-1", *row(result, lambda scores: percent(scores.agreement))])
    return header, rows


def passkey_table(results: Sequence[Result]) -> Table:
    """Passkey accuracy by prompt length."""
    measured = [(result.name, result.grid) for result in results if result.grid]
    lengths = sorted({length for _, grid in measured for length in grid.lengths})
    rows = [[name, *(percent(grid.by_length().get(length)) for length in lengths)] for name, grid in measured]
    return ["model", *map(str, lengths)], rows


def memory_table(results: Sequence[Result]) -> Table:
    """Layers, parameters by kind, memory of a sequence, and from which context on it is below the first's."""
    measured = [(result.name, result.memory) for result in results if result.memory]
    kinds = (
        [kind for kind in measured[0][1].by_kind if any(m.by_kind[kind] for _, m in measured)]
        if measured
        else []
    )
    header = [
        "model",
        "RWKV + attention layers",
        "parameters",
        *kinds,
        "state",
        "KV per token",
        "less memory from",
    ]
    rows = []
    for name, memory in measured:
        start = break_even_context(memory, measured[0][1])
        rows.append(
            [
                name,
                f"{memory.rwkv_layers} + {memory.attention_layers}",
                f"{memory.parameters:,}",
                *(f"{memory.by_kind[kind]:,}" for kind in kinds),
                f"{memory.state_bytes:,} B",
                f"{memory.kv_bytes_per_token:,} B",
                MISSING if start is None else f"{start:,} tokens",
            ]
        )
    return header, rows


def size(count: int) -> str:
    """Bytes for a reader: 135168 -> '132 KiB'."""
    power = min(int(math.log(count, 1024)), 4) if count else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count / 1024**power:.4g} {unit}"


def percent(share: float | None) -> str:
    """A share from 0 to 1 in percent, one digit after the point."""
    return MISSING if share is None else f"{share:.1%}"


def _number(value: float | None, *, digits: int = 3) -> str:
    """Fixed digits after the point, fewer for large numbers: 7.892, 80,597."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def _write(path: Path, make: Callable[[Path], Any]) -> Path:
    """Let ``make`` write a file beside ``path``, then rename it there; nothing is left behind on an error."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        make(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write_json(path: Path, results: Sequence[Result], title: str, facts: Mapping[str, Any]) -> None:
    models = []
    for result in results:
        values = dataclasses.asdict(result)
        if result.comparison:
            scores = result.comparison.overall
            values["comparison"].update(
                student_perplexity=scores.student_perplexity,
                teacher_perplexity=scores.teacher_perplexity,
                ratio=scores.ratio,
            )
        if result.grid:
            values["grid"].update(accuracy=result.grid.accuracy)
        if result.memory and results[0].memory:
            values["memory"].update(break_even_context=break_even_context(result.memory, results[0].memory))
        models.append(values)
    text = json.dumps({"title": title, "facts": dict(facts), "models": models}, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _markdown(results: Sequence[Result], title: str, facts: Mapping[str, Any], pictures: list[str]) -> str:
    sections = [
        f"# {title}",
        _table(summary_table(results)),
        "KL is KL(teacher || model) in nats per token; top-1 is how often both choose the same next token; "
        "state is per sequence (fp32), KV per token of each sequence (bf16).",
    ]
    for heading, table in (
        ("By context length", position_table(results)),
        ("Passkey accuracy by prompt length", passkey_table(results)),
        ("Memory", memory_table(results)),
    ):
        if table[1]:
            sections += [f"## {heading}", _table(table)]
    sections += [f"![{Path(name).stem}]({name})" for name in pictures]
    sections += ["## How it was measured", "\n".join(f"- {key}: {value}" for key, value in facts.items())]
    return "\n\n".join(sections) + "\n"


def _table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
