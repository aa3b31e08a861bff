"""``hrwkv plan``: memory, time, disk and money of a recipe, before anything loads."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from hrwkv.cli.display import Display, count
from hrwkv.cli.recipes import find_recipe, read_recipe
from hrwkv.settings import ConvertSettings, DistillSettings, PlanSettings

if TYPE_CHECKING:
    from hrwkv.distill.calibrate import Corrections
    from hrwkv.distill.gpus import Gpu
    from hrwkv.distill.plan import Plan, StagePlan
    from hrwkv.distill.plan_memory import Pair
    from hrwkv.model.config import HybridConfig

EXAMPLES = """
hrwkv plan reka-flash-3 --gpu h200 --price 3.5
hrwkv plan recipe.toml --gpu h100 --gpus 8 --distill.stage2.micro-batch-tokens 8192
hrwkv plan recipe.toml --teacher teacher/ --calibrate
"""
GIB, DOES_NOT_FIT = 2**30, 1


def plan(
    recipe: Annotated[str, Parameter(help="TOML file, or name of a shipped recipe.")],
    *,
    teacher: Annotated[
        Path | None, Parameter(help="Directory of the teacher, where the recipe has no [teacher].")
    ] = None,
    calibrate: Annotated[
        bool, Parameter(help="Run 20 real steps of each stage here, and keep what they say.", negative=())
    ] = False,
    corrections: Annotated[
        Path | None, Parameter(help="File of what --calibrate found [default: in the user's cache].")
    ] = None,
    settings: Annotated[PlanSettings, Parameter(name="*", group="Recipe keys")] = PlanSettings(),  # noqa: B008 (frozen)
    convert: ConvertSettings | None = None,
    distill: DistillSettings = DistillSettings(),  # noqa: B008 (frozen)
) -> int:
    """Tell what a recipe needs: parameters, memory of each GPU, time, disk, money; no weights are read.

    A recipe that does not fit gets the smallest change that does, and exit code 1.
    """
    from hrwkv.convert.transfer import student_config
    from hrwkv.distill.calibrate import Corrections
    from hrwkv.distill.plan import make_plan, smallest_change
    from hrwkv.distill.plan_memory import Pair
    from hrwkv.eval.memory import memory_of

    display = Display()
    if "distill" not in read_recipe(find_recipe(recipe)):
        display.line("The recipe has no [distill]: planned with the defaults, made for small models")
    config, chosen = teacher_config(recipe, teacher), convert or ConvertSettings()
    pair = Pair.of(student_config(config, chosen), config)
    gpu = choose_gpu(settings, distill)
    known = Corrections(corrections or Path.home() / ".cache" / "hrwkv" / "plan.json")
    if calibrate:
        run_calibration(display, known, pair, gpu, distill, convert=chosen, teacher=teacher)
    found = make_plan(pair, distill, gpu, gpus=settings.gpus, corrections=known.of(pair, distill, gpu))
    show(display, found, price=settings.price, corrected=bool(known.of(pair, distill, gpu)))
    served = memory_of(pair.student)
    state, kv = count(served.state_bytes), count(served.kv_bytes_per_token)
    display.line(f"When it runs, a sequence holds {state} bytes of state, and {kv} bytes a token in bf16")
    if found.fits:
        return 0
    change = smallest_change(pair, distill, gpu, gpus=settings.gpus)
    advice = f"it fits with {', '.join(change.words)}" if change else "no change of settings or GPUs helps"
    display.line(f"Does not fit in {gpu.memory / GIB:.1f} GiB: {advice}")
    return DOES_NOT_FIT


def teacher_config(recipe: str, teacher: Path | None) -> HybridConfig:
    """The teacher's config, from its directory or the recipe's [teacher]."""
    from hrwkv.convert.presets import read_preset
    from hrwkv.model.checkpoint import load_config
    from hrwkv.model.families import config_from_teacher

    if teacher is not None:
        return load_config(teacher)
    path = find_recipe(recipe)
    if "teacher" not in tomllib.loads(path.read_text(encoding="utf-8")):
        raise ValueError(f"recipe {path} has no [teacher]: give the teacher's directory with --teacher")
    return config_from_teacher(read_preset(path).teacher)


def choose_gpu(settings: PlanSettings, distill: DistillSettings) -> Gpu:
    """The kind that is named, or the one that is here. Raises ValueError if neither."""
    from hrwkv.distill.gpus import GPUS

    if settings.gpu is not None:
        return GPUS[settings.gpu]
    found = found_gpu(distill.device)
    if found is None:
        known = ", ".join(GPUS)
        raise ValueError(f"no GPU that the table knows is here: name one with --gpu ({known})")
    return found


def found_gpu(device: str) -> Gpu | None:
    """This machine's first GPU, or its CPU where ``device`` asks for that; None if it is not in the table."""
    import torch

    from hrwkv.distill.gpus import GPUS, named_like

    if device == "cpu":
        return GPUS["cpu"]
    return named_like(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def run_calibration(
    display: Display,
    known: Corrections,
    pair: Pair,
    gpu: Gpu,
    distill: DistillSettings,
    *,
    convert: ConvertSettings,
    teacher: Path | None,
) -> None:
    """Convert the teacher for the time of it, and measure each stage on one GPU."""
    from hrwkv.cli.loading import choose_device
    from hrwkv.convert.transfer import convert as transfer
    from hrwkv.distill.calibrate import measure_rate

    if teacher is None:
        raise ValueError("--calibrate runs the teacher: give its directory with --teacher")
    here = found_gpu(choose_device(distill.device))
    if here != gpu:
        raise ValueError(
            f"--calibrate measures this machine ({here.name if here else 'a GPU not in the table'}), not a "
            f"{gpu.name}: leave out --gpu, or --calibrate"
        )
    with tempfile.TemporaryDirectory(prefix="hrwkv-plan-") as folder:
        student = transfer(teacher, Path(folder) / "student", convert).path
        for stage in (1, 2, 3):
            rate = measure_rate(student, teacher, distill, stage=stage)
            ratio = known.add(pair, distill, gpu, stage=stage, rate=rate)
            display.line(f"Stage {stage}: {count(round(rate))} tokens/s, {ratio:.3g} x the plan")


def show(display: Display, found: Plan, *, price: float | None, corrected: bool) -> None:
    """Parameters, memory by part, time and what it all comes to."""
    first = found.stages[0].memory
    total = first.trained + first.frozen
    display.line(f"Student: {count(total)} parameters; {found.gpus} x {found.gpu.name}")
    header = ["stage", *(str(stage.stage) for stage in found.stages)]
    display.table("Each GPU, GiB", header, memory_rows(found))
    display.table("Time", header, time_rows(found.stages))
    money = "" if price is None else f", {price * found.gpus * found.hours:,.2f} at {price:g} an hour"
    basis = "measured here" if corrected else "by the table's rates, not measured: see --calibrate"
    display.line(f"{found.hours:.3g} hours on {found.gpus} x {found.gpu.name}{money} ({basis})")
    display.line(f"{found.disk / GIB:.3g} GiB of disk for models and checkpoints")


def memory_rows(found: Plan) -> list[list[str]]:
    """A row a part, a column a stage."""
    from hrwkv.distill.plan import RESERVE

    memories = [stage.memory for stage in found.stages]
    rows = [[name, *(gib(memory.parts[name]) for memory in memories)] for name in memories[0].parts]
    rows.append(["reserve", *(gib(RESERVE) for _ in memories)])
    rows.append(["sum", *(gib(memory.total + RESERVE) for memory in memories)])
    rows.append([f"{found.gpu.name} has", *(gib(found.gpu.memory) for _ in memories)])
    return rows


def gib(size: float) -> str:
    """Bytes for a table."""
    return f"{size / GIB:.2f}"


def time_rows(stages: tuple[StagePlan, ...]) -> list[list[str]]:
    """What trains, and how fast."""
    return [
        ["parameters that train", *(count(stage.memory.trained) for stage in stages)],
        ["frozen", *(count(stage.memory.frozen) for stage in stages)],
        ["tokens", *(count(stage.tokens) for stage in stages)],
        ["steps", *(count(stage.steps) for stage in stages)],
        ["tokens of a micro-batch", *(count(stage.micro_batch) for stage in stages)],
        ["tokens/s", *(count(round(stage.tokens_per_second)) for stage in stages)],
        ["MFU", *(f"{stage.mfu:.1%}" for stage in stages)],
        ["hours", *(f"{stage.hours:.3g}" for stage in stages)],
    ]
