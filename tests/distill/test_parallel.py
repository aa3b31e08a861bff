"""Two processes on gloo are one, with each engine: losses, gradient norms, models, resumed checkpoints.

One start of two processes does everything that two are needed for and leaves files behind; the tests compare
those with what one process does.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hrwkv.distill.checkpointing import Checkpoints
from hrwkv.distill.logs import Progress
from hrwkv.distill.optimiser import build_optimiser, optimiser_state, set_learning_rate
from hrwkv.distill.parallel import Engine, Ranks, barrier, joined, open_model, start
from hrwkv.distill.stages import STAGES, StepOptions, split_rows, trains
from hrwkv.distill.trainer import distill
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import load_model
from hrwkv.model.shards import CheckpointError
from hrwkv.settings import DataSettings, DistillSettings, StageSettings

WORKER = """
import sys, torch
from pathlib import Path
import deepspeed
# On a CPU DeepSpeed would compile collectives of its own, for a minute; gloo's do.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.path.insert(0, sys.argv[1])
import test_parallel
torch.set_num_threads(1)
test_parallel.run_on_two(*map(Path, sys.argv[3:]), device=sys.argv[2])
"""
WHOLE_RUNS = [("fsdp2-all", "all"), ("zero1-all", "all"), ("zero3-frozen", "frozen-mlp")]
KINDS = ("fsdp2", "zero1", "zero2", "zero3")
CUT = (
    7  # where a copy of a run's folder is taken, as if it were interrupted; its last checkpoint is of step 6
)
Directories = tuple[Path, Path, Path]
Rows = list[dict[str, Any]]


def settings_for(text: Path, mode: Any, kind: Any = "fsdp2", device: str = "cpu") -> DistillSettings:
    stage = StageSettings(tokens=8 * 64, learning_rate=4e-3, weight_decay=0.01, clip=0.5, ce_weight=0.2)
    return DistillSettings(
        mode=mode,
        data=DataSettings(sources=(str(text),), context_length=16, batch_tokens=64),
        stage1=stage,
        stage2=replace(stage, gradient_checkpointing=True),
        validate_every=4,
        validation_tokens=128,
        checkpoint_every=3,
        parallel=kind,
        device=device,
    )


def ignore(_: Progress) -> None:
    pass


def copy_at_cut(out: Path, copy: Path) -> Callable[[Progress], None]:
    def observe(progress: Progress) -> None:
        if progress.stage == 2 and progress.step == CUT:
            shutil.copytree(out, copy)

    return observe


def run_on_two(student: Path, teacher: Path, text: Path, out: Path, *, device: str) -> None:
    """What each of the two processes does; ``out`` holds one-KIND, cut by one process in mode frozen-mlp."""

    def run(name: str, mode: str, kind: str, *, cut: str = "", resume: bool = False) -> None:
        settings = settings_for(text, mode, kind, device)
        # Two micro-batches a step; stage 1's loss is relative to the size of each, so it has one.
        stage2 = replace(settings.stage2, micro_batch_tokens=16)
        settings = replace(settings, stage2=stage2, reduce_each_micro_batch=resume)
        observer = copy_at_cut(out / name, out / cut) if cut else ignore
        distill(student, teacher, out / name, settings, stages=(1, 2), resume=resume, observer=observer)

    with joined(device) as ranks:
        run("fsdp2-all", "all", "fsdp2")
        run("zero1-all", "all", "zero1", cut="zero1-cut")
        run("zero3-frozen", "frozen-mlp", "zero3", cut="zero3-cut")
        barrier(ranks)
        run("zero3-cut", "frozen-mlp", "fsdp2", resume=True)
        for kind in ("fsdp2", "zero1", "zero3"):
            run(f"one-{kind}", "frozen-mlp", kind, resume=True)
        found = {
            f"{kind}-{name}": look_into(student, teacher, ranks, kind=kind, dtype=dtype, folder=out)
            for kind in KINDS
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        }
        found["full disk"] = meet_a_full_disk(student, ranks, out / "full")
        if ranks.is_first:
            (out / "found.json").write_text(json.dumps(found))


def engine_for(path: Path, ranks: Ranks, *, kind: Any, dtype: torch.dtype, stage: int = 2) -> Engine:
    def chosen(name: str) -> bool:
        return trains(name, stage=STAGES[stage], mode="all", unread=frozenset(UNREAD))

    student = open_model(path, ranks, dtype=dtype, trains=chosen, kind=kind).train()
    optimiser = build_optimiser(student, StageSettings(weight_decay=0.1))
    return start(student, optimiser, ranks, kind=kind, dtype=dtype, path=path, read_state=optimiser_state)


UNREAD = [f"model.layers.0.self_attn.{name}" for name in ("v0", "v1", "v2", "k0", "k1", "k2")]


def look_into(
    path: Path, teacher: Path, ranks: Ranks, *, kind: Any, dtype: torch.dtype, folder: Path
) -> dict[str, Any]:
    """Norms of one micro-batch, of two equal ones, of one after a discarded one; whether masters are fp32."""
    frozen = open_model(teacher, ranks, dtype=dtype)
    token_ids = torch.randint(260, (64,), generator=torch.Generator().manual_seed(3))
    inputs = split_rows(token_ids, TokenBatch.from_lengths([16] * 4), context_length=16, ranks=ranks)
    found: dict[str, Any] = {}
    for stage in (1, 2) if dtype == torch.float32 else (2,):
        engine = engine_for(path, ranks, kind=kind, dtype=dtype, stage=stage)
        options = StepOptions(ranks, dtype=dtype, backward=engine.backward)
        set_learning_rate(engine.optimiser, 0.0)

        def add(count: int) -> None:
            for number in range(count):
                with engine.micro_batch(last=number == count - 1):  # noqa: B023 (called within its turn)
                    STAGES[stage].step(frozen, engine.student, inputs, options)  # noqa: B023

        norms = []
        for count in (1, 2):
            add(count)
            norms.append(float(engine.step(0.0)))
        add(1)
        engine.discard()
        add(1)
        found[str(stage)] = [*norms, float(engine.step(0.0))]
    theirs = load_model(path).state_dict()
    found["masters"] = all(torch.equal(own.cpu(), theirs[name]) for name, own in engine.weights())
    return found


def meet_a_full_disk(path: Path, ranks: Ranks, folder: Path) -> list[str]:
    """What both processes raise where the first one cannot write a model, and what is left."""
    engine = engine_for(path, ranks, kind="fsdp2", dtype=torch.float32)
    set_learning_rate(engine.optimiser, 0.0)
    for own in engine.student.parameters():
        if own.requires_grad:
            own.grad = torch.zeros_like(own)
    engine.step(0.0)
    checkpoints = Checkpoints(folder, ranks, recipe={})
    checkpoints.save(1, 1, engine, source=path)
    left = sorted(file.name for file in folder.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        if ranks.is_first:
            patch.setattr("hrwkv.model.shards.save_file", full)
        with pytest.raises((OSError, CheckpointError), match="No space left") as caught:
            checkpoints.save(1, 2, engine, source=path)
    said = [None] * ranks.world
    torch.distributed.all_gather_object(said, str(caught.value))
    assert sorted(file.name for file in folder.iterdir()) == left
    return [str(line) for line in said]


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def rows(out: Path) -> Rows:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def run_alone(directories: Directories, out: Path, device: str) -> Path:
    student, teacher, text = directories
    for mode in ("all", "frozen-mlp"):
        settings, observer = (
            settings_for(text, mode, device=device),
            copy_at_cut(out / mode, out / f"{mode}-cut"),
        )
        distill(student, teacher, out / mode, settings, stages=(1, 2), resume=False, observer=observer)
    return out


@pytest.fixture(scope="module")
def one(directories: Directories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process left behind."""
    return run_alone(directories, tmp_path_factory.mktemp("one"), "cpu")


def start_two(directories: Directories, one: Path, folder: Path, device: str) -> Path:
    for kind in ("fsdp2", "zero1", "zero3"):
        shutil.copytree(one / "frozen-mlp-cut", folder / f"one-{kind}")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).parent), device, *map(str, directories), str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two(directories: Directories, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left behind."""
    return start_two(directories, one, tmp_path_factory.mktemp("two"), "cpu")


def assert_same(one: Rows, other: Rows, rel: float = 2e-5) -> None:
    """Sums of fp32 in another order, carried through 16 AdamW steps: five digits stay."""
    assert [(row["stage"], row["step"]) for row in one] == [(row["stage"], row["step"]) for row in other]
    for mine, theirs in zip(one, other, strict=True):
        assert numbers(theirs) == pytest.approx(numbers(mine), rel=rel), (mine["stage"], mine["step"])


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What one step measured, layers and validation included."""
    names = ["loss", "grad_norm"] + ([] if row["stage"] == 1 else ["kl", "agreement"])
    layers = {f"layer {layer}": loss for layer, loss in enumerate(row.get("layer_loss", ()))}
    held_out = {f"validation {name}": value for name, value in row.get("validation", {}).items()}
    found = {name: row[name] for name in names} | layers | held_out
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), WHOLE_RUNS)
def test_two_processes_have_the_losses_and_gradient_norms_of_one(
    one: Path, two: Path, name: str, mode: str
) -> None:
    assert len(rows(one / mode)) == 16
    assert_same(rows(one / mode), rows(two / name))
    mine, other = (load_model(path / "stage2").state_dict() for path in (one / mode, two / name))
    for key, tensor in mine.items():
        # AdamW moves a weight by up to its rate where a gradient is as small as its rounding.
        assert (tensor - other[key]).norm() <= 1e-4 * tensor.norm() + 1e-4, key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero3"])
def test_checkpoint_of_one_process_is_resumed_by_two(one: Path, two: Path, kind: str) -> None:
    """In mode frozen-mlp, where one process shares the frozen weights with the teacher and two do not."""
    assert (one / "frozen-mlp-cut" / "checkpoints" / "stage2-step0000006" / "trainer.json").exists()
    assert_same(rows(one / "frozen-mlp"), rows(two / f"one-{kind}"))


@pytest.mark.slow
def test_checkpoint_of_zero_on_two_processes_is_resumed_by_one(
    directories: Directories, one: Path, two: Path
) -> None:
    student, teacher, text = directories
    load_model(two / "zero1-cut" / "checkpoints" / "stage2-step0000006" / "model")
    settings = settings_for(text, "all")
    distill(student, teacher, two / "zero1-cut", settings, stages=(1, 2), resume=True, observer=ignore)
    assert_same(rows(one / "all"), rows(two / "zero1-cut"))


@pytest.mark.slow
def test_checkpoint_of_zero_is_resumed_by_fsdp2(one: Path, two: Path) -> None:
    assert_same(rows(one / "frozen-mlp"), rows(two / "zero3-cut"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_micro_batches_add_up_and_a_discarded_one_leaves_nothing(two: Path, kind: str, dtype: str) -> None:
    """Two equal ones have twice the gradient; in bfloat16 their parts may be rounded apart."""
    found = json.loads((two / "found.json").read_text())[f"{kind}-{dtype}"]
    rel = 1e-5 if dtype == "float32" else 1e-2
    for stage in ("1", "2") if dtype == "float32" else ("2",):
        single, double, after = found[stage]
        assert double == pytest.approx(2 * single, rel=rel), stage
        assert after == pytest.approx(single, rel=rel), stage
    assert found["masters"], "the masters are not the fp32 weights of the directory"


@pytest.mark.slow
def test_a_full_disk_stops_every_process_with_the_same_line(two: Path) -> None:
    said = json.loads((two / "found.json").read_text())["full disk"]
    assert len(said) == 2
    assert said[0] == said[1]
    assert "No space left on device" in said[0]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_have_the_losses_and_gradient_norms_of_one(directories: Directories, tmp_path: Path) -> None:
    """Kernels of a GPU add in another order than these tests' CPU: three digits stay."""
    alone = run_alone(directories, tmp_path / "one", "cuda")
    (tmp_path / "two").mkdir()
    pair = start_two(directories, alone, tmp_path / "two", "cuda")
    resumed = [(f"one-{kind}", "frozen-mlp") for kind in ("fsdp2", "zero1", "zero3")]
    for name, mode in [*WHOLE_RUNS, *resumed, ("zero3-cut", "frozen-mlp")]:
        assert_same(rows(alone / mode), rows(pair / name), rel=1e-3)
