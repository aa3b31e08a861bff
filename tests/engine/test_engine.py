"""The thread around the core: nobody waits for ever, whoever reads, leaves, or fails."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hrwkv.engine.engine import Engine
from hrwkv.engine.request import CapacityError, EngineError, Event, QueueFullError, SamplingParams
from hrwkv.engine.stream import Request
from hrwkv.layers.projections import Projections
from hrwkv.settings import EngineSettings
from tests.builders import hybrid_model
from tests.engine.driver import greedy, greedy_alone, tokenizer
from tests.engine.test_core import prompt_of

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny_teacher" / "model"
# The model has no end-of-sequence token, so that lengths are what is asked for.
BASE = {"device": "cpu", "max_sequences": 4, "step_tokens": 16, "block_size": 4}


def make_engine(**changes: Any) -> Engine:
    return Engine(hybrid_model(eos_token_id=None), tokenizer(), EngineSettings(**{**BASE, **changes}))


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make_engine() as made:
        yield made


class Gate:
    """Holds the model before its next forward until it is opened."""

    def __init__(self, engine: Engine) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        engine._core._runner.model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.reached.set()
        assert self.open.wait(60)


def read(request: Request) -> list[Event]:
    return list(request)


def test_generate_gives_each_prompt_its_own_answers_in_order(engine: Engine) -> None:
    prompts = [prompt_of(length) for length in (3, 9, 1)]
    answers = engine.generate(prompts, greedy(5, n=2, logprobs=0))
    expected = [greedy_alone("hybrid", tuple(prompt), 5) for prompt in prompts for _ in range(2)]
    assert [answer.tokens for answer in answers] == expected
    assert [answer.text for answer in answers] == [tokenizer().decode(list(tokens)) for tokens in expected]
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert [tuple(each.token for each in answer.logprobs) for answer in answers] == expected
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (13, 30)
    assert (stats.queued, stats.running, stats.kv_blocks_used, stats.state_slots_used) == (0, 0, 0, 0)
    assert (sum(stats.first_token.counts), sum(stats.inter_token.counts)) == (6, 24)
    assert engine.stats().first_token == stats.first_token  # asking changes nothing


def test_an_engine_multiplies_each_input_once(engine: Engine) -> None:
    fusable = [m for m in engine._core._runner.model.modules() if isinstance(m, Projections)]
    assert len(fusable) == 2 * engine.model_config.num_hidden_layers
    assert all(module._fused is not None for module in fusable)


def test_generate_takes_more_prompts_than_the_line() -> None:
    with make_engine(max_waiting=2) as engine:
        prompts = [prompt_of(3, seed) for seed in range(12)]
        answers = engine.generate(prompts, greedy(2))
    assert [answer.tokens for answer in answers] == [greedy_alone("hybrid", tuple(p), 2) for p in prompts]


def test_many_asyncio_readers_and_one_that_leaves(engine: Engine) -> None:
    async def ask(seed: int) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        request = engine.submit(prompt_of(4, seed), greedy(8))
        async for event in request:
            tokens += event.tokens
            if seed == 3:
                request.cancel()
        return tokens

    async def ask_all() -> list[tuple[int, ...]]:
        return list(await asyncio.wait_for(asyncio.gather(*map(ask, range(8))), 60))

    found = asyncio.run(ask_all())
    for seed, tokens in enumerate(found):
        expected = greedy_alone("hybrid", tuple(prompt_of(4, seed)), 8)
        assert tokens == expected[: len(tokens)]
        assert seed == 3 or tokens == expected


def test_a_reader_whose_loop_is_gone_stops_nobody(engine: Engine) -> None:
    gate = Gate(engine)

    async def look_once(request: Request) -> None:
        events = aiter(request)
        with pytest.raises(TimeoutError, match="^$"):
            await asyncio.wait_for(anext(events), 0.01)

    request = engine.submit(prompt_of(4), greedy(3))
    asyncio.run(look_once(request))
    gate.open.set()
    assert engine.generate([prompt_of(5)], greedy(3))[0].tokens == greedy_alone(
        "hybrid", tuple(prompt_of(5)), 3
    )


def test_a_slow_reader_finds_everything_in_one_event(engine: Engine) -> None:
    slow = engine.submit(prompt_of(4), greedy(6))
    engine.generate([prompt_of(5)], greedy(10))
    (event,) = read(slow)
    assert event.tokens == greedy_alone("hybrid", tuple(prompt_of(4)), 6)
    assert read(slow) == []


def test_cancel_counts_whenever_it_comes(engine: Engine) -> None:
    gate = Gate(engine)
    running, waiting = (engine.submit(prompt_of(4), greedy(9)) for _ in range(2))
    assert gate.reached.wait(60)
    running.cancel()
    waiting.cancel()
    waiting.cancel()
    gate.open.set()
    assert [read(request)[-1].finish_reason for request in (running, waiting)] == ["abort", "abort"]
    running.cancel()
    assert len(engine.generate([prompt_of(4)], greedy(2))[0].tokens) == 2


def test_a_deadline_passes(engine: Engine) -> None:
    """In a millisecond there is no time for 60 forwards."""
    request = engine.submit(prompt_of(4), greedy(60), deadline=0.001)
    assert read(request)[-1].finish_reason == "abort"


def test_a_full_line_refuses(engine: Engine) -> None:
    with make_engine(max_waiting=1) as small:
        gate = Gate(small)
        first = small.submit(prompt_of(4), greedy(1))
        assert gate.reached.wait(60)
        second = small.submit(prompt_of(4), greedy(1))
        with pytest.raises(QueueFullError, match="1 requests wait already"):
            small.submit(prompt_of(4), greedy(1))
        assert small.stats().queued == 1
        gate.open.set()
        assert [len(read(request)) for request in (first, second)] == [1, 1]


def test_what_cannot_run_is_refused_with_the_numbers(engine: Engine) -> None:
    assert engine.max_context == 64
    with pytest.raises(CapacityError, match="60 tokens and the answer up to 5, expected at most 64"):
        engine.submit(prompt_of(60), greedy(5))
    with pytest.raises(CapacityError, match="64 tokens and the answer up to 1"):
        engine.submit(prompt_of(64), SamplingParams())
    for prompt, message in (
        ([], "no tokens"),
        ([97], "token id 97.*0 to 96"),
        ([-1], "-1"),
        (["a"], "not a list"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, greedy(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token id 97 in logit_bias"):
        engine.submit([1], greedy(1, logit_bias={97: 1.0}))
    with pytest.raises(ValueError, match="deadline is 0"):
        engine.submit([1], greedy(1), deadline=0)
    assert len(engine.generate([prompt_of(60)], SamplingParams(ignore_eos=True))[0].tokens) == 4


def test_a_small_cache_bounds_the_context() -> None:
    """One state, and blocks for 20 tokens; the 21st is sampled and never read."""
    with make_engine(cache_bytes=3072 + 5 * 512) as engine:
        assert engine.max_context == 21
        assert len(engine.generate([prompt_of(18)], greedy(3))[0].tokens) == 3
        with pytest.raises(CapacityError, match="expected at most 21"):
            engine.submit(prompt_of(18), greedy(4))
    with pytest.raises(ValueError, match="the cache has 100 bytes, but one sequence needs 3072"):
        make_engine(cache_bytes=100)


def test_a_dead_thread_fails_all_at_once(engine: Engine) -> None:
    gate = Gate(engine)
    requests = [engine.submit(prompt_of(4), greedy(9)) for _ in range(6)]
    assert gate.reached.wait(60)
    arriving = engine.submit(prompt_of(4), greedy(9))

    def die() -> None:
        raise RuntimeError("no more work")

    engine._core.scheduler.schedule = die  # type: ignore[method-assign, assignment]
    gate.open.set()
    for request in (*requests, arriving):
        with pytest.raises(EngineError, match="the engine has failed .RuntimeError"):
            read(request)
    engine._thread.join(60)
    assert not engine.is_alive
    assert not engine.stats().healthy
    with pytest.raises(EngineError, match="the engine has failed"):
        engine.submit(prompt_of(4), greedy(1))


def test_a_broken_scheduler_leaves_nobody_waiting(engine: Engine) -> None:
    """Failing the requests asked the scheduler to free them; what it raised left the others for ever."""
    gate = Gate(engine)
    requests = [engine.submit(prompt_of(4), greedy(9)) for _ in range(3)]
    assert gate.reached.wait(60)

    def broken(*_: object) -> None:
        raise AssertionError("slots are free twice")

    engine._core.scheduler.schedule = broken  # type: ignore[method-assign, assignment]
    engine._core.scheduler.finish = broken  # type: ignore[method-assign]
    gate.open.set()
    engine._thread.join(60)
    for request in requests:
        assert isinstance(request._error, EngineError)
    stats = engine.stats()
    assert (stats.running, stats.queued, stats.healthy) == (0, 0, False)


def test_close_lets_finish_and_refuses_the_next() -> None:
    engine = make_engine()
    request = engine.submit(prompt_of(4), greedy(9))
    engine.close(60)
    assert read(request)[-1].finish_reason == "length"
    assert not engine.is_alive
    with pytest.raises(EngineError, match="closed"):
        engine.submit(prompt_of(4), greedy(1))
    engine.close()


def test_close_at_once_aborts_what_runs_and_what_waits() -> None:
    engine = make_engine()
    gate = Gate(engine)
    requests = [engine.submit(prompt_of(4), greedy(9)) for _ in range(7)]
    assert gate.reached.wait(60)
    closing = threading.Thread(target=engine.close, args=(0,))
    closing.start()
    while engine._stop_at is None:
        threading.Event().wait(0.001)
    gate.open.set()
    assert {read(request)[-1].finish_reason for request in requests} == {"abort"}
    closing.join(60)
    assert not closing.is_alive()


def test_the_shipped_teacher_opens(tmp_path: Path) -> None:
    """An all-attention teacher's directory, its end tokens included."""
    with Engine.open(SHIPPED, EngineSettings(device="cpu", max_sequences=2)) as engine:
        assert engine.model_config.linear_layers == []
        prompt = engine.tokenizer("def main():")["input_ids"]
        (answer,) = engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0))
        assert answer.text == engine.tokenizer.decode(list(answer.tokens))
    bare = tmp_path / "bare"
    shutil.copytree(SHIPPED, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ValueError, match="nowhere is no directory"):
        Engine.open(tmp_path / "nowhere", EngineSettings(device="cpu"))
    with pytest.raises(ValueError, match="no tokenizer that opens"):
        Engine.open(bare, EngineSettings(device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):
            Engine.open(SHIPPED, EngineSettings(device="cuda"))
