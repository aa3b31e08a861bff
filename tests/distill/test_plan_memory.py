"""Planned bytes against those of models, gradients and moments that really exist."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hrwkv.data.packing import next_token_labels
from hrwkv.distill.frozen import Quantised, Shared
from hrwkv.distill.optimiser import build_optimiser
from hrwkv.distill.parallel import Ranks, open_model
from hrwkv.distill.plan_memory import Pair, kept_bytes, micro_batch_tokens, plan_memory
from hrwkv.distill.stages import STAGES, StepInput, StepOptions, trains
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import load_config
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import DataSettings, DistillSettings, StageSettings

CPU = Ranks(0, 1, torch.device("cpu"))
SETTINGS = DistillSettings(data=DataSettings(context_length=16, batch_tokens=64))


@pytest.fixture
def pair(directories: tuple[Path, Path, Path]) -> Pair:
    student, teacher, _ = directories
    return Pair.of(load_config(student), load_config(teacher))


def storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    """Bytes of each storage, however many tensors share it."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def tensors_of(model: HybridModel) -> Iterator[Tensor]:
    """Weights of a model; tables of RoPE are made anew and no weights."""
    yield from model.parameters()
    yield from (value for name, value in model.named_buffers() if "rope" not in name)


def one_step(
    directories: tuple[Path, Path, Path], settings: DistillSettings, stage: int
) -> tuple[HybridModel, HybridModel, torch.optim.Optimizer]:
    """Teacher, student and optimiser after a step as the trainer makes it."""
    student_path, teacher_path, _ = directories
    config, mode = load_config(student_path), settings.mode
    narrow = {"int8": torch.int8, "float8": torch.float8_e4m3fn}.get(settings.frozen_dtype)
    fitting = None if narrow is None else Quantised(narrow, CPU.device)
    teacher = open_model(teacher_path, CPU, dtype=torch.float32, fitting=fitting)
    student = open_model(
        student_path,
        CPU,
        dtype=torch.float32,
        trains=lambda name: trains(name, stage=STAGES[stage], mode=mode, unread=config.unread_parameters),
        fitting=Shared(teacher) if STAGES[stage].shares(mode) else None,
    ).train()
    ids = torch.randint(260, (64,), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch.from_lengths([16] * 4)
    inputs = StepInput(ids, batch, 64, int((next_token_labels(ids, batch) >= 0).sum()))
    STAGES[stage].step(teacher, student, inputs, StepOptions(CPU))
    optimiser = build_optimiser(student, settings.stage(stage))
    optimiser.step()
    return teacher, student, optimiser


@pytest.mark.parametrize(
    ("mode", "frozen_dtype"), [("all", "bfloat16"), ("frozen-mlp", "bfloat16"), ("frozen-mlp", "int8")]
)
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_gradients_and_moments_are_those_of_a_real_step(mode, stage, frozen_dtype, directories, pair):
    settings = replace(SETTINGS, mode=mode, frozen_dtype=frozen_dtype)
    teacher, student, optimiser = one_step(directories, settings, stage)
    planned = plan_memory(pair, settings, stage=stage)

    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert planned.trained == sum(parameter.numel() for parameter in trained)
    shapes = {name: value.numel() for name, value in student.state_dict().items() if name != "lm_head.weight"}
    in_8_bits = 3 * 32 * 48 * 4 if frozen_dtype == "int8" else 0  # MLPs that are in no state dict
    assert planned.trained + planned.frozen == sum(shapes.values()) + in_8_bits

    theirs = storages(tensors_of(teacher))
    assert planned.teacher == sum(theirs.values())
    own = storages(tensors_of(student))
    assert planned.student == sum(size for place, size in own.items() if place not in theirs)
    assert planned.gradients == sum(parameter.grad.nbytes for parameter in trained)
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert planned.optimiser == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("trains_mlp", [True, False])
def test_what_an_mlp_keeps_is_what_autograd_saves(trains_mlp, directories, monkeypatch):
    """fp32, one token more: the bytes that the second half of a block saves, with a GPU's kernels."""
    for kernel, name in (("norm", "add_rms_norm"), ("swiglu", "swiglu")):
        fused = pytest.importorskip(f"hrwkv.kernels.{kernel}.fused")
        monkeypatch.setattr(f"hrwkv.layers.common.{name}", getattr(fused, name))
    student = open_model(directories[0], CPU, dtype=torch.float32, trains=lambda name: True)
    block, sizes = student.model.layers[0], []
    if not trains_mlp:
        block.mlp.requires_grad_(False)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    for tokens in (8, 9):
        hidden, mixed = torch.randn(2, tokens, 32, requires_grad=True)
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = block.feed_forward(hidden, mixed)
        sizes.append(sum(saved.values()))
        del result
    mode = "all" if trains_mlp else "frozen-mlp"
    planned = kept_bytes(student.config, replace(SETTINGS, mode=mode), is_linear=True)
    assert sizes[1] - sizes[0] == planned.mlp


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("nothing", 4 * 32), ("stream", 8 * 32 + 4 + 32 + 4), ("mlp", 8 * 32 + 4 + 8 * 48)],
)
def test_checkpointed_blocks_keep_what_is_measured_of_frozen_ones(keep, expected, pair):
    """The figures are those that tests/distill/test_frozen.py takes from a real backward pass."""
    settings = replace(SETTINGS, mode="frozen-mlp", frozen_dtype="float8")
    assert kept_bytes(pair.student, settings, is_linear=True).checkpointed(keep) == expected


def test_more_gpus_hold_less_and_no_more_together_than_they_must(pair):
    """What is cut is cut exactly; the rest is what a sharded model gathers."""
    settings = replace(SETTINGS, dtype="bfloat16")
    one, four = (plan_memory(pair, settings, stage=2, gpus=count) for count in (1, 4))
    assert four.trained == one.trained
    assert four.optimiser == one.optimiser // 4
    assert four.gradients == one.gradients // 4
    assert micro_batch_tokens(settings, 2, gpus=4) == 16


def test_gradients_stay_whole_between_micro_batches_unless_they_are_reduced(pair):
    own = StageSettings(micro_batch_tokens=16)
    settings = replace(SETTINGS, stage2=own)
    whole = plan_memory(pair, settings, stage=2, gpus=2).gradients
    assert whole == plan_memory(pair, settings, stage=2, gpus=1).gradients
    for changes in ({"reduce_each_micro_batch": True}, {"parallel": "zero2"}, {"parallel": "zero3"}):
        assert plan_memory(pair, replace(settings, **changes), stage=2, gpus=2).gradients == whole // 2
    assert plan_memory(pair, replace(settings, parallel="zero1"), stage=2, gpus=2).gradients == whole


@pytest.mark.parametrize("mode", ["all", "frozen-mlp"])
def test_what_checkpointing_keeps_lies_between_nothing_and_everything(mode, pair):
    settings = replace(SETTINGS, mode=mode, dtype="bfloat16")

    def activations(**changes) -> int:
        return plan_memory(pair, replace(settings, stage2=StageSettings(**changes)), stage=2).activations

    kept = [activations(gradient_checkpointing=True, keep=keep) for keep in ("nothing", "stream", "mlp")]
    assert kept == sorted(kept)
    assert kept[0] < activations(gradient_checkpointing=True, keep="mixer")
    assert activations(gradient_checkpointing=True, keep="mlp", micro_batch_tokens=16) * 4 == kept[2]
