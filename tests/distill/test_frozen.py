"""Frozen weights exist once, in 8 bits if wanted, and never find their way into a model that is written."""

import filecmp
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hrwkv.data.packing import next_token_labels
from hrwkv.distill.frozen import EIGHT_BITS, FROZEN, Quantised, Shared
from hrwkv.distill.parallel import Ranks, open_model
from hrwkv.distill.stages import STAGES, Stage, StepInput, StepOptions, StepResult, set_trainable, trains
from hrwkv.distill.trainer import distill
from hrwkv.kernels import matmul
from hrwkv.layers import common
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.linear import FrozenLinear, FrozenSwiGLU
from hrwkv.model.checkpoint import load_model, save_model
from hrwkv.model.modeling import HybridModel, Keep
from hrwkv.model.shards import ShardReader
from hrwkv.settings import DataSettings, DistillSettings, StageSettings
from tests.builders import hybrid_model, random_ids

CPU = torch.device("cpu")
LENGTHS = (7, 1, 12, 4)
Directories = tuple[Path, Path, Path]
Pair = tuple[HybridModel, HybridModel]


@pytest.fixture(scope="module")
def open_pair(directories: Directories) -> Callable[[str | None], Pair]:
    """Teacher and student as the trainer opens them on one process; None: each with weights of its own."""
    student_path, teacher_path, _ = directories

    def open_both(frozen: str | None) -> Pair:
        narrow = EIGHT_BITS.get(frozen or "")
        teacher = load_model(teacher_path, fitting=None if narrow is None else Quantised(narrow, CPU))
        student = load_model(student_path, fitting=None if frozen is None else Shared(teacher))
        return teacher.requires_grad_(False), student

    return open_both


def run_step(pair: Pair, number: int) -> tuple[StepResult, dict[str, Tensor]]:
    """One step's result and its gradients."""
    teacher, student = pair
    set_trainable(student, stage=STAGES[number], mode="frozen-mlp")
    ids = torch.randint(257, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    batch = TokenBatch.from_lengths(LENGTHS)
    labels = int((next_token_labels(ids, batch) >= 0).sum())
    inputs = StepInput(ids, batch, len(ids), labels)
    result = STAGES[number].step(teacher, student, inputs, StepOptions(Ranks(0, 1, CPU), ce_weight=0.3))
    return result, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def test_frozen_weights_are_the_teachers_own_tensors(open_pair: Callable[[str | None], Pair]) -> None:
    teacher, student = open_pair("bfloat16")
    theirs = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}
    shared = {name for name, p in student.named_parameters() if p.data_ptr() == theirs.get(name)}
    assert shared == {name for name, _ in student.named_parameters() if FROZEN.fullmatch(name)}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.3.mlp.up_proj.weight"} <= shared
    assert student.lm_head.weight is teacher.model.embed_tokens.weight


@pytest.mark.parametrize("frozen", EIGHT_BITS)
def test_weights_in_8_bits_exist_once(open_pair: Callable[[str | None], Pair], frozen: str) -> None:
    teacher, student = open_pair(frozen)
    for own, other in zip(student.model.layers, teacher.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            ours, theirs = getattr(own.mlp, name), getattr(other.mlp, name)
            assert ours.values.data_ptr() == theirs.values.data_ptr()
            assert ours.values.dtype == EIGHT_BITS[frozen]
        assert all(isinstance(getattr(other.self_attn, f"{x}_proj"), FrozenLinear) for x in "qkvo")
    assert not [name for name in student.state_dict() if "mlp" in name]
    assert not [name for name in teacher.state_dict() if "proj" in name]
    assert student.model.embed_tokens.weight is teacher.model.embed_tokens.weight


@pytest.mark.parametrize("number", [1, 2])
def test_sharing_full_weights_changes_no_bit(open_pair: Callable[[str | None], Pair], number: int) -> None:
    apart, shared = (run_step(open_pair(frozen), number) for frozen in (None, "bfloat16"))
    assert torch.equal(apart[0].loss, shared[0].loss)
    assert apart[1].keys() == shared[1].keys()
    assert all(torch.equal(gradient, shared[1][name]) for name, gradient in apart[1].items())


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("frozen", EIGHT_BITS)
def test_losses_and_gradients_in_8_bits_are_near(
    open_pair: Callable[[str | None], Pair], frozen: str, number: int
) -> None:
    exact, exact_gradients = run_step(open_pair(None), number)
    pair = open_pair(frozen)
    result, gradients = run_step(pair, number)
    # e4m3 rounds a weight by 2.6 % of its norm on average, int8 rows by 0.7 %; both models are rounded alike.
    allowed = {"float8": 0.05, "int8": 0.02}[frozen]
    torch.testing.assert_close(result.loss, exact.loss, rtol=allowed, atol=0)
    assert not torch.equal(result.loss, exact.loss)
    unread = pair[1].config.unread_parameters
    names = [name for name, _ in pair[1].named_parameters()]
    trained = {n for n in names if trains(n, stage=STAGES[number], mode="frozen-mlp", unread=unread)}
    assert gradients.keys() == exact_gradients.keys() == trained
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        cosine = torch.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), dim=0)
        assert cosine > 1 - 4 * allowed, name


@pytest.mark.parametrize("frozen", ["bfloat16", "float8"])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_a_student_whose_frozen_weights_differ_is_refused(
    directories: Directories, tmp_path: Path, name: str, frozen: str
) -> None:
    student_path, teacher_path, _ = directories
    narrow = EIGHT_BITS.get(frozen)
    teacher = load_model(teacher_path, fitting=None if narrow is None else Quantised(narrow, CPU))
    student = load_model(student_path)
    with torch.no_grad():
        student.get_parameter(name)[-1] *= 1.5
    save_model(student, tmp_path / "changed", companions=student_path)
    with pytest.raises(ValueError, match=f"'frozen-mlp', but {name} of the student is not the teacher's"):
        load_model(tmp_path / "changed", fitting=Shared(teacher))


def test_biases_stay_parameters_and_are_the_teachers(tmp_path: Path) -> None:
    changes = {"mlp_bias": True, "attention_bias": True}
    teacher = hybrid_model(range(4), **changes)
    (tmp_path / "companions").mkdir()
    save_model(teacher, tmp_path / "teacher", companions=tmp_path / "companions")
    rounded = load_model(tmp_path / "teacher", fitting=Quantised(torch.int8, CPU))
    again = load_model(tmp_path / "teacher", fitting=Shared(rounded))
    batch, ids = TokenBatch.from_lengths([5, 8]), torch.arange(13)
    # fp32 against rows of int8 through four layers.
    exact, found = teacher(ids, batch), rounded(ids, batch)
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()
    for own, other in zip(again.model.layers, rounded.model.layers, strict=True):
        assert own.mlp.up_proj.bias is other.mlp.up_proj.bias
        assert torch.equal(own.mlp.down_proj.bias, other.mlp.down_proj.bias)


def test_no_weight_outlives_its_rounding(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a teacher is read, at most one of the weights that become 8 bits is there in full."""
    alive: list[weakref.ref[Tensor]] = []
    read = ShardReader.read

    def watched(reader: ShardReader, name: str) -> Tensor:
        assert sum(other() is not None for other in alive) <= 1
        weight = read(reader, name)
        if "proj.weight" in name:
            alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(ShardReader, "read", watched)
    load_model(directories[1], fitting=Quantised(torch.int8, CPU))
    assert len(alive) == 4 * 7


@pytest.mark.parametrize("frozen", EIGHT_BITS)
def test_a_run_in_8_bits_writes_the_original_weights(
    directories: Directories, tmp_path: Path, frozen: str
) -> None:
    student, teacher, text = directories
    stage = StageSettings(tokens=128, gradient_checkpointing=True, keep="mixer")
    settings = DistillSettings(
        mode="frozen-mlp",
        frozen_dtype=frozen,  # type: ignore[arg-type]
        data=DataSettings(sources=(str(text),), context_length=16, batch_tokens=64),
        stage1=replace(stage, tokens=64),
        stage2=stage,
        device="cpu",
    )
    paths = distill(
        student, teacher, tmp_path / "out", settings, stages=(1, 2), resume=False, observer=lambda _: None
    )
    before, after = (load_model(path).state_dict() for path in (student, paths[2]))
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == (
            FROZEN.fullmatch(name) is not None
            or name.endswith(tuple(f"0.self_attn.{x}{i}" for x in "vk" for i in "012"))
        ), name


def test_8_bits_in_mode_all_are_refused() -> None:
    with pytest.raises(ValueError, match="frozen_dtype is 'int8' in mode 'all', where MLPs train"):
        DistillSettings(frozen_dtype="int8")


def test_a_choice_of_what_is_kept_without_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage.keep is 'mlp', expected nothing, or gradient_checkpointing"):
        StageSettings(keep="mlp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("nothing", 4 * 32),  # the block's input
        (
            "stream",
            2 * 4 * 32 + 4 + 32 + 4,
        ),  # and the stream between the halves, a norm's and a row's scale, x
        ("mlp", 2 * 4 * 32 + 4 + 2 * 4 * 48),  # and, in place of x in 8 bits, gate and up
    ],
)
def test_bytes_of_a_token_that_a_block_keeps(
    keep: Keep, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: fused norms, inputs in 8 bits. In fp32 here, so that the interpreter can run the norms."""
    fused = pytest.importorskip("hrwkv.kernels.norm.fused")
    for name in ("rms_norm", "add_rms_norm"):
        monkeypatch.setattr(common, name, getattr(fused, name))
    monkeypatch.setattr(matmul, "rounds_inputs", lambda weight: True)
    tokens, totals = 40, []
    for layers in (3, 5):
        sizes = {"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 48}
        student = hybrid_model((2,), **sizes).train()
        for block in student.model.layers:
            frozen = FrozenSwiGLU(32, 48, dtype=torch.float8_e4m3fn)
            for name, linear in block.mlp.named_children():
                frozen.get_submodule(name).fill(linear.weight.detach())
            block.mlp = frozen
        set_trainable(student, stage=STAGES[2], mode="frozen-mlp")
        student.model.gradient_checkpointing, student.model.keep = True, keep
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if not isinstance(x, torch.nn.Parameter):
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = student(random_ids(tokens), TokenBatch.from_lengths([tokens]))
        totals.append(sum(kept.values()))
        del hidden
    assert (totals[1] - totals[0]) / 2 / tokens == expected


def test_stage_1_of_mode_all_holds_what_rests_once_and_changes_no_bit(
    directories: Directories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings, MLPs and head stood there twice, in fp32: 64 of 79.5 GiB of a student of 21 B weights."""
    student, teacher, text = directories
    own = StageSettings(tokens=128, batch_tokens=32, context_length=16)
    data = DataSettings(sources=(str(text),), context_length=16, batch_tokens=32)
    settings = DistillSettings(device="cpu", data=data, stage1=own, validate_every=2, checkpoint_every=2)
    opened, runs = [], []

    def spy(path: Path, ranks: Ranks, **options: Any) -> HybridModel:
        opened.append(open_model(path, ranks, **options))
        return opened[-1]

    monkeypatch.setattr("hrwkv.distill.trainer.open_model", spy)
    for name in ("apart", "shared"):
        with monkeypatch.context() as patch:
            if name == "apart":
                patch.setattr(Stage, "shares", lambda self, mode: False)
            out = tmp_path / name
            distill(student, teacher, out, settings, stages=[1], resume=False, observer=lambda progress: None)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        timed = ("tokens_per_second", "seconds_left")
        runs.append([{key: value for key, value in row.items() if key not in timed} for row in rows])
    assert runs[0] == runs[1]
    assert filecmp.cmpfiles(
        tmp_path / "apart/stage1", tmp_path / "shared/stage1", ["model.safetensors"], shallow=False
    )[0]
    theirs = {parameter.data_ptr() for parameter in opened[2].parameters()}
    shared = {name for name, p in opened[3].named_parameters() if p.data_ptr() in theirs}
    assert shared == {name for name, _ in opened[3].named_parameters() if FROZEN.fullmatch(name)}


def test_stage_1_of_mode_all_takes_a_student_with_other_mlps(
    directories: Directories, tmp_path: Path
) -> None:
    """Trained in mode all before: what differs from the teacher stays the student's own."""
    student_path, teacher_path, _ = directories
    changed, name = load_model(student_path), "model.layers.2.mlp.up_proj.weight"
    with torch.no_grad():
        changed.get_parameter(name).mul_(1.5)
    save_model(changed, tmp_path / "changed", companions=student_path)
    teacher = load_model(teacher_path)
    student = load_model(tmp_path / "changed", fitting=Shared(teacher, required=False))
    assert torch.equal(student.get_parameter(name), changed.get_parameter(name))
    assert student.model.norm.weight is teacher.model.norm.weight
