import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrwkv.engine.engine import Engine
from hrwkv.engine.measure import (
    Decode,
    Prefill,
    measure_decode,
    measure_prefill,
    num_fitting,
    prefill_operations,
    weight_bytes,
)
from hrwkv.engine.request import EngineError
from hrwkv.engine.runner import Runner
from hrwkv.layers.batch import TokenBatch
from hrwkv.settings import EngineSettings
from tests.builders import hybrid_model, random_ids
from tests.tokenizers import byte_tokenizer

SETTINGS = EngineSettings(device="cpu", max_sequences=4, step_tokens=16, block_size=4, cache_bytes=2**20)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(hybrid_model(max_position_embeddings=256), byte_tokenizer(), SETTINGS) as running:
        yield running


def decode(engine: Engine, **changes: Any) -> Decode:
    case = {"batch": 3, "context": 8, "steps": 6, **changes}
    return measure_decode(engine, hybrid_model(), SETTINGS, **case)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_every_weight_but_an_embedding_of_its_own(tied: bool) -> None:
    model = hybrid_model(tie_word_embeddings=tied)
    names = {
        name: tensor for name, tensor in model.state_dict().items() if name != "model.embed_tokens.weight"
    }
    assert weight_bytes(model) == sum(tensor.numel() * 4 for tensor in names.values())


@pytest.mark.parametrize("kept", [(2,), (0, 1, 2, 3)], ids=["hybrid", "teacher"])
def test_operations_of_the_weights_are_those_that_torch_counts(kept: tuple[int, ...]) -> None:
    """Beside attention and recurrence: r_k, by elements, and residuals of layer 0, which it never reads."""
    model, length = hybrid_model(kept), 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.compute_logits(model(random_ids(length), TokenBatch.from_lengths([length]))[-1:])
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    heads, size, full = 4, 8, len(kept)
    attention = sum(4 * heads * size * (position + 0.5) for position in range(length)) * full
    recurrence = 9 * heads * size * size * length * (4 - full)
    others = r"r_k|layers\.0\.self_attn\.[vk][12]"
    rest = sum(weight.numel() for name, weight in model.named_parameters() if re.search(others, name))
    assert prefill_operations(model, length) == products + attention + recurrence + 2 * length * rest


@pytest.mark.parametrize(
    ("tokens", "slots", "blocks", "fits"),
    [(9, 10, 10, 3), (8, 10, 10, 5), (8, 2, 10, 2), (99, 7, 10, 0), (99, 7, 0, 7)],
)
def test_what_fits_is_bounded_by_slots_and_blocks(tokens: int, slots: int, blocks: int, fits: int) -> None:
    assert num_fitting(tokens, slots=slots, blocks=blocks, block_size=4) == fits


def test_rates_of_a_measurement() -> None:
    step = Decode(batch=8, context=100, seconds=0.5, bytes=200)
    assert (step.tokens_per_second, step.of_floor(1000.0)) == (16, 0.4)
    prompt = Prefill(length=50, seconds=0.5, operations=300)
    assert (prompt.tokens_per_second, prompt.utilisation(1000.0)) == (100, 0.6)


def test_a_decode_steps_time_and_bytes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that sleeps is measured as a step, not as one token of it; states count twice, blocks once."""
    launch = Runner.launch

    def slow(runner: Runner, plan: Any) -> Any:
        time.sleep(0.02)
        return launch(runner, plan)

    monkeypatch.setattr(Runner, "launch", slow)
    found = decode(engine)
    assert found.seconds >= 0.02
    # 3 linear layers of 4 heads, 8 by 8; a token has 2 KV heads of 8 in one layer, of which blocks hold 4.
    states, block = 3 * 3 * 4 * 8 * 8 * 4, 4 * 2 * 2 * 8 * 4
    held = found.bytes - weight_bytes(hybrid_model()) - 2 * states
    assert held % block == 0
    assert 3 * 2 * block <= held <= 3 * 9 * block
    while engine.stats().running:
        time.sleep(0.001)
    assert engine.stats().kv_blocks_used == 0
    assert found.tokens_per_second == 3 / found.seconds


def test_a_prompt_is_read_once_more_than_it_counts(engine: Engine) -> None:
    found = measure_prefill(engine, hybrid_model(), length=40)
    assert engine.stats().prompt_tokens == 3 * 40
    assert found.operations == prefill_operations(hybrid_model(), 40)


def test_what_does_not_fit_is_told(engine: Engine) -> None:
    with pytest.raises(ValueError, match="5 sequences of 29 tokens do not fit in the cache, 4 do"):
        decode(engine, batch=5)
    with pytest.raises(ValueError, match="2 sequences of 240 tokens grow to \\d+ .* longest context is 256"):
        decode(engine, batch=2, context=240)
    with pytest.raises(ValueError, match="256"):
        measure_prefill(engine, hybrid_model(), length=300)


def test_an_engine_that_fails_ends_the_measurement(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the wait for tokens would never end."""

    def fail(runner: Runner, plan: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(Runner, "launch", fail)
    monkeypatch.setattr("hrwkv.engine.measure.IDLE_POLLS", 20)
    with pytest.raises(EngineError, match="ended the requests early|broken"):
        decode(engine)
