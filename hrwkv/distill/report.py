"""The model card of a run: README.md with front matter, and loss.png, from what the run has written.

Everything comes from log.jsonl, recipe.json and the model directories, and from eval/report.json where an
evaluation stands beside them; so a card can be made again at any time.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hrwkv.distill.checkpointing import write_bytes
from hrwkv.model.checkpoint import load_config
from hrwkv.model.config import LINEAR
from hrwkv.model.shards import read_json

logger = logging.getLogger(__name__)

CARD, CURVE, TEMPLATE = "README.md", "loss.png", "model_card.md.jinja"
MISSING = "-"
Rows = Sequence[Mapping[str, Any]]


def write_card(out: Path, model: Path, *, teacher: Path, base_model: str) -> list[Path]:
    """Write README.md and loss.png into a run's directory and beside the weights of its last model.

    out: a run that has finished at least one stage. model: that stage's directory. base_model: what the
    card calls the teacher. Returns the files. Raises ValueError for a run without a log.
    """
    log = out / "log.jsonl"
    if not log.exists():
        raise ValueError(f"{out} has no log.jsonl: expected the output of hrwkv distill")
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    card = render_card(
        facts_of(out, model, rows) | {"base_model": base_model, "licence": licence_of(teacher)}
    )
    curve = loss_curve(rows)
    written = []
    for folder in (out, model):
        for name, data in ((CARD, card.encode()), (CURVE, curve)):
            write_bytes(folder / name, data)
            written.append(folder / name)
    return written


def render_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown. Raises jinja2.UndefinedError where a fact is missing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (Markdown, not HTML)
    )
    environment.filters["share"] = lambda value: MISSING if value is None else f"{value:.1%}"
    environment.filters["number"] = lambda value, digits: MISSING if value is None else f"{value:.{digits}f}"
    return environment.get_template(TEMPLATE).render(facts)


def facts_of(out: Path, model: Path, rows: Rows) -> dict[str, Any]:
    """What the card says of a run, but for base model and licence."""
    config = load_config(model)
    stages = [stage_facts([row for row in rows if row["stage"] == n]) for n in _stages(rows)]
    selection = out / "selected" / "selection.json"
    evaluation = out / "eval" / "report.json"
    recipe = read_json(out / "recipe.json")
    return {
        "name": out.resolve().name,
        "variant": config.variant,
        "layers": config.layer_types,
        "linear": sum(kind == LINEAR for kind in config.layer_types),
        "attention": config.full_layers,
        "selection": read_json(selection)["method"] if selection.exists() else "given",
        "sources": sorted(
            {source for stage in _stages(rows) for source in recipe[str(stage)]["data.sources"]}
        ),
        "tokens": sum(stage["tokens"] for stage in stages),
        "hours": sum(stage["hours"] for stage in stages),
        "stages": stages,
        "skipped": sum(row.get("skipped", False) for row in rows),
        "evaluation": evaluation_facts(read_json(evaluation)) if evaluation.exists() else [],
        "recipe": json.dumps(recipe, indent=2),
    }


def _stages(rows: Rows) -> list[int]:
    return sorted({row["stage"] for row in rows})


def stage_facts(rows: Rows) -> dict[str, Any]:
    """Tokens, hours and the last validation of one stage's rows; hours are of the steps that count.

    Raises ValueError where rows are missing.
    """
    last, batch_tokens = rows[-1], rows[0]["tokens"] // rows[0]["step"]
    seconds = sum(batch_tokens / row["tokens_per_second"] for row in rows)
    found = next((row["validation"] for row in reversed(rows) if "validation" in row), None)
    if found is None:
        raise ValueError(
            f"log.jsonl has no validation of stage {last['stage']}, which a card needs: rows are missing"
        )
    rate = last["tokens"] / seconds
    return {"stage": last["stage"], "tokens": last["tokens"], "hours": seconds / 3600, "rate": rate, **found}


def evaluation_facts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation's table, one a model."""
    rows = []
    for model in report["models"]:
        scores, grid = model["comparison"], model["grid"]
        rows.append(
            {
                "name": model["name"],
                "perplexity": scores and scores["student_perplexity"],
                "ratio": scores and scores["ratio"],
                "kl": scores and scores["overall"]["kl"],
                "agreement": scores and scores["overall"]["agreement"],
                "passkey": grid and grid["accuracy"],
            }
        )
    return rows


def licence_of(teacher: Path) -> str | None:
    """The licence in the front matter of the teacher's README.md; None where there is none to be read.

    A run of days must not end without its card because somebody else's is damaged.
    """
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = teacher / "README.md"
    try:
        found = metadata_load(card) if card.exists() else None
    except (ValueError, YAMLError) as error:
        logger.warning("%s: no licence is taken from it: %s", card, " ".join(str(error).split()))
        return None
    licence = (found or {}).get("license")
    return None if licence is None else str(licence)


def loss_curve(rows: Rows) -> bytes:
    """A PNG, one panel a stage: the loss of each step and the held-out KL, over tokens; needs no display."""
    from matplotlib.figure import Figure

    stages = _stages(rows)
    figure = Figure(figsize=(4.2 * len(stages) + 0.6, 3.4), layout="constrained", dpi=130)
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        own = [row for row in rows if row["stage"] == stage]
        looks = [row for row in own if "validation" in row]
        axis.plot([row["tokens"] for row in own], [row["loss"] for row in own], linewidth=0.8, label="loss")
        held_out = [row["validation"]["kl"] for row in looks]
        axis.plot([row["tokens"] for row in looks], held_out, marker="o", label="held-out KL")
        axis.set_yscale("log")
        axis.set_title(f"stage {stage}", fontsize=10)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
