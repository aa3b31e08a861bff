"""What a selection leaves: the chosen layers with their scores, and the student that has them."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hrwkv.distill.sweep import Scores
from hrwkv.model.checkpoint import expected_shapes, load_config, write_config
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.shards import ShardReader, ShardWriter
from hrwkv.settings import SelectSettings

RECORD, CHART = "selection.json", "selection.png"
SCORE_NAMES = {
    "recall": "recall's drop over ability's",
    "greedy": "KL taken off, nats per token",
}


@dataclass(frozen=True)
class LayerResult:
    """A layer's worth as attention (higher: keep it), and the scores by task of the model with it swapped."""

    layer: int
    score: float
    tasks: Scores


@dataclass(frozen=True)
class Selection:
    """The layers that stay attention, in order; rows and base are empty where nothing was measured.

    base: scores by task of the model without a swap: the teacher (recall), the student of stage 1 (greedy).
    tasks: those that recall was measured by.
    """

    method: str
    layers: tuple[int, ...]
    rows: tuple[LayerResult, ...] = ()
    base: Scores | None = None
    tasks: tuple[str, ...] = ()


def write_selection(
    selection: Selection, out: Path, *, student: Path, teacher: Path, settings: SelectSettings
) -> None:
    """A student with the teacher's attention in the chosen layers and stage 1's mixers in the others.

    Written beside ``out`` and renamed, with tokenizer and the like, selection.json, and selection.png where
    something was measured. Raises CheckpointError for a directory that cannot be read or written.
    """
    config = selected_config(load_config(student), selection.layers)
    ours, theirs = ShardReader(student), ShardReader(teacher)
    kept = {f"model.layers.{layer}" for layer in selection.layers}
    dtype = getattr(torch, ours.dtype("model.embed_tokens.weight"))
    with ShardWriter(out) as writer:
        write_config(writer, config, dtype)
        for name in expected_shapes(config):
            layer, _, parameter = name.partition(".self_attn.")
            reader = theirs if parameter and layer in kept else ours
            writer.add(name, reader.read(name).to(dtype))
        record = {**asdict(selection), "settings": asdict(settings)}
        writer.write_json(
            RECORD, record | {"student": student.resolve().name, "teacher": teacher.resolve().name}
        )
        if selection.rows:
            writer.write_bytes(CHART, bar_chart(selection))
        writer.copy_companions(student, teacher)


def selected_config(config: HybridConfig, layers: tuple[int, ...]) -> HybridConfig:
    """The student's config with attention in ``layers``, without RoPE there."""
    kinds = [FULL if layer in layers else LINEAR for layer in range(config.num_hidden_layers)]
    return HybridConfig.from_dict({**config.to_dict(), "layer_types": kinds, "attention_rope": False})


def bar_chart(selection: Selection) -> bytes:
    """A PNG with a bar a layer, the chosen ones in another colour; no display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 0.24 * len(selection.rows) + 1.5), 3.4), layout="constrained", dpi=130)
    axis = figure.subplots()
    for label, colour, wanted in (("attention", "tab:orange", True), ("RWKV-7", "tab:blue", False)):
        rows = [row for row in selection.rows if (row.layer in selection.layers) == wanted]
        axis.bar([row.layer for row in rows], [row.score for row in rows], color=colour, label=label)
    axis.set_xlabel("layer")
    axis.set_ylabel(SCORE_NAMES[selection.method])
    axis.set_title(f"Layers that stay attention, by {selection.method}", fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
