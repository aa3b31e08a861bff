"""What an interrupted run goes on from: the recipe of each stage, and its checkpoints.

A checkpoint is a complete model directory, the optimiser's state by parameter name, and ``trainer.json``; any
number of processes with any engine goes on from it. It is written beside its final name and renamed by the
first process when all have written, so a folder with the final name is complete. Only folders that match this
module's own names are ever removed. Random numbers are not kept, because no step draws any; the data position
is the step, because batches have random access.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrwkv.distill.parallel import Engine, Ranks, agree, barrier
from hrwkv.model.checkpoint import open_weights, write_config
from hrwkv.model.shards import CheckpointError, ShardWriter, read_json
from hrwkv.settings import DistillSettings

NAME = re.compile(r"stage(\d)-step(\d{7})")
PARTIAL = re.compile(r"\.stage\d-step\d{7}\.partial")
KEPT = 2
FINGERPRINT_BYTES = 2**20

# Settings that change no loss but for the order of sums.
COSTS = (
    ("stage", "micro_batch_tokens"),
    ("stage", "gradient_checkpointing"),
    ("stage", "keep"),
    ("data", "workers"),
    ("data", "prefetch"),
    ("data", "cache"),
)

Recipe = dict[str, Any]


@contextlib.contextmanager
def claimed(out: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other runs out of a folder in the ``with`` block, which may stand in another of the same folder.

    The lock is a file beside the folder that the system gives up with the process, however it ends. Raises
    ValueError on every process if another run holds it.
    """
    import filelock

    path = out.absolute()
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
    refusal: Exception | None = None
    if ranks.is_first:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            refusal = ValueError(f"another run works in {out}: wait for its end, or choose another output")
        except OSError as error:
            refusal = error
    agree(refusal, ranks)
    try:
        yield
    finally:
        if ranks.is_first:
            if lock.lock_counter == 1:  # the outermost block; a claimant checks that its file is still there
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write beside, then rename."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, then rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
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
    """Everything that decides a stage's losses, as flat ``name: value``; not device and reporting.

    Nor what only costs memory or time: a run that has met the end of the memory may go on with smaller
    micro-batches.
    """
    values = asdict(settings)
    own = {"stage": values[f"stage{stage}"], "data": values["data"]}
    for part, name in COSTS:
        del own[part][name]
    names = ("mode", "seed", "dtype", "frozen_dtype", "spike_factor", "spike_action", "spike_limit")
    rest = {name: values[name] for name in names}
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


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the steps behind it, and what the trainer keeps in it."""

    folder: Path
    step: int
    extra: dict[str, Any]

    @property
    def model(self) -> Path:
        """A complete model directory, with fp32 masters of everything that trains."""
        return self.folder / "model"

    @property
    def moments(self) -> Path:
        """The optimiser's state, for ``Engine.load_moments``."""
        return self.folder / "optimiser"


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

    def latest(self, stage: int) -> Checkpoint | None:
        """The last complete checkpoint of a stage. Raises ValueError if it is of another recipe."""
        steps = self.steps(stage)
        if not steps:
            return None
        folder = self.folder / f"stage{stage}-step{steps[-1]:07d}"
        facts = read_json(folder / "trainer.json")
        if facts["recipe"] != self.fingerprint:
            raise ValueError(
                f"{folder} belongs to a run with another recipe: remove it to start the stage again"
            )
        found = Checkpoint(folder, int(facts["step"]), facts["extra"])
        try:
            open_weights(found.model)
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot read the checkpoint {folder}, remove it to use the one before: {error}"
            ) from error
        return found

    def save(
        self, stage: int, step: int, engine: Engine, *, source: Path, extra: dict[str, Any] | None = None
    ) -> None:
        """Write what stage and step have become, then remove all but the last two of this stage.

        source: the model directory that the stage began with. extra: what else a resume needs, for JSON.
        Raises OSError or CheckpointError on every process where one cannot write, and leaves those of before.
        """
        final = self.folder / f"stage{stage}-step{step:07d}"
        partial = self.folder / f".{final.name}.partial"
        if self.ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        barrier(self.ranks)
        written = Checkpoint(partial, step, extra or {})
        try:
            engine.save_moments(written.moments)
            write_model(engine, written.model, source=source)
            agree(self._complete(written, stage, final) if self.ranks.is_first else None, self.ranks)
        except (OSError, CheckpointError):
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _complete(self, written: Checkpoint, stage: int, final: Path) -> OSError | None:
        """Give a written checkpoint its name and remove older ones; returns what went wrong."""
        facts = {"stage": stage, "step": written.step, "recipe": self.fingerprint, "extra": written.extra}
        try:
            write_json(written.folder / "trainer.json", facts)
            if final.exists():
                shutil.rmtree(final)
            os.replace(written.folder, final)
            for old in self.steps(stage)[:-KEPT]:
                shutil.rmtree(self.folder / f"stage{stage}-step{old:07d}")
        except OSError as error:
            return error
        return None


def write_model(engine: Engine, path: Path, *, source: Path) -> None:
    """Write a complete model directory: fp32 masters of what trains, the rest as it stands in ``source``.

    Every process takes part, the first one writes. Raises on all of them what that one meets.
    """
    weights = engine.weights()
    error = _write(weights, engine, path, source) if engine.ranks.is_first else None
    for _ in weights:  # those who do not write, and a writer that has failed, still take part in gathering
        pass
    agree(error, engine.ranks)


def _write(
    weights: Iterator[tuple[str, Tensor]], engine: Engine, path: Path, source: Path
) -> OSError | CheckpointError | None:
    try:
        config, reader, names = open_weights(source)
        with ShardWriter(path) as writer:
            write_config(writer, config, torch.float32)
            trained = set()
            for name, weight in weights:
                writer.add(name, weight)
                trained.add(name)
            for name in names:
                if name not in trained:
                    writer.add(name, reader.read(name))
            writer.copy_companions(source)
    except (OSError, CheckpointError) as error:
        return error
    return None


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
