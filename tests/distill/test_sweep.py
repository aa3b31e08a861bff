"""A swapped layer gives what a model that is built with that layer gives."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrwkv.data.packing import IGNORED_LABEL, next_token_labels
from hrwkv.data.recall import RecallSample
from hrwkv.distill.sweep import MixedModel, Probe, Sweep, recall_probe
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.model.config import FULL, LINEAR
from hrwkv.model.modeling import Block, HybridModel
from tests.distill.conftest import randomise, tiny_config

LAYERS = 4
LENGTHS = (7, 1, 12, 20)


@pytest.fixture(scope="module")
def pair(aligned: tuple[Path, Path]) -> tuple[HybridModel, HybridModel]:
    """Teacher and student of stage 1 in memory."""
    student, teacher = aligned
    return load_model(teacher), load_model(student)


@pytest.fixture(scope="module")
def sweep(aligned: tuple[Path, Path]) -> Sweep:
    student, teacher = aligned
    return Sweep(MixedModel(student, teacher, dtype=torch.float32, device="cpu"), [text()], device="cpu")


def text() -> Probe:
    ids = torch.randint(260, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch.from_lengths(LENGTHS)
    return Probe("text", ids, batch, next_token_labels(ids, batch))


def expected(model: HybridModel, teacher: HybridModel, probe: Probe) -> tuple[float, float]:
    """Mean nll and KL of the labelled tokens, from whole logits in fp64."""
    with torch.no_grad():
        logits = [m.compute_logits(m(probe.token_ids, probe.batch)).double() for m in (model, teacher)]
    own, theirs = (part.log_softmax(-1) for part in logits)
    rows = probe.labels != IGNORED_LABEL
    kl = (theirs.exp() * (theirs - own)).sum(-1)[rows].mean()
    return float(F.nll_loss(own[rows], probe.labels[rows])), float(kl)


def mixed(teacher: HybridModel, student: HybridModel, kinds: list[str]) -> HybridModel:
    """One model with these layers, attention with RoPE; layer 0 must be linear."""
    model = HybridModel(tiny_config(kinds, rope=True))
    theirs, ours = teacher.state_dict(), student.state_dict()
    linear = tuple(f"model.layers.{layer}." for layer, kind in enumerate(kinds) if kind == LINEAR)
    model.load_state_dict({n: (ours if n.startswith(linear) else theirs)[n] for n in model.state_dict()})
    return model.eval()


def answering_for(block: Block, teacher: Block) -> None:
    """Make a student's block answer with the teacher's attention and still tell its mixer's first value."""
    own = block.mix

    def mix(x: Tensor, batch: TokenBatch, rope, first=None, memory=()) -> tuple[Tensor, object]:
        return teacher.mix(x, batch, rope)[0], own(x, batch, rope, first)[1]

    block.mix = mix  # type: ignore[method-assign]


def test_each_swap_from_the_student_is_the_hybrid_of_those_layers(sweep, pair):
    teacher, student = pair
    kinds = [LINEAR, LINEAR, FULL, LINEAR]
    found = dict(sweep.walk([kind == LINEAR for kind in kinds], [1, 2, 3]))
    assert list(found) == [1, 2, 3, None]
    for layer, scores in found.items():
        own = list(kinds)
        if layer is not None:
            own[layer] = FULL if own[layer] == LINEAR else LINEAR
        nll, kl = expected(mixed(teacher, student, own), teacher, text())
        assert scores["text"].nll == pytest.approx(nll, rel=1e-5)
        assert scores["text"].kl == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_replaced_layer_reads_layer_0_of_the_student(layer, sweep, pair, aligned):
    """The witness is the student whose other blocks answer with attention, as a wrapper in stage 1 would."""
    teacher, student = pair[0], load_model(aligned[0])
    for number, block in enumerate(student.model.layers):
        if number != layer:
            answering_for(block, teacher.model.layers[number])
    nll, kl = expected(student, teacher, text())
    found = dict(sweep.walk([False] * LAYERS, [layer]))[layer]["text"]
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert kl > 1e-3


def test_without_a_swap_the_walk_is_the_teacher(sweep, pair):
    ((layer, scores),) = sweep.walk([False] * LAYERS, [])
    nll, _ = expected(pair[0], pair[0], text())
    assert layer is None
    assert scores["text"].nll == pytest.approx(nll, rel=1e-6)
    assert scores["text"].kl == pytest.approx(0.0, abs=1e-6)
    assert scores["text"].agreement == 1.0
    assert sweep.teacher_scores()["text"].nll == pytest.approx(nll, rel=1e-6)
    assert scores["text"].recall == pytest.approx(math.exp(-nll), rel=1e-5)


def test_recall_probe_scores_the_answers_alone(aligned, pair):
    samples = [RecallSample([5, 6, 7, 8, 9], [2, 4]), RecallSample([3, 2, 1], [1])]
    probe = recall_probe("lookup", samples)
    assert probe.batch.lengths == (5, 3)
    assert probe.token_ids.tolist() == [5, 6, 7, 8, 9, 3, 2, 1]
    assert [(i, label) for i, label in enumerate(probe.labels.tolist()) if label != IGNORED_LABEL] == [
        (1, 7),
        (3, 9),
        (5, 2),
    ]
    student, teacher = aligned
    model = MixedModel(student, teacher, dtype=torch.float32, device="cpu")
    # Two probes of one task count as one, by tokens and not by probes.
    both = Sweep(model, [recall_probe("lookup", [sample]) for sample in samples], device="cpu")
    ((_, scores),) = both.walk([True] * LAYERS, [])
    nll, kl = expected(pair[1], pair[0], probe)
    assert scores["lookup"].nll == pytest.approx(nll, rel=1e-5)
    assert scores["lookup"].kl == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_student_of_a_later_stage_is_refused(norm, aligned, tmp_path):
    student, teacher = aligned
    later = load_model(student)
    with torch.no_grad():
        later.get_parameter(f"model.layers.2.{norm}.weight")[3] += 1e-6
    save_model(later, tmp_path / "later", companions=student)
    with pytest.raises(ValueError, match=rf"layers\.2\.{norm}.* is not the teacher's: give the directory"):
        MixedModel(tmp_path / "later", teacher, dtype=torch.float32, device="cpu")


def test_variants_without_residuals_are_swapped_too(aligned, tmp_path, pair):
    teacher = pair[0]
    config = tiny_config([LINEAR] * LAYERS, rope=False)
    values = {**config.to_dict(), "variant": "hxa07a", "value_rank": None, "key_rank": None}
    student = randomise(HybridModel(type(config).from_dict(values)), seed=3)
    theirs = teacher.state_dict()
    student.load_state_dict({n: theirs[n] for n in student.state_dict() if n in theirs}, strict=False)
    save_model(student, tmp_path / "student", companions=aligned[1])
    model = MixedModel(tmp_path / "student", aligned[1], dtype=torch.float32, device="cpu")
    found = dict(Sweep(model, [text()], device="cpu").walk([True] * LAYERS, []))
    assert found[None]["text"].nll == pytest.approx(expected(student, teacher, text())[0], rel=1e-5)
