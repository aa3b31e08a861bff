"""What an interrupted run goes on from: the recipe of each stage, and checkpoints of its weights and moments.

A checkpoint is written beside its final name and renamed by the first process when all have written, so a
folder with the final name is complete. Only folders that match this module's own names are ever removed.
Random numbers are not kept, because no step draws any; the data position is the step, because batches have
random access.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hrwkv.distill.optimiser import optimiser_state, trained_parameters
from hrwkv.distill.parallel import Ranks, barrier, load_state, save_state
from hrwkv.model.modeling import HybridModel
from hrwkv.model.shards import read_json
from hrwkv.settings import DistillSettings

NAME = re.compile(r"stage(\d)-step(\d{7})")
PARTIAL = re.compile(r"\.stage\d-step\d{7}\.partial")
KEPT = 2
FINGERPRINT_BYTES = 2**20

Recipe = dict[str, Any]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write beside, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def model_fingerprint(path: Path) -> dict[str, str]:
    """Hashes that tell one model directory from another, wherever it lies.

    ``weights`` covers the first and last MiB and the size of each shard: a whole read of a large model takes
    minutes.
    """
    weights = hashlib.sha256()
    for shard in sorted(path.glob("*.safetensors")):
        size = shard.stat().st_size
        weights.update(f"{shard.name} {size}\n".encode())
        with shard.open("rb") as file:
            weights.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(size - FINGERPRINT_BYTES, 0))
            weights.update(file.read(FINGERPRINT_BYTES))
    config = hashlib.sha256((path / "config.json").read_bytes())
    return {"config": config.hexdigest(), "weights": weights.hexdigest()}


def stage_recipe(settings: DistillSettings, stage: int, *, student: Path, teacher: Path) -> Recipe:
    """Everything that decides a stage's losses, as flat ``name: value``; not device and reporting."""
    values = asdict(settings)
    own = {"stage": values[f"stage{stage}"], "data": values["data"]}
    rest = {name: values[name] for name in ("mode", "seed", "dtype")}
    models = {"student": model_fingerprint(student), "teacher": model_fingerprint(teacher)}
    flat = {
        f"{part}.{name}": value for part, fields in (own | models).items() for name, value in fields.items()
    }
    # Through JSON, so that tuples compare equal to what a file gives back.
    recipe: Recipe = json.loads(json.dumps(rest | flat))
    return recipe


def check_recipe(recipe: Recipe, earlier: Recipe, *, where: Path) -> None:
    """Raise ValueError, naming the first key that differs from the recipe of before."""
    for key in sorted(recipe.keys() | earlier.keys()):
        now, then = recipe.get(key), earlier.get(key)
        if now != then:
            raise ValueError(
                f"cannot resume {where}: {key} is {_short(now)}, the interrupted run had {_short(then)}; "
                "give the same recipe, student and teacher, or another output directory"
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Checkpoints:
    """The checkpoints of one output directory."""

    def __init__(self, folder: Path, ranks: Ranks, *, recipe: Recipe) -> None:
        self.folder, self.ranks = folder, ranks
        self.fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def steps(self, stage: int) -> list[int]:
        """Steps of the complete checkpoints of a stage, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = [NAME.fullmatch(entry.name) for entry in self.folder.iterdir()]
        return sorted(int(match[2]) for match in matches if match and int(match[1]) == stage)

    def save(self, stage: int, step: int, *, student: HybridModel, optimiser: torch.optim.Optimizer) -> None:
        """Write what stage and step have become, then remove all but the last two of this stage."""
        final = self.folder / f"stage{stage}-step{step:07d}"
        partial = self.folder / f".{final.name}.partial"
        if self.ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [final, partial]:
                shutil.rmtree(leftover, ignore_errors=True)
        barrier(self.ranks)
        try:
            save_state(_tensors(student, optimiser), partial, self.ranks)
            barrier(self.ranks)
            if self.ranks.is_first:
                facts = {"stage": stage, "step": step, "next_batch": step, "recipe": self.fingerprint}
                write_json(partial / "trainer.json", facts)
                os.replace(partial, final)
                for old in self.steps(stage)[:-KEPT]:
                    shutil.rmtree(self.folder / f"stage{stage}-step{old:07d}")
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        barrier(self.ranks)

    def load(self, stage: int, *, student: HybridModel, optimiser: torch.optim.Optimizer) -> int:
        """Fill student and optimiser from a stage's latest checkpoint; returns the steps done, 0 for none."""
        steps = self.steps(stage)
        if not steps:
            return 0
        folder = self.folder / f"stage{stage}-step{steps[-1]:07d}"
        facts = read_json(folder / "trainer.json")
        if facts["recipe"] != self.fingerprint:
            raise ValueError(
                f"{folder} belongs to a run with another recipe: remove it to start the stage again"
            )
        load_state(_tensors(student, optimiser, fresh=True), folder, self.ranks)
        return int(facts["step"])


def remove_checkpoints(folder: Path, stages: Sequence[int]) -> None:
    """Remove the checkpoints of finished stages and half-written ones, and the folder if it is empty then."""
    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        match = NAME.fullmatch(entry.name)
        if (match and int(match[1]) in stages) or (stages and PARTIAL.fullmatch(entry.name)):
            shutil.rmtree(entry)
    if not any(folder.iterdir()):
        folder.rmdir()


def _tensors(
    student: HybridModel, optimiser: torch.optim.Optimizer, *, fresh: bool = False
) -> dict[str, Any]:
    return {
        "model": {name: parameter.detach() for name, parameter in trained_parameters(student)},
        "optimiser": optimiser_state(student, optimiser, fresh=fresh),
    }
