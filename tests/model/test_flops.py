"""The count of operations against torch's own counter and against the parameters."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrwkv.distill.parallel import Ranks
from hrwkv.distill.stages import STAGES, StepInput, StepOptions, set_trainable
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.time_mix import VARIANTS
from hrwkv.model.checkpoint import expected_shapes
from hrwkv.model.flops import (
    forward_operations,
    mixer_weights,
    mixing_operations,
    stage_operations,
    utilisation,
)
from tests.builders import hybrid_config, hybrid_model, random_ids

T = 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_of_a_mixer_are_its_matrices_that_are_read(variant: str) -> None:
    config = hybrid_config(variant=variant)
    for layer in range(config.num_hidden_layers):
        matrices = {
            name.removeprefix(f"model.layers.{layer}.self_attn."): shape
            for name, shape in expected_shapes(config).items()
            if f"layers.{layer}.self_attn." in name
            and len(shape) == 2
            and name not in config.unread_parameters
        }
        matrices.pop("r_k", None)
        last = {name for name in matrices if name.endswith("2") or name.startswith(("output.", "o_proj."))}
        sizes = {name: shape[0] * shape[1] for name, shape in matrices.items()}
        inner = sum(size for name, size in sizes.items() if name in last)
        assert mixer_weights(config, layer) == (sum(sizes.values()) - inner, inner)


def counted_products(stage: int, mode: str) -> float:
    """Operations a token of one step's matrix products, by torch; the student is all attention too.

    The recurrence's own products depend on its form, so they are left out of this comparison.
    """
    teacher, student = hybrid_model(range(4)), hybrid_model(range(4), seed=1)
    set_trainable(student, stage=STAGES[stage], mode=mode)
    inputs = StepInput(random_ids(T), TokenBatch.from_lengths([T]), T, T - 1)
    with FlopCounterMode(display=False) as counter:
        STAGES[stage].step(
            teacher.requires_grad_(False), student, inputs, StepOptions(Ranks(0, 1, torch.device("cpu")))
        )
    counts = counter.get_flop_counts()["Global"]
    return (
        sum(count for operation, count in counts.items() if str(operation).split(".")[-1] in ("mm", "addmm"))
        / T
    )


@pytest.mark.parametrize("mode", ["all", "frozen-mlp"])
@pytest.mark.parametrize("stage", [1, 2])
def test_products_of_a_step_are_what_torch_counts(stage: int, mode: str) -> None:
    config = hybrid_config(range(4))
    mixing = forward_operations(config, context_length=T).mixing
    expected = stage_operations(config, config, stage=stage, mode=mode, context_length=T) - 4 * mixing
    # The head's gradient is summed by addmm_, which torch's counter does not know.
    unknown = 2 * config.hidden_size * config.vocab_size if (stage, mode) == (2, "all") else 0
    assert counted_products(stage, mode) + unknown == pytest.approx(expected)


def test_attention_counts_its_causal_half_and_the_recurrence_its_state() -> None:
    config = hybrid_config((2,), num_attention_heads=4, head_dim=8)
    # Token t meets t keys, in two products: on average (T + 1) / 2 of them.
    pairs = sum(range(1, T + 1)) / T
    assert mixing_operations(config, 2, context_length=T) == pytest.approx(2 * 2 * 4 * 8 * pairs)
    assert mixing_operations(config, 1, context_length=T) == 4 * 8 * 8 * 9


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert utilisation(2e9, tokens_per_second=1e5, peak=4e14) == pytest.approx(0.5)
