"""A step is the sum of its micro-batches, and the micro-batches of all processes are the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrwkv.distill.loop import added, micro_batches
from hrwkv.distill.parallel import Ranks
from hrwkv.distill.stages import StepResult
from hrwkv.distill.trainer import distill
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import load_model
from tests.distill.test_trainer import (
    CONTEXT,
    Directories,
    StoppedError,
    ignore,
    recipe,
    rows,
    stop_at,
)

CPU = torch.device("cpu")


@st.composite
def cut_batches(draw: st.DrawFn) -> tuple[int, int, int, int, list[int]]:
    """World, micro-batches of a process, rows of one, context length, sequence lengths."""
    world, count, rows_each = (draw(st.integers(1, 3)) for _ in range(3))
    context = draw(st.integers(2, 6))
    lengths: list[int] = []
    for _ in range(world * count * rows_each):
        cut = draw(st.integers(0, context - 1))
        lengths += [cut, context - cut] if cut else [context]
    return world, count, rows_each, context, lengths


@given(cut_batches())
def test_micro_batches_of_all_processes_are_the_batch(
    given_batch: tuple[int, int, int, int, list[int]],
) -> None:
    world, count, rows_each, context, lengths = given_batch
    ids, batch = torch.arange(sum(lengths)), TokenBatch.from_lengths(lengths)
    found = [
        micro_batches(
            ids, batch, context_length=context, tokens=rows_each * context, ranks=Ranks(rank, world, CPU)
        )
        for rank in range(world)
    ]
    assert [len(parts) for parts in found] == [count] * world
    parts = [part for of_rank in found for part in of_rank]
    assert torch.equal(torch.cat([part.token_ids for part in parts]), ids)
    assert [length for part in parts for length in part.batch.lengths] == lengths
    assert {part.num_tokens for part in parts} == {len(ids)}
    assert {part.num_labels for part in parts} == {len(ids) - len(lengths)}


def test_a_share_that_cannot_be_divided_is_one_line() -> None:
    batch = TokenBatch.from_lengths([4] * 6)
    with pytest.raises(ValueError, match=r"24 tokens of a step, in micro-batches of 16: .* multiple of 16"):
        micro_batches(torch.arange(24), batch, context_length=4, tokens=16, ranks=Ranks(0, 1, CPU))


def test_results_add_up() -> None:
    parts = [
        StepResult(torch.tensor(1.0), kl=torch.tensor(0.5), agreement=torch.tensor(0.25)),
        StepResult(torch.tensor(2.0), kl=torch.tensor(1.5), agreement=torch.tensor(0.5)),
    ]
    whole = added(parts)
    assert (float(whole.loss), float(whole.kl), float(whole.agreement)) == (3.0, 2.0, 0.75)
    assert whole.layer_loss is None


def test_a_run_in_micro_batches_is_the_run_in_whole_batches(directories: Directories, tmp_path: Path) -> None:
    """Stage 2 without hidden_weight: sums of fp32 in another order, carried through 8 AdamW steps."""
    student, teacher, text = directories
    whole = recipe(text)
    parts = replace(whole, stage2=replace(whole.stage2, micro_batch_tokens=CONTEXT))
    for name, settings in (("whole", whole), ("parts", parts)):
        distill(student, teacher, tmp_path / name, settings, stages=(2,), resume=False, observer=ignore)
    one, other = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for mine, theirs in zip(one, other, strict=True):
        for name in ("loss", "kl", "agreement", "grad_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=2e-5), (mine["step"], name)
        if "validation" in mine:
            for name in ("kl", "agreement", "student_perplexity"):
                assert theirs["validation"][name] == pytest.approx(mine["validation"][name], rel=2e-5)


def test_interrupted_micro_batches_go_on_bit_for_bit(directories: Directories, tmp_path: Path) -> None:
    student, teacher, text = directories
    settings = recipe(text, spike_factor=3.0)
    settings = replace(
        settings,
        stage1=replace(settings.stage1, micro_batch_tokens=CONTEXT),
        stage2=replace(settings.stage2, micro_batch_tokens=CONTEXT, hidden_weight=1.0),
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distill(student, teacher, whole, settings, stages=(1, 2), resume=False, observer=ignore)
    for stage, step in ((1, 4), (2, 7)):
        with pytest.raises(StoppedError, match=r"\d"):
            distill(
                student,
                teacher,
                cut,
                settings,
                stages=(1, 2),
                resume=stage > 1,
                observer=stop_at(stage, step),
            )
    distill(student, teacher, cut, settings, stages=(1, 2), resume=True, observer=ignore)
    assert rows(cut) == rows(whole)
    expected, got = (load_model(out / "stage2").state_dict() for out in (whole, cut))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_smaller_micro_batch_may_go_on_with_a_run(directories: Directories, tmp_path: Path) -> None:
    """After an OutOfMemoryError nothing else helps; the losses stay, but for rounding."""
    student, teacher, text = directories
    settings, out = recipe(text), tmp_path / "out"
    with pytest.raises(StoppedError, match=r"\d"):
        distill(student, teacher, out, settings, stages=(2,), resume=False, observer=stop_at(2, 5))
    smaller = replace(settings, stage2=replace(settings.stage2, micro_batch_tokens=CONTEXT))
    distill(student, teacher, out, smaller, stages=(2,), resume=True, observer=ignore)
    assert [row["step"] for row in rows(out)] == list(range(1, 9))
