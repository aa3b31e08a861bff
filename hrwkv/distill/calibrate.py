"""Real steps of a recipe on this machine, to correct a plan's rates.

A correction is kept under everything that decides a rate, so one of a small model never moves the plan of a
large one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from hrwkv.distill.checkpointing import write_json
from hrwkv.distill.gpus import Gpu
from hrwkv.distill.logs import Progress
from hrwkv.distill.plan_memory import Pair
from hrwkv.distill.plan_time import tokens_per_second
from hrwkv.distill.trainer import distill
from hrwkv.model.config import HybridConfig
from hrwkv.model.shards import read_json
from hrwkv.settings import DistillSettings

STEPS = 20
WARM_UP = 10  # steps that compile kernels and fill caches, not counted
# What a rate depends on: sizes of the models, and these keys of a recipe.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
)
RUN_KEYS = ("mode", "dtype", "frozen_dtype")
STAGE_KEYS = ("micro_batch_tokens", "hidden_weight", "gradient_checkpointing", "keep", "optimiser")


class _EnoughError(Exception):
    """All steps are measured; ends the run before it validates and writes a model."""


def measure_rate(student: Path, teacher: Path, settings: DistillSettings, *, stage: int) -> float:
    """Tokens/s of one stage over the last of ``STEPS`` real steps on this machine; nothing is kept.

    student: a converted directory, trained or not. Raises what ``distill`` raises.
    """
    points: list[tuple[int, float]] = []

    def observe(progress: Progress) -> None:
        if progress.step >= WARM_UP:
            points.append((progress.step, time.perf_counter()))
        if progress.step >= STEPS:
            raise _EnoughError

    with tempfile.TemporaryDirectory(prefix="hrwkv-plan-") as folder:
        try:
            distill(
                student,
                teacher,
                Path(folder) / "run",
                shortened(settings, stage),
                stages=[stage],
                resume=False,
                observer=observe,
            )
        except _EnoughError:
            (first, began), (last, ended) = points[0], points[-1]
    return (last - first) * settings.batch_tokens(stage) / (ended - began)


def shortened(settings: DistillSettings, stage: int) -> DistillSettings:
    """The same steps, one more than are measured, so that none of those looks up from its work."""
    own = replace(settings.stage(stage), tokens=(STEPS + 1) * settings.batch_tokens(stage))
    changes = {f"stage{stage}": own}
    return replace(settings, validate_every=0, checkpoint_every=0, **changes)  # type: ignore[arg-type]


class Corrections:
    """Measured over planned rates in a JSON file, for recipes that compute the same on the same GPU."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ratios: dict[str, float] = read_json(path) if path.exists() else {}

    def of(self, pair: Pair, settings: DistillSettings, gpu: Gpu) -> Mapping[int, float]:
        """Those that are known, by stage."""
        keys = {stage: rate_key(pair.student, settings, gpu, stage=stage) for stage in (1, 2, 3)}
        return {stage: self._ratios[key] for stage, key in keys.items() if key in self._ratios}

    def add(self, pair: Pair, settings: DistillSettings, gpu: Gpu, *, stage: int, rate: float) -> float:
        """Keep a measured rate (tokens/s) of one GPU, on disk at once; returns it over the planned one."""
        planned = tokens_per_second(pair, settings, stage=stage, gpu=gpu, gpus=1)
        self._ratios[rate_key(pair.student, settings, gpu, stage=stage)] = rate / planned
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self._ratios)
        return rate / planned


def rate_key(config: HybridConfig, settings: DistillSettings, gpu: Gpu, *, stage: int) -> str:
    """One word for everything that decides a stage's rate on one GPU."""
    own, run = asdict(settings.stage(stage)), asdict(settings)
    facts = {
        "sizes": [getattr(config, name) for name in (*SIZES, *config.rank_names)],
        "run": [run[name] for name in RUN_KEYS],
        "stage": [own[name] for name in STAGE_KEYS],
        "batch": [settings.context_length(stage), settings.batch_tokens(stage)],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{gpu.name} stage{stage} {digest[:16]}"
