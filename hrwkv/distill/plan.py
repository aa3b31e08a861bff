"""What a recipe will need, told before anything loads: memory, time, disk, money, and what to change.

All of it follows from two configs and the settings. Memory decides alone whether a plan is refused; then the
cheapest change of settings or GPUs that fits is looked for among those that a user would try one by one. Left
out: the memory of the host, other users of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

from hrwkv.distill.checkpointing import KEPT as KEPT_CHECKPOINTS
from hrwkv.distill.gpus import GIB, Gpu
from hrwkv.distill.plan_memory import Pair, StageMemory, micro_batch_tokens, plan_memory
from hrwkv.distill.plan_time import tokens_per_second
from hrwkv.distill.stages import STAGES
from hrwkv.model.flops import stage_operations, utilisation
from hrwkv.model.modeling import Keep
from hrwkv.settings import DistillSettings, StageSettings

# Of each GPU: the driver's context, libraries' workspaces, fragments of the allocator.
RESERVE = 3 * GIB
MAX_GPUS = 64
# Choices from the fastest to the smallest, and what a step along each of them costs the user: time for
# micro-batches and recomputation, exactness for 8 bits, other steps for a larger batch, money for GPUs.
KEEPS: tuple[Keep, ...] = ("mixer", "mlp", "stream", "nothing")
OPTIMISERS: tuple[Literal["adamw", "adamw8bit"], ...] = ("adamw", "adamw8bit")
MICRO_COST, KEEP_COST, OPTIMISER_COST, BATCH_COST, GPU_COST = 1, 3, 10, 20, 100
# The same for keys that all stages share. Freezing the MLPs costs quality, so it is the last resort.
SHARED_CHOICES: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"dtype": "bfloat16"}),
    (4, {"reduce_each_micro_batch": True}),
    (4, {"parallel": "fsdp2"}),
    (12, {"frozen_dtype": "float8"}),
    (12, {"frozen_dtype": "bfloat16"}),
    (1000, {"mode": "frozen-mlp"}),
)


@dataclass(frozen=True)
class StagePlan:
    """One stage. micro_batch: tokens that a GPU computes at once. mfu: share of the GPUs' bf16 rate."""

    stage: int
    tokens: int
    steps: int
    micro_batch: int
    memory: StageMemory
    tokens_per_second: float
    mfu: float

    @property
    def hours(self) -> float:
        """Training alone."""
        return self.tokens / self.tokens_per_second / 3600


@dataclass(frozen=True)
class Plan:
    """All stages on ``gpus`` of one kind; disk: bytes of models and checkpoints, the teacher left out."""

    gpu: Gpu
    gpus: int
    stages: tuple[StagePlan, ...]
    disk: int

    @property
    def hours(self) -> float:
        """All stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def fits(self) -> bool:
        """True if every stage leaves the reserve of each GPU free."""
        return all(fits(stage.memory, self.gpu) for stage in self.stages)


def make_plan(
    pair: Pair,
    settings: DistillSettings,
    gpu: Gpu,
    *,
    gpus: int = 1,
    corrections: Mapping[int, float] | None = None,
) -> Plan:
    """The plan of a recipe's three stages.

    corrections: by stage, measured tokens/s over planned ones. Raises ValueError for settings that do not
    run on so many GPUs.
    """
    check(settings, gpus)
    stages = []
    for number in STAGES:
        rate = tokens_per_second(pair, settings, stage=number, gpu=gpu, gpus=gpus)
        rate *= (corrections or {}).get(number, 1.0)
        operations = stage_operations(
            pair.student,
            pair.teacher,
            stage=number,
            mode=settings.mode,
            context_length=settings.context_length(number),
        )
        stages.append(
            StagePlan(
                stage=number,
                tokens=settings.steps(number) * settings.batch_tokens(number),
                steps=settings.steps(number),
                micro_batch=micro_batch_tokens(settings, number, gpus=gpus),
                memory=plan_memory(pair, settings, stage=number, gpus=gpus),
                tokens_per_second=rate,
                mfu=utilisation(operations, tokens_per_second=rate, peak=gpus * gpu.bf16),
            )
        )
    return Plan(gpu, gpus, tuple(stages), disk_bytes(stages))


def fits(memory: StageMemory, gpu: Gpu) -> bool:
    """True if a stage leaves the reserve free."""
    return memory.total + RESERVE <= gpu.memory


def disk_bytes(stages: list[StagePlan]) -> int:
    """The converted student, a selection and each stage's model in fp32, and the checkpoints of one stage.

    A stage keeps its last checkpoints and writes one more beside them; each is a model with its moments.
    """
    memory = stages[-1].memory
    model = 4 * (memory.trained + memory.frozen)
    checkpoints = max(model + 8 * stage.memory.trained for stage in stages)
    return (2 + len(stages)) * model + (KEPT_CHECKPOINTS + 1) * checkpoints


def check(settings: DistillSettings, gpus: int) -> None:
    """Raise ValueError, naming the key, where the trainer would refuse to run on so many GPUs."""
    if gpus > 1 and settings.frozen_dtype != "bfloat16":
        raise ValueError(
            f"frozen_dtype is {settings.frozen_dtype!r} with {gpus} GPUs, where weights are sharded: "
            "use bfloat16, or one GPU"
        )
    for number in STAGES:
        rows = settings.batch_tokens(number) // settings.context_length(number)
        if rows % gpus:
            raise ValueError(
                f"stage{number} has {rows} rows of {settings.context_length(number)} tokens in a batch for "
                f"{gpus} GPUs: make batch_tokens a multiple of {gpus * settings.context_length(number)}"
            )
        share = settings.batch_tokens(number) // gpus
        micro = micro_batch_tokens(settings, number, gpus=gpus)
        if share % micro:
            raise ValueError(
                f"stage{number}.micro_batch_tokens is {micro}, expected a part of the {share} tokens that "
                f"one of {gpus} GPUs takes of a step"
            )


@dataclass(frozen=True)
class Change:
    """What makes a recipe fit: the settings and GPUs to use, and ``words``, the keys that differ."""

    settings: DistillSettings
    gpus: int
    words: tuple[str, ...]


def smallest_change(pair: Pair, settings: DistillSettings, gpu: Gpu, *, gpus: int) -> Change | None:
    """The cheapest change with which every stage fits, None if there is none up to ``MAX_GPUS``."""
    best: tuple[int, DistillSettings, int] | None = None
    for cost, changed, count in _run_options(settings, gpu, gpus):
        if best is not None and cost >= best[0]:
            continue
        for number in STAGES:
            found = _cheapest_stage(pair, changed, number, gpu, gpus=count)
            if found is None:
                break
            cost, changed = cost + found[0], found[1]
        else:
            if best is None or cost < best[0]:
                best = (cost, changed, count)
    if best is None:
        return None
    _, changed, count = best
    words = [f"--gpus {count}"] if count != gpus else []
    return Change(changed, count, (*words, *differences(settings, changed)))


def _run_options(
    settings: DistillSettings, gpu: Gpu, gpus: int
) -> Iterator[tuple[int, DistillSettings, int]]:
    """Cost, settings and GPUs of the choices that all stages share, those that cannot run left out."""
    counts = [gpus, *(count for count in (2, 4, 8, 16, 32, MAX_GPUS) if count > gpus)]
    now = {name: getattr(settings, name) for name in {name for _, keys in SHARED_CHOICES for name in keys}}
    choices = [(cost, keys) for cost, keys in SHARED_CHOICES if keys.items() - now.items()]
    for size in range(len(choices) + 1):
        for chosen in combinations(choices, size):
            keys = {name: value for _, own in chosen for name, value in own.items()}
            values, cost = {**now, **keys}, sum(cost for cost, _ in chosen)
            for doubled, count in enumerate(counts):
                if _runs(values, gpu, count):
                    changed = replace(settings, **keys)
                    divided = divisible(changed, count)
                    larger = BATCH_COST * (divided != changed)
                    yield cost + larger + doubled * GPU_COST, divided, count


def divisible(settings: DistillSettings, gpus: int) -> DistillSettings:
    """The settings with the next larger batch in each stage whose rows cannot be divided among the GPUs."""
    for number in STAGES:
        rows_of_all, tokens = gpus * settings.context_length(number), settings.batch_tokens(number)
        if tokens % rows_of_all:
            larger = -(-tokens // rows_of_all) * rows_of_all
            settings = _with_stage(settings, number, replace(settings.stage(number), batch_tokens=larger))
    return settings


def _runs(values: Mapping[str, Any], gpu: Gpu, gpus: int) -> bool:
    """True if the trainer would take these values of the shared keys."""
    eight_bit = values["frozen_dtype"] != "bfloat16"
    narrow = eight_bit or values["dtype"] == "bfloat16"
    alone = gpus == 1 and values["mode"] == "frozen-mlp"
    return (alone or not eight_bit) and (gpu.bf16 > gpu.fp32 or not narrow)


def _cheapest_stage(
    pair: Pair, settings: DistillSettings, number: int, gpu: Gpu, *, gpus: int
) -> tuple[int, DistillSettings] | None:
    """Cost and settings with the cheapest change of one stage with which it fits; None if nothing helps."""
    options = sorted(_stage_options(settings, number, gpus), key=lambda option: option[0])
    for cost, own in options:
        changed = _with_stage(settings, number, own)
        if fits(plan_memory(pair, changed, stage=number, gpus=gpus), gpu):
            return cost, changed
    return None


def _stage_options(settings: DistillSettings, number: int, gpus: int) -> Iterator[tuple[int, StageSettings]]:
    """Every smaller micro-batch that divides the share, with every way to keep less."""
    own, context_length = settings.stage(number), settings.context_length(number)
    share = settings.batch_tokens(number) // context_length // gpus
    first = micro_batch_tokens(settings, number, gpus=gpus) // context_length
    micros = [count for count in range(first, 0, -1) if share % count == 0]
    keeps = [(own.gradient_checkpointing, own.keep)]
    if not STAGES[number].mixers_only:
        start = KEEPS.index(own.keep) if own.gradient_checkpointing else -1
        keeps += [(True, keep) for keep in KEEPS[start + 1 :]]
    optimisers = OPTIMISERS[OPTIMISERS.index(own.optimiser) :]
    for steps, micro in enumerate(micros):
        tokens = own.micro_batch_tokens if micro == first else micro * context_length
        for less, (checkpoints, keep) in enumerate(keeps):
            for narrower, optimiser in enumerate(optimisers):
                changed = replace(
                    own,
                    micro_batch_tokens=tokens,
                    gradient_checkpointing=checkpoints,
                    keep=keep,
                    optimiser=optimiser,
                )
                yield steps * MICRO_COST + less * KEEP_COST + narrower * OPTIMISER_COST, changed


def _with_stage(settings: DistillSettings, number: int, own: StageSettings) -> DistillSettings:
    return replace(settings, **{f"stage{number}": own})  # type: ignore[arg-type]


def differences(old: DistillSettings, new: DistillSettings) -> tuple[str, ...]:
    """The keys of a recipe that differ, as ``stage2.keep = "nothing"``."""
    before, after = _flat(asdict(old)), _flat(asdict(new))
    return tuple(f"{key} = {_toml(after[key])}" for key in after if after[key] != before[key])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
