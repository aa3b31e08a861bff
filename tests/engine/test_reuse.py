"""Requests that begin as earlier ones: what is read again, and that no answer changes by it."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.engine.build import fit_memory
from hrwkv.engine.request import EngineError, Grammar, SamplingParams
from hrwkv.engine.scheduler import Load, Plan, Save
from hrwkv.layers.batch import TokenBatch
from hrwkv.settings import EngineSettings
from tests.builders import VOCAB, hybrid_model, logits_of, random_ids
from tests.engine.driver import KINDS, Driver, Reader, apart, greedy, greedy_alone, sizes_of
from tests.engine.test_core import SAMPLED, count_tokens, poison, prompt_of

BYTES = 2**20
kinds = pytest.mark.parametrize("kind", KINDS)
overlaps = pytest.mark.parametrize("overlap", ["off", "on"])


def ask(driver: Driver, prompt: list[int], params: SamplingParams) -> Reader:
    """One request by itself, and what it leaves on the host."""
    _, reader = driver.add(prompt, params)
    driver.run()
    driver.assert_nothing_held()
    return reader


def cached(reader: Reader) -> int:
    return reader.events[0].usage.cached_tokens


@kinds
@overlaps
def test_a_conversation_is_continued_where_its_answer_ended(kind: str, overlap: str) -> None:
    """Three turns of seven new tokens and an answer of five, whose last token nobody has read."""
    driver = Driver(kind, overlap=overlap, prefix_cache_bytes=BYTES)
    read, prompt, known = count_tokens(driver), [], 0
    for turn in range(3):
        prompt = [*prompt, *prompt_of(7, turn)]
        reader = ask(driver, prompt, greedy(5))
        assert reader.tokens() == greedy_alone(kind, tuple(prompt), 5)
        assert cached(reader) == known
        prompt = [*prompt, *reader.tokens()]
        known = len(prompt) - 1
        assert sum(read) == known
    assert driver.core.totals.prompt_tokens_reused == 11 + 23
    assert driver.core.totals.prompt_tokens == 7 + 19 + 31


@kinds
def test_where_the_reasoning_is_taken_out_the_prompt_is_continued(kind: str) -> None:
    """The last prompt goes on with another text than the answer that it got."""
    driver = Driver(kind, prefix_cache_bytes=BYTES)
    first = prompt_of(9)
    answer = ask(driver, first, greedy(6)).tokens()
    prompt = [*first, (answer[0] + 1) % VOCAB, *prompt_of(4)]
    reader = ask(driver, prompt, greedy(6))
    assert (cached(reader), reader.tokens()) == (9, greedy_alone(kind, tuple(prompt), 6))


@kinds
@pytest.mark.parametrize("step_tokens", [6, 64])
def test_a_common_beginning_is_kept_when_it_is_read_again(kind: str, step_tokens: int) -> None:
    """The second request parts from the first after 10 tokens; the third and the fourth start from there."""
    driver = Driver(kind, step_tokens=step_tokens, prefix_cache_bytes=BYTES, min_gain=4)
    found = []
    for number in range(4):
        prompt = [*prompt_of(10), number, *prompt_of(5, number)]
        reader = ask(driver, prompt, greedy(3))
        assert reader.tokens() == greedy_alone(kind, tuple(prompt), 3)
        found.append(cached(reader))
    assert found == [0, 0, 10, 10]


def test_the_same_prompt_is_read_to_its_last_token() -> None:
    """Its end is of no use: the logits of its last token are needed."""
    driver = Driver(prefix_cache_bytes=BYTES)
    prompt = prompt_of(12)
    readers = [ask(driver, prompt, greedy(4)) for _ in range(3)]
    assert [cached(reader) for reader in readers] == [0, 0, 11]
    assert {reader.tokens() for reader in readers} == {greedy_alone("hybrid", tuple(prompt), 4)}


def test_a_gain_that_is_too_small_keeps_nothing() -> None:
    driver = Driver(prefix_cache_bytes=BYTES, min_gain=10)
    prompt = prompt_of(9)
    ask(driver, prompt, greedy(1))
    assert len(driver.core.scheduler.prefixes) == 0
    answer = ask(driver, prompt, greedy(9)).tokens()  # its end has 17 tokens
    assert cached(ask(driver, [*prompt, *answer], greedy(1))) == 17


@kinds
@overlaps
def test_forks_penalties_and_seeds_are_those_of_a_whole_reading(kind: str, overlap: str) -> None:
    """Two choices, drawn with penalties over all tokens of the prompt."""
    first, more = prompt_of(9), prompt_of(5)
    alone, driver = Driver(kind), Driver(kind, overlap=overlap, prefix_cache_bytes=BYTES)
    ask(driver, first, greedy(2))
    expected, found = (ask(each, [*first, *more], SAMPLED) for each in (alone, driver))
    again = ask(driver, [*first, *more], SAMPLED)
    assert (cached(found), cached(again)) == (9, 13)
    for reader in (found, again):
        assert [reader.tokens(index) for index in (0, 1)] == [expected.tokens(index) for index in (0, 1)]


def test_a_grammar_holds_after_a_beginning_that_was_kept() -> None:
    pytest.importorskip("llguidance")
    driver = Driver(prefix_cache_bytes=BYTES, overlap="on")
    ask(driver, prompt_of(6), greedy(1))
    params = SamplingParams(max_tokens=20, seed=1, grammar=Grammar("regex", "[A-C]{3}[0-9]"))
    prompt = [*prompt_of(6), *prompt_of(3)]
    reader = ask(driver, prompt, params)
    assert cached(reader) == 6
    assert re.fullmatch("[A-C]{3}[0-9]", reader.events[0].text)
    assert reader.tokens() == ask(Driver(), prompt, params).tokens()


def test_a_scored_prompt_is_read_whole_and_not_kept() -> None:
    driver = Driver(prefix_cache_bytes=BYTES)
    prompt = prompt_of(9)
    ask(driver, prompt, greedy(2, prompt_logprobs=0))
    assert len(driver.core.scheduler.prefixes) == 0
    ask(driver, prompt, greedy(2))
    reader = ask(driver, [*prompt, 5, 6], greedy(2, prompt_logprobs=0))
    assert cached(reader) == 0
    scores = reader.events[0].prompt_logprobs
    assert scores is not None
    assert [each.token for each in scores] == [*prompt, 5, 6]


@pytest.mark.parametrize("kind", ["hybrid", "all-attention"])
def test_who_is_put_aside_without_a_copy_starts_from_its_own_prompt(kind: str) -> None:
    driver = Driver(kind, sizes=sizes_of(kind, slots=4, blocks=13), swap_bytes=0, prefix_cache_bytes=BYTES)
    read = count_tokens(driver)
    prompts = [prompt_of(5, seed) for seed in range(4)]
    readers = [driver.add(prompt, greedy(14))[1] for prompt in prompts]
    driver.run()
    assert driver.core.totals.preempted > 0
    assert driver.core.totals.prompt_tokens_reused == 0  # its request had begun
    for prompt, reader in zip(prompts, readers, strict=True):
        assert reader.tokens() == greedy_alone(kind, tuple(prompt), 14)
    whole = Driver(kind, sizes=sizes_of(kind, slots=4, blocks=13), swap_bytes=0)
    whole_read = count_tokens(whole)
    for prompt in prompts:
        whole.add(prompt, greedy(14))
    whole.run()
    assert sum(read) == sum(whole_read) - 5 * whole.core.totals.preempted


@overlaps
def test_ten_conversations_at_once_stay_within_the_bytes(overlap: str) -> None:
    """Room for two conversations; ten take turns, and each answer is its own."""
    driver = Driver(overlap=overlap, prefix_cache_bytes=4 * 3072)
    for _ in range(3):
        for seed in range(10):
            driver.add(prompt_of(9, seed), greedy(3))
        while driver.core.has_work:
            driver.core.step()
            used = driver.core.scheduler.memory.kept.used * driver.sizes.page_bytes
            assert used <= 4 * 3072
    readers = [driver.add(prompt_of(9, seed), greedy(3))[1] for seed in range(10)]
    driver.run()
    for seed, reader in enumerate(readers):
        assert reader.tokens() == greedy_alone("hybrid", tuple(prompt_of(9, seed)), 3)


def fail_once(driver: Driver, length: int) -> None:
    """Let the first forward over so many tokens fail."""
    hooks = []

    def check(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) == length:
            hooks.pop().remove()
            raise RuntimeError("injected")

    hooks.append(driver.model.register_forward_pre_hook(check))


@overlaps
def test_a_failed_step_drops_only_what_it_was_to_copy(overlap: str) -> None:
    """What was kept before stays; the sequences of the step start again without it."""
    driver = Driver(overlap=overlap, prefix_cache_bytes=BYTES)
    first = prompt_of(9)
    ask(driver, first, greedy(2))
    before = dict(driver.core.scheduler.prefixes._nodes)
    fail_once(driver, 6)
    prompt = [*first, *prompt_of(6)]
    reader = ask(driver, prompt, greedy(4))
    assert (cached(reader), reader.tokens()) == (9, greedy_alone("hybrid", tuple(prompt), 4))
    assert before.keys() < driver.core.scheduler.prefixes._nodes.keys()
    again = ask(driver, [*prompt, *reader.tokens(), 7], greedy(4))
    assert again.tokens() == greedy_alone("hybrid", (*prompt, *reader.tokens(), 7), 4)
    assert cached(again) == 18


def test_an_answer_that_was_to_leave_with_a_failed_step_is_not_kept() -> None:
    """It is copied by the step after its last; until that is done nothing may be in its pages."""
    driver = Driver(prefix_cache_bytes=BYTES, max_sequences=2)
    prompt, other = prompt_of(5), prompt_of(6)
    _, reader = driver.add(prompt, greedy(3))
    while driver.core._jobs:
        driver.core.step()
    assert [isinstance(move, Save) for move in driver.core.scheduler.leaving] == [True]
    fail_once(driver, 6)
    _, beside = driver.add(other, greedy(3))
    driver.run()
    assert beside.tokens() == greedy_alone("hybrid", tuple(other), 3)
    following = [*prompt, *reader.tokens(), 8]
    last = ask(driver, following, greedy(3))
    assert (cached(last), last.tokens()) == (5, greedy_alone("hybrid", tuple(following), 3))


@kinds
@overlaps
def test_a_prompt_whose_logits_are_not_finite_is_not_kept(kind: str, overlap: str) -> None:
    prompt = prompt_of(6)
    bad = min(set(range(VOCAB)) - {*prompt, *greedy_alone(kind, tuple(prompt), 3)})
    driver = Driver(kind, model=poison(bad, kind), overlap=overlap, prefix_cache_bytes=BYTES)
    assert isinstance(ask(driver, [*prompt_of(4), bad, *prompt_of(3)], greedy(3)).error, EngineError)
    assert len(driver.core.scheduler.prefixes) == 0
    assert ask(driver, prompt, greedy(3)).tokens() == greedy_alone(kind, tuple(prompt), 3)


def test_a_copy_can_be_continued_in_the_step_that_makes_it() -> None:
    """The device does both in this order; a client that answers at once need not be too early."""
    driver = Driver(prefix_cache_bytes=BYTES)
    prompt = prompt_of(5)
    _, reader = driver.add(prompt, greedy(4))
    while driver.core._jobs:
        driver.core.step()
    plans: list[Plan] = []
    schedule = driver.core.scheduler.schedule
    driver.core.scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]  # type: ignore[method-assign, func-returns-value]
    following = [*prompt, *reader.tokens(), 8]
    last = ask(driver, following, greedy(3))
    assert [type(move) for move in plans[0].moves] == [Save, Load]
    assert (cached(last), last.tokens()) == (8, greedy_alone("hybrid", tuple(following), 3))


def assert_greedy(kind: str, prompt: list[int], tokens: tuple[int, ...]) -> None:
    """Each token is the likeliest after all before it, by one whole forward."""
    ids = torch.tensor([*prompt, *tokens])
    likeliest = logits_of(apart(kind), ids, [len(ids)]).argmax(-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == list(tokens)


@kinds
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    small=st.booleans(),
    fails=st.booleans(),
    overlap=st.sampled_from(["on", "off"]),
)
def test_any_traffic_that_begins_alike_is_alone(
    kind: str, seed: int, small: bool, fails: bool, overlap: str
) -> None:
    """Conversations that grow and branch, with cancels, forks, little memory and steps that fail."""
    chance = random.Random(seed)
    sizes = sizes_of(kind, slots=3, blocks=chance.randint(16, 24))
    most = chance.choice([8, 30]) * sizes.page_bytes * 3 if small else BYTES
    driver = Driver(
        kind,
        sizes=sizes,
        max_sequences=3,
        step_tokens=chance.randint(3, 16),
        overlap=overlap,
        swap_bytes=chance.choice([0, BYTES]),
        prefix_cache_bytes=most,
        min_gain=chance.randint(1, 6),
    )

    def check(*_: Any) -> None:
        if fails and chance.random() < 0.04:
            raise RuntimeError("injected")

    hook = driver.model.register_forward_pre_hook(check)
    texts = [prompt_of(12)]
    running: dict[int, tuple[list[int], Reader]] = {}
    try:
        for _ in range(80):
            if len(running) < 4 and chance.random() < 0.4:
                text = chance.choice(texts)
                own = [chance.randrange(VOCAB) for _ in range(chance.randint(0, 6))]
                prompt = [*text[: chance.choice([len(text), chance.randint(1, len(text))])], *own][:44]
                params = greedy(chance.randint(1, 9), n=chance.choice([1, 1, 1, 2]))
                number, reader = driver.add(prompt, params, priority=chance.randint(0, 1))
                running[number] = prompt, reader
            if running and chance.random() < 0.03:
                driver.core.abort(chance.choice(list(running)))
            if driver.core.has_work:
                driver.core.step()
            assert driver.core.scheduler.memory.kept.used * sizes.page_bytes <= most
            for number in [number for number in running if number not in driver.core._jobs]:
                prompt, reader = running.pop(number)
                for index, event in reader.events.items():
                    assert_greedy(kind, prompt, event.tokens)
                    texts.append([*prompt, *reader.tokens(index)])
        driver.core.abort_all()
        driver.run()
    finally:
        hook.remove()
    driver.assert_nothing_held()
    for saved in list(driver.core.scheduler.prefixes._nodes):
        driver.core.scheduler.prefixes.drop(saved)
    assert driver.core.scheduler.memory.kept.used == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2**17], ids=["in-parts", "at-once"])
def test_on_a_gpu_every_copy_is_there_in_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six conversations of four turns side by side in memory for three, put aside and kept, a step ahead."""
    monkeypatch.setattr("hrwkv.model.cache.STAGING_BYTES", rows)
    model = hybrid_model((2,), head_dim=32, eos_token_id=None, max_position_embeddings=256).cuda()
    sizes = fit_memory(model, EngineSettings(max_sequences=5, block_size=4, cache_bytes=2**20))
    driver = Driver(
        model=model,
        sizes=replace(sizes, slots=5, blocks=60),
        max_sequences=5,
        device="cuda",
        prefix_cache_bytes=2**21,
    )
    prompts = [random_ids(20 + seed, seed=seed).tolist() for seed in range(6)]
    for _ in range(4):
        readers = [driver.add(prompt, greedy(9))[1] for prompt in prompts]
        driver.run()
        for prompt, reader in zip(prompts, readers, strict=True):
            ids = torch.tensor([*prompt, *reader.tokens()], device="cuda")
            with torch.no_grad():
                batch = TokenBatch.from_lengths([len(ids)], device="cuda")
                likeliest = model.compute_logits(model(ids, batch)).argmax(-1)
            assert likeliest[len(prompt) - 1 : -1].tolist() == list(reader.tokens())
            prompt += [*reader.tokens(), 5, 6, 7]
    assert driver.core.totals.preempted > 0
    assert driver.core.totals.prompt_tokens_reused > 6 * 3 * 20
    driver.assert_nothing_held()
