"""Equality 5: whatever else the engine does, an answer is the one that its request would get alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.engine.core import BOUNDS, Histogram
from hrwkv.engine.grammar import GrammarState
from hrwkv.engine.request import EngineError, Grammar, GrammarError, SamplingParams
from hrwkv.model.modeling import HybridModel
from tests.builders import VOCAB, logits_of, random_ids
from tests.engine.driver import KINDS, Driver, Reader, greedy, greedy_alone, model_of, sizes_of, tokenizer

kinds = pytest.mark.parametrize("kind", KINDS)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, seed=100 * length + seed).tolist()


@kinds
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_batched_and_chunked_is_alone(kind: str, overlap: str) -> None:
    """More requests than slots, prompts longer than a step."""
    driver = Driver(kind, max_sequences=3, step_tokens=5, overlap=overlap)
    prompts = [prompt_of(length) for length in (1, 4, 11, 23, 2)]
    readers = [driver.add(prompt, greedy(6))[1] for prompt in prompts]
    driver.run()
    for prompt, reader in zip(prompts, readers, strict=True):
        assert reader.tokens() == greedy_alone(kind, tuple(prompt), 6)
        assert reader.reason() == "length"
        assert reader.events[0].usage.completion_tokens == 6
    driver.assert_nothing_held()


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    requests = st.fixed_dictionaries(
        {
            "length": st.integers(1, 20),
            "seed": st.integers(0, 1),
            "count": st.integers(1, 8),
            "n": st.sampled_from([1, 1, 3]),
            "priority": st.integers(0, 1),
            "arrival": st.integers(0, 24),
            "cancel_after": st.none() | st.integers(0, 8),
            "shared": st.sampled_from([0, 5, 13, 20]),
            "follows": st.none() | st.integers(0, 4),
            "scores": st.sampled_from([None, None, 0]),
        }
    )
    sequences = draw(st.integers(1, 4))
    return {
        "requests": draw(st.lists(requests, min_size=1, max_size=6)),
        "max_sequences": sequences,
        "step_tokens": draw(st.integers(sequences, 12)),
        "block_size": draw(st.sampled_from([1, 3, 4])),
        "overlap": draw(st.sampled_from(["on", "off"])),
        "swap_bytes": draw(st.sampled_from([0, 9000, 10**9])),
        "spare_blocks": draw(st.integers(0, 10)),
        "prefix_bytes": draw(st.sampled_from([10**8, 10**8, 9000, 30000, 0])),
        "min_gain": draw(st.integers(1, 5)),
    }


def prompts_of(kind: str, requests: list[dict[str, Any]]) -> list[list[int]]:
    """Some begin alike, some continue what was asked and answered at the start."""
    prompts: list[list[int]] = []
    for each in requests:
        own = prompt_of(each["length"], each["seed"])
        prompt = [*prompt_of(20)[: each["shared"]], *own[each["shared"] :]]
        if each["follows"] is not None and prompts:
            number = each["follows"] % len(prompts)
            if len(earlier := prompts[number]) <= 20:
                answer = greedy_alone(kind, tuple(earlier), requests[number]["count"])
                prompt = [*earlier, *answer, *own[:7]]
        prompts.append(prompt)
    return prompts


@kinds
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_schedule_is_alone(kind: str, data: st.DataObject) -> None:
    """Random arrivals, cancels, priorities, forks, beginnings known and unknown, and a memory that only just
    holds the longest alone."""
    case = data.draw(schedules())
    requests, size = case["requests"], case["block_size"]
    prompts = prompts_of(kind, requests)
    longest = max(len(prompt) + each["count"] for prompt, each in zip(prompts, requests, strict=True)) - 1
    driver = Driver(
        kind,
        max_sequences=case["max_sequences"],
        step_tokens=case["step_tokens"],
        block_size=size,
        overlap=case["overlap"],
        swap_bytes=case["swap_bytes"],
        prefix_cache_bytes=case["prefix_bytes"],
        min_gain=case["min_gain"],
        sizes=sizes_of(
            kind,
            slots=case["max_sequences"],
            blocks=-(-longest // size) + case["spare_blocks"],
            block_size=size,
        ),
    )
    readers: list[tuple[dict[str, Any], list[int], int, Reader]] = []
    step = 0
    while step < 25 or driver.core.has_work:
        for each, prompt in zip(requests, prompts, strict=True):
            if each["arrival"] == step:
                params = greedy(each["count"], n=each["n"], prompt_logprobs=each["scores"])
                number, reader = driver.add(prompt, params, priority=each["priority"])
                readers.append((each, prompt, number, reader))
        for each, _, number, _ in readers:
            if each["cancel_after"] is not None and each["arrival"] + each["cancel_after"] == step:
                driver.core.abort(number)
        if driver.core.has_work:
            driver.core.step()
        step += 1
        assert step < 1000
    for each, prompt, _, reader in readers:
        expected = greedy_alone(kind, tuple(prompt), each["count"])
        assert reader.error is None
        assert len(reader.events) == each["n"]
        for event in reader.events.values():
            if event.finish_reason == "abort":
                assert each["cancel_after"] is not None
                assert event.tokens == expected[: len(event.tokens)]
            else:
                assert (event.finish_reason, event.tokens) == ("length", expected)
                assert len(event.prompt_logprobs or ()) == (0 if each["scores"] is None else len(prompt))
    driver.assert_nothing_held()


@pytest.mark.parametrize("swap_bytes", [10**9, 0], ids=["swapped", "recomputed"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("kind", ["hybrid", "all-attention"])
def test_preempted_is_alone(kind: str, overlap: str, swap_bytes: int) -> None:
    """Four answers outgrow a memory for two and a half; the last to come makes room."""
    sizes = sizes_of(kind, slots=4, blocks=13)
    driver = Driver(kind, sizes=sizes, overlap=overlap, swap_bytes=swap_bytes)
    prompts = [prompt_of(5, seed) for seed in range(4)]
    readers = [driver.add(prompt, greedy(14))[1] for prompt in prompts]
    driver.run()
    assert driver.core.totals.preempted > 0
    for prompt, reader in zip(prompts, readers, strict=True):
        assert reader.tokens() == greedy_alone(kind, tuple(prompt), 14)
    driver.assert_nothing_held()


@kinds
def test_forked_answers_share_one_prefill(kind: str) -> None:
    """Six answers in four slots: two of them wait for a copy of the prompt's memory."""
    driver = Driver(kind, step_tokens=8, sizes=sizes_of(kind, slots=4, blocks=40))
    prompt = prompt_of(19)
    read = count_tokens(driver)
    _, reader = driver.add(prompt, greedy(5, n=6))
    driver.run()
    assert [reader.tokens(index) for index in range(6)] == [greedy_alone(kind, tuple(prompt), 5)] * 6
    # The prompt but for its last token once, then that token and four of the answer for each.
    assert sum(read) == 18 + 6 * 5
    driver.assert_nothing_held()


SAMPLED = SamplingParams(
    max_tokens=8, temperature=1.3, top_p=0.9, seed=7, n=2, frequency_penalty=0.5, repetition_penalty=1.2
)


@pytest.mark.parametrize("swap_bytes", [10**9, 0], ids=["swapped", "recomputed"])
@pytest.mark.parametrize("kind", ["hybrid", "all-attention"])
def test_sampled_with_a_seed_is_alone(kind: str, swap_bytes: int) -> None:
    """Penalties count on through preemption, draws depend on the seed only, and two choices differ."""
    alone = Driver(kind)
    prompt = prompt_of(6)
    _, expected = alone.add(prompt, SAMPLED)
    alone.run()
    assert expected.tokens(0) != expected.tokens(1)
    driver = Driver(kind, sizes=sizes_of(kind, slots=4, blocks=9), swap_bytes=swap_bytes, overlap="on")
    for seed in range(2):
        driver.add(prompt_of(7, seed), SamplingParams(max_tokens=9, seed=seed))
    _, found = driver.add(prompt, SAMPLED)
    driver.run()
    assert driver.core.totals.preempted > 0
    assert [found.tokens(index) for index in (0, 1)] == [expected.tokens(index) for index in (0, 1)]


def test_a_higher_priority_goes_first_and_takes_the_room() -> None:
    driver = Driver("hybrid", sizes=sizes_of("hybrid", slots=1, blocks=20))
    low_prompt, high_prompt = prompt_of(5), prompt_of(6)
    _, low = driver.add(low_prompt, greedy(10), priority=1)
    for _ in range(3):
        driver.core.step()
    _, high = driver.add(high_prompt, greedy(4), priority=0)
    _, later = driver.add(high_prompt, greedy(4), priority=1)
    while 0 not in high.events or high.reason() is None:
        driver.core.step()
    assert low.reason() is None
    driver.run()
    assert driver.core.totals.preempted == 1
    assert high.tokens() == later.tokens() == greedy_alone("hybrid", tuple(high_prompt), 4)
    assert low.tokens() == greedy_alone("hybrid", tuple(low_prompt), 10)


def test_a_deadline_ends_what_waits_and_what_runs() -> None:
    driver = Driver("hybrid", sizes=sizes_of("hybrid", slots=1, blocks=20))
    prompt = prompt_of(5)
    _, runs = driver.add(prompt, greedy(20), deadline=2.5)
    _, waits = driver.add(prompt, greedy(20), deadline=1.5)
    _, free = driver.add(prompt, greedy(3))
    while driver.core.has_work:
        driver.core.step()
        driver.now += 1
    assert (runs.reason(), waits.reason(), free.reason()) == ("abort", "abort", "length")
    assert waits.tokens() == ()
    assert runs.tokens() == greedy_alone("hybrid", tuple(prompt), 3)  # steps at 0, 1 and 2
    driver.assert_nothing_held()


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_end_tokens_stop_texts_and_what_they_leave(overlap: str) -> None:
    prompt = prompt_of(6)
    answer = greedy_alone("hybrid", tuple(prompt), 9)
    assert answer[4] not in answer[:4]
    text = tokenizer().decode([answer[4]])
    driver = Driver("hybrid", overlap=overlap)
    cases = {
        "token": greedy(9, stop_token_ids=(answer[4],)),
        "kept": greedy(9, stop_token_ids=(answer[4],), include_stop=True),
        "text": greedy(9, stop=(text,)),
        "late": greedy(9, stop=(text,), min_tokens=5),
    }
    readers = {name: driver.add(prompt, params)[1] for name, params in cases.items()}
    driver.run()
    found = {name: (r.tokens(), r.reason(), r.events[0].stop_reason) for name, r in readers.items()}
    assert found == {
        "token": (answer[:4], "stop", answer[4]),
        "kept": (answer[:5], "stop", answer[4]),
        "text": (answer[:4], "stop", text),
        "late": (answer, "length", None) if answer[4] not in answer[5:] else found["late"],
    }
    driver.assert_nothing_held()


@kinds
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_log_probabilities_are_those_of_one_forward(kind: str, overlap: str) -> None:
    driver = Driver(kind, step_tokens=5, overlap=overlap)
    prompt = prompt_of(13)
    _, reader = driver.add(prompt, greedy(4, logprobs=2, prompt_logprobs=1, n=2))
    driver.add(prompt_of(9), greedy(9, logprobs=5))
    driver.run()
    ids = torch.tensor([*prompt, *reader.tokens()])
    expected = logits_of(model_of(kind), ids, [len(ids)]).log_softmax(-1)
    for event in reader.events.values():
        assert event.prompt_logprobs is not None
        assert (event.prompt_logprobs[0].token, event.prompt_logprobs[0].logprob) == (prompt[0], None)
        scored = (*event.prompt_logprobs[1:], *event.logprobs)
        assert [each.token for each in scored] == ids[1:].tolist()
        assert [len(each.top) for each in scored] == [1] * 12 + [2] * 4
        for row, each in zip(expected, scored, strict=False):
            top = row.topk(2)
            assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
            for (token, value), best, index in zip(each.top, top.values, top.indices, strict=False):
                assert token == int(index)
                assert value == pytest.approx(float(best), abs=1e-4)


def test_a_grammar_holds_in_a_batch_and_ends_the_answer() -> None:
    pytest.importorskip("llguidance")
    driver = Driver("hybrid", overlap="on")
    params = SamplingParams(max_tokens=20, seed=1, grammar=Grammar("regex", "[A-C]{3}[0-9]"))
    others = [driver.add(prompt_of(5, seed), greedy(8))[1] for seed in range(2)]
    _, reader = driver.add(prompt_of(6), params)
    driver.run()
    assert re.fullmatch("[A-C]{3}[0-9]", reader.events[0].text)
    assert reader.reason() == "stop"
    for seed, other in enumerate(others):
        assert other.tokens() == greedy_alone("hybrid", tuple(prompt_of(5, seed)), 8)


class Fault:
    """Makes the model raise in a step whose packed tokens it is told about."""

    def __init__(self, driver: Driver, fails: Callable[[list[int]], bool], error: Exception) -> None:
        self.count = 0

        def check(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            if fails(arguments[0].tolist()):
                self.count += 1
                raise error

        self.hook = driver.model.register_forward_pre_hook(check)


@pytest.fixture
def fault() -> Iterator[Callable[..., Fault]]:
    made: list[Fault] = []

    def make(*arguments: Any) -> Fault:
        made.append(Fault(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.hook.remove()


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("late", [False, True], ids=["in-its-prompt", "in-its-answer"])
def test_one_poisoned_request_fails_alone(fault: Callable[..., Fault], overlap: str, late: bool) -> None:
    driver = Driver("hybrid", overlap=overlap)
    prompts = [prompt_of(5, seed) for seed in range(3)]
    others = [greedy_alone("hybrid", tuple(prompts[index]), 6) for index in (0, 2)]
    spared = {*prompts[0], *prompts[2], *others[0], *others[1]}
    candidates = greedy_alone("hybrid", tuple(prompts[1]), 5) if late else prompts[1]
    poison = next(token for token in candidates if token not in spared)
    made = fault(driver, lambda tokens: poison in tokens, RuntimeError("poisoned\nby a test"))
    readers = [driver.add(prompt, greedy(6))[1] for prompt in prompts]
    driver.run()
    assert made.count >= 2
    assert isinstance(readers[1].error, EngineError)
    assert str(readers[1].error) == "the model failed on this request (RuntimeError: poisoned)"
    assert [readers[0].tokens(), readers[2].tokens()] == others
    driver.assert_nothing_held()


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_out_of_memory_in_large_steps_costs_only_time(fault: Callable[..., Fault], overlap: str) -> None:
    driver = Driver("hybrid", overlap=overlap)
    made = fault(driver, lambda tokens: len(tokens) > 12, torch.OutOfMemoryError("injected"))
    prompts = [prompt_of(7, seed) for seed in range(4)]
    readers = [driver.add(prompt, greedy(6, n=2))[1] for prompt in prompts]
    driver.run()
    assert made.count > 0
    for prompt, reader in zip(prompts, readers, strict=True):
        assert reader.error is None
        assert [reader.tokens(i) for i in (0, 1)] == [greedy_alone("hybrid", tuple(prompt), 6)] * 2
    driver.assert_nothing_held()


def test_a_failed_text_fails_its_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver("hybrid")
    prompts = [prompt_of(5, seed) for seed in range(2)]
    (first, second) = (driver.add(prompt, greedy(6))[1] for prompt in prompts)
    bad = next(iter(driver.core.scheduler.waiting))
    _, choice = driver.core._owners[bad]
    monkeypatch.setattr(choice.text, "add", lambda token: 1 // 0)
    driver.run()
    assert isinstance(first.error, EngineError)
    assert second.tokens() == greedy_alone("hybrid", tuple(prompts[1]), 6)
    driver.assert_nothing_held()


def poison(token: int, kind: str) -> HybridModel:
    """A model in which this token makes everything that its sequence computes NaN."""
    model = copy.deepcopy(model_of(kind))
    embedding = model.model.embed_tokens

    def spoil(_: Any, arguments: tuple[torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        return hidden.masked_fill((arguments[0] == token).unsqueeze(-1), torch.nan)

    embedding.register_forward_hook(spoil)
    return model


def test_no_time_between_tokens_is_lost() -> None:
    """Of those between two scrapes the last 65,536 were kept: a GPU makes as many in seconds."""
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 120.0, 121.0):
        histogram.add(seconds)
    assert histogram.counts == [2, 1, *[0] * 13, 1, 1]
    assert len(histogram.counts) == len(BOUNDS) + 1
    assert histogram.total == pytest.approx(241.0021)
    for _ in range(2**17):
        histogram.add(0.3)
    assert sum(histogram.counts) == 2**17 + 5


HOW: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9}, {"logprobs": 1, "n": 2}]


@kinds
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_logits_that_are_not_finite_fail_their_request_only(
    kind: str, overlap: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, it said token 0 to its end. Its memory, NaN all over, spoils nobody that gets it."""
    prompts = [prompt_of(5, seed) for seed in range(3)]
    expected = [greedy_alone(kind, tuple(prompt), 6) for prompt in prompts]
    bad = min(set(range(VOCAB)) - {token for row in (*prompts, *expected) for token in row})
    driver = Driver(kind, model=poison(bad, kind), overlap=overlap)
    monkeypatch.setattr(driver.core._runner, "recover", lambda: pytest.fail("a step failed"))
    _, spoilt = driver.add([*prompt_of(4), bad, *prompt_of(3)], SamplingParams(max_tokens=6, **how))
    beside = [driver.add(prompt, greedy(6))[1] for prompt in prompts[:2]]
    driver.run()
    assert isinstance(spoilt.error, EngineError)
    assert str(spoilt.error).startswith("the model's logits are not finite")
    assert not spoilt.events
    driver.assert_nothing_held()
    again = [driver.add(prompt, greedy(6))[1] for prompt in prompts]
    driver.run()
    assert [reader.tokens() for reader in (*beside, *again)] == [*expected[:2], *expected]


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("method", ["fill_mask", "accept"])
def test_a_grammar_that_breaks_fails_its_request_only(
    overlap: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine was said to have failed, and all that ran was computed again."""
    pytest.importorskip("llguidance")
    driver = Driver("hybrid", overlap=overlap)
    monkeypatch.setattr(driver.core._runner, "recover", lambda: pytest.fail("a step failed"))
    original, count = getattr(GrammarState, method), iter(range(100))

    def break_later(*arguments: Any, **options: Any) -> None:
        if next(count) == 2:
            raise GrammarError("the grammar cannot go on: too many items")
        original(*arguments, **options)

    monkeypatch.setattr(GrammarState, method, break_later)
    prompt = tuple(prompt_of(5))
    _, other = driver.add(prompt, greedy(8))
    _, reader = driver.add(prompt_of(6), SamplingParams(max_tokens=9, grammar=Grammar("regex", "[A-C]{9}")))
    driver.run()
    assert isinstance(reader.error, GrammarError)
    assert len(reader.tokens()) == 2
    assert other.tokens() == greedy_alone("hybrid", prompt, 8)
    driver.assert_nothing_held()


def count_tokens(driver: Driver) -> list[int]:
    """The numbers of tokens of the forwards to come."""
    counts: list[int] = []
    original = driver.core.scheduler.schedule

    def schedule() -> Any:
        plan = original()
        counts.append(plan.num_tokens)
        assert plan.num_tokens <= driver.settings.step_tokens
        return plan

    driver.core.scheduler.schedule = schedule  # type: ignore[method-assign]
    return counts
