"""Distributions against plain Python in fp64, draws against chi-squared, and rows against their batch."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hrwkv.engine.request import Grammar, SamplingParams
from hrwkv.engine.sampling import (
    BLOCK,
    SamplingBatch,
    SequenceSampling,
    TokenCounts,
    adjust_logits,
    choice_seed,
    draw,
    kept_weights,
    prompt_logprobs,
    sample,
    token_logprobs,
)

V = 37
REGEX = Grammar("regex", "a*")


def member(
    seed: int = 0, *, prompt: int = 5, ends: tuple[int, ...] = (), slot: int = 0, **params: Any
) -> SequenceSampling:
    return SequenceSampling(SamplingParams(**params), seed, prompt, ends, slot)


def build(
    members: Sequence[SequenceSampling], *, vocab: int = V, counts: TokenCounts | None = None
) -> SamplingBatch:
    return SamplingBatch.build(members, vocab_size=vocab, device="cpu", counts=counts)


def logits_of(rows: int, vocab: int = V, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def mask_of(allowed: Sequence[set[int]], vocab: int = V) -> Tensor:
    words = [
        [sum(1 << t for t in range(32) if 32 * w + t in row) for w in range(-(-vocab // 32))]
        for row in allowed
    ]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def places(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def probabilities(
    logits: Tensor,
    members: Sequence[SequenceSampling],
    positions: Tensor,
    *,
    counts: TokenCounts | None = None,
    bitmask: Tensor | None = None,
) -> Tensor:
    """What ``sample`` draws from, by its own two steps."""
    batch = build(members, vocab=logits.shape[1], counts=counts)
    adjusted = adjust_logits(logits, batch, positions=positions, bitmask=bitmask)
    assert batch.filters is not None
    weights = kept_weights(
        (adjusted - adjusted.amax(-1, keepdim=True)) / batch.filters.temperature, batch.filters
    )
    return weights / weights.sum(-1, keepdim=True)


def reference(
    logits: list[float],
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    ends: Sequence[int] = (),
    allowed: set[int] | None = None,
) -> list[float]:
    """The definition, token by token. Discards cases whose edge is nearer than fp32 can tell."""
    times, row = Counter(generated), list(logits)
    for token in range(len(row)):
        row[token] += params.logit_bias.get(token, 0.0)
        banned = token in ends and len(generated) < params.min_tokens
        if banned or (allowed is not None and token not in allowed):
            row[token] = -math.inf
        if token in times or token in prompt:
            row[token] *= params.repetition_penalty if row[token] < 0 else 1 / params.repetition_penalty
        row[token] -= params.frequency_penalty * times[token] + params.presence_penalty * (token in times)
    peak = max(row)
    weights = [math.exp((value - peak) / params.temperature) for value in row]
    if params.min_p:
        assume(all(weight == 1 or abs(weight - params.min_p) > 1e-5 for weight in weights))
    order = sorted(range(len(row)), key=lambda token: -weights[token])
    kept = [token for token in order if weights[token] >= params.min_p][: params.top_k or None]
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        assume(params.top_p == 1 or abs(before - params.top_p * total) > 1e-5 * total)
        if params.top_p == 1 or before < params.top_p * total:
            nucleus.append(token)
        before += weights[token]
    # Equal logits at the edge stay together.
    kept_all = [token for token in order if weights[token] >= weights[nucleus[-1]]]
    total = sum(weights[token] for token in kept_all)
    return [weights[token] / total if token in kept_all else 0.0 for token in range(len(row))]


def tokens_of(size: int, *, least: int = 0) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, V - 1), min_size=least, max_size=size)


PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([1.0, 0.3, 0.7, 2.0]),
    "top_k": st.sampled_from([0, 1, 3, 10, V, V + 5]),
    "top_p": st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.99]),
    "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    "presence_penalty": st.sampled_from([0.0, 0.7, -1.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
    "logit_bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -2.0, 3.5]), max_size=4),
    "min_tokens": st.sampled_from([0, 2, 9]),
}
CASE = st.fixed_dictionaries(
    {
        "params": st.fixed_dictionaries({}, optional=PARAMS),
        "prompt": tokens_of(6, least=1),
        "generated": tokens_of(12),
        "ends": tokens_of(3),
        "allowed": st.none() | st.sets(st.integers(0, V - 1), min_size=8),
    }
)


@pytest.mark.parametrize("name", PARAMS)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), seed=st.integers(0, 99))
def test_each_parameter_alone_gives_the_exact_distribution(name: str, data: st.DataObject, seed: int) -> None:
    case = {
        "params": {name: data.draw(PARAMS[name])},
        "prompt": [1, 4, 4],
        "generated": [2, 4, 2, 2, 36],
        "ends": [7, 36],
        "allowed": None,
    }
    check_distributions([case], seed)


@settings(deadline=None, max_examples=80)
@given(cases=st.lists(CASE, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_all_parameters_together_give_the_exact_distribution(cases: list[dict[str, Any]], seed: int) -> None:
    check_distributions(cases, seed)


def check_distributions(cases: list[dict[str, Any]], seed: int) -> None:
    """Every row of a batch against the definition, for logits with some equal ones."""
    logits = (logits_of(len(cases), seed=seed) * 4).round() / 4
    counts = TokenCounts(slots=9, vocab_size=V, device="cpu")
    members, masks = [], []
    for row, case in enumerate(cases):
        allowed = case["allowed"]
        assume(allowed is None or not allowed <= set(case["ends"]))
        counts.fill(8 - row, prompt=case["prompt"], generated=case["generated"])
        members.append(
            member(prompt=len(case["prompt"]), ends=tuple(case["ends"]), slot=8 - row, **case["params"])
        )
        masks.append(set(range(V)) if allowed is None else allowed)
    lengths = places(*(len(case["prompt"]) + len(case["generated"]) for case in cases))
    bitmask = None if all(case["allowed"] is None for case in cases) else mask_of(masks)
    found = probabilities(logits, members, lengths, counts=counts, bitmask=bitmask)
    for row, case in enumerate(cases):
        given_row = {name: case[name] for name in ("prompt", "generated", "ends", "allowed")}
        expected = torch.tensor(reference(logits[row].tolist(), members[row].params, **given_row))
        # Below the smallest normal number a probability may be 0 or not.
        assert (found[row] > 1e-37).tolist() == (expected > 1e-37).tolist()
        # fp32: an exponent of up to about 100 has an error of 100 eps.
        torch.testing.assert_close(found[row], expected, rtol=3e-5, atol=1e-12)


def chi_squared(drawn: Tensor, expected: Tensor) -> float:
    """Statistic over its own 6-sigma bound; below 1 for draws from ``expected``, but for one in 10^8."""
    counts = drawn.bincount(minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    counts, mean = counts[expected > 0], expected[expected > 0].double() * len(drawn)
    freedom = len(mean) - 1
    statistic = float(((counts - mean) ** 2 / mean).sum())
    return statistic / (freedom + 6 * math.sqrt(2 * freedom) + 12)


@pytest.mark.parametrize(
    ("params", "vocab"),
    [
        ({}, V),
        ({"temperature": 0.5, "top_k": 9, "top_p": 0.9}, V),
        ({"min_p": 0.05, "repetition_penalty": 1.5, "frequency_penalty": 0.5}, V),
        ({}, 2 * BLOCK + 3),
    ],
    ids=["plain", "cold-top", "penalties", "blocks"],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_distribution(params: dict[str, Any], vocab: int, varied: str) -> None:
    rows = 10000
    logits = logits_of(1, vocab) / 3
    counts = TokenCounts(slots=1, vocab_size=vocab, device="cpu")
    counts.fill(0, prompt=[3, 5], generated=[5, 6, 6])
    expected = probabilities(logits, [member(**params)], places(10), counts=counts)[0]
    numbers = torch.arange(rows)
    still = torch.full((rows,), 7)
    seeds, positions = (numbers, still) if varied == "seed" else (still, numbers)
    drawn = draw(expected.expand(rows, -1), seeds=seeds, positions=positions)
    assert chi_squared(drawn, expected) < 1
    # The test has power: it finds a temperature that is off by a fifth.
    wrong = expected**1.2
    assert chi_squared(drawn, wrong / wrong.sum()) > 1


def test_successive_draws_are_independent() -> None:
    """Pairs of tokens of neighbouring positions and of neighbouring seeds fill their table evenly."""
    weights = torch.ones(1, 6).expand(7200, -1)
    seeds, positions = torch.arange(7200) % 72, torch.arange(7200) // 72
    table = draw(weights, seeds=seeds, positions=positions).view(100, 72)
    even = torch.full((36,), 1 / 36)
    for pairs in (table[::2] * 6 + table[1::2], table[:, ::2] * 6 + table[:, 1::2]):
        assert chi_squared(pairs.flatten(), even) < 1


MIXED = [
    member(seed=11, temperature=0.0),
    member(seed=-(2**63)),
    member(seed=2**63 - 1, top_k=4, temperature=1.7),
    member(seed=5, top_p=0.8),
    member(seed=5, min_p=0.1, logit_bias={3: 4.0}),
    member(seed=6, ends=(1, 2), min_tokens=30, temperature=4.0),
    member(seed=8, presence_penalty=1.0, slot=2),
    member(seed=9, repetition_penalty=1.8, temperature=0.0, slot=1, logprobs=3),
]


def run(members: Sequence[SequenceSampling], logits: Tensor, *, steps: int, vocab: int) -> list[list[int]]:
    """Tokens of each member over some steps, its logits depending on the step and itself only."""
    counts = TokenCounts(slots=3, vocab_size=vocab, device="cpu")
    for each in members:
        counts.fill(each.slot, prompt=[0, 1])
    batch = build(members, vocab=vocab, counts=counts)
    steps_of = [
        sample(logits.roll(step, -1), batch, positions=torch.full((len(members),), 5 + step)).tokens.tolist()
        for step in range(steps)
    ]
    return [list(tokens) for tokens in zip(*steps_of, strict=True)]


@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(range(len(MIXED))),
    size=st.integers(1, len(MIXED)),
    vocab=st.sampled_from([V, 2 * BLOCK]),
)
def test_a_member_draws_the_same_in_any_batch_and_row(order: list[int], size: int, vocab: int) -> None:
    logits = logits_of(len(MIXED), vocab)
    together = run([MIXED[i] for i in order[:size]], logits[order[:size]], steps=6, vocab=vocab)
    alone = [run([MIXED[i]], logits[i : i + 1], steps=6, vocab=vocab)[0] for i in order[:size]]
    assert together == alone


def test_a_greedy_row_is_the_argmax_and_the_first_of_equals() -> None:
    logits = logits_of(2)
    logits[0, [30, 4, 11]] = 50.0
    greedy = build([member(temperature=0.0), member(temperature=0.0, top_k=2, top_p=0.1)])
    beside = build([member(temperature=0.0), member(temperature=1.0)])
    assert greedy.filters is None
    assert sample(logits, greedy, positions=places(5, 5)).tokens.tolist() == [4, int(logits[1].argmax())]
    assert sample(logits, beside, positions=places(5, 5)).tokens[0] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_narrow_logits_are_sampled_as_the_same_in_fp32(dtype: torch.dtype, masked: bool) -> None:
    """Bit by bit, for batches of one kind of member and for all kinds at once; bf16 has many equal logits."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0, "logprobs": 3},
        {"logit_bias": {3: 0.3, 5: -0.1}, "presence_penalty": 0.3, "repetition_penalty": 1.1},
    ]
    logits = logits_of(len(kinds), seed=2).to(dtype)
    bitmask = mask_of([set(range(1, V, 2))] * len(kinds)) if masked else None
    for chosen in ([0], [1], [2], [3], [0, 1, 2, 3]):
        members = [member(seed=9 + row, slot=row, **kinds[row]) for row in chosen]
        found = []
        for rows in (logits[chosen], logits[chosen].float()):
            counts = TokenCounts(slots=len(kinds), vocab_size=V, device="cpu")
            result = sample(
                rows,
                build(members, counts=counts),
                positions=torch.arange(7, 7 + len(chosen)),
                bitmask=None if bitmask is None else bitmask[chosen],
            )
            scores = result.logprobs
            found.append((result.tokens, *(() if scores is None else vars(scores).values())))
        for narrow, wide in zip(*found, strict=True):
            assert narrow.dtype == wide.dtype
            assert torch.equal(narrow, wide)


@pytest.mark.parametrize("temperature", [1e-30, 5e-324], ids=["tiny", "smallest"])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    logits = logits_of(1)
    for filters in ({}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}):
        result = sample(logits, build([member(temperature=temperature, **filters)]), positions=places(5))
        assert result.tokens.item() == logits.argmax()


def test_the_smallest_top_p_keeps_the_likeliest() -> None:
    """fp32 rounds it to 0, which kept none, and the step failed."""
    logits = logits_of(1)
    result = sample(logits, build([member(top_p=5e-324)]), positions=places(5))
    assert result.tokens.item() == logits.argmax()


def test_rows_that_are_not_finite_are_told_apart() -> None:
    logits = logits_of(5)
    logits[1, 7], logits[2, 7], logits[3], logits[4, 7] = math.nan, math.inf, -math.inf, -math.inf
    for params in ({"temperature": 0.0}, {"top_p": 0.9, "min_p": 0.1}, {"top_k": 3, "logprobs": 2}):
        result = sample(logits, build([member(**params)] * 5), positions=places(*range(5)))
        assert result.is_finite.tolist() == [True, False, False, False, True]
        assert all(0 <= token < V for token in result.tokens.tolist())


def test_a_seed_is_not_another_and_a_choice_has_its_own() -> None:
    def tokens(seed: int) -> list[int]:
        return run([member(seed=seed, temperature=5.0)], logits_of(1), steps=30, vocab=V)[0]

    params = SamplingParams(seed=2**63 - 1, n=3)
    seeds = [choice_seed(params, index) for index in range(3)]
    assert seeds[0] == params.seed
    assert seeds == [choice_seed(params, index) for index in range(3)]
    assert len({tuple(tokens(seed)) for seed in (1, 2, -1, *seeds)}) == 6
    assert choice_seed(SamplingParams(), 0) != choice_seed(SamplingParams(), 0)


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, V)
    logits[0, [8, 9]] = 90.0
    batch = build([member(temperature=0.0, ends=(9, 8, 9), min_tokens=3, prompt=5)])
    drawn = [int(sample(logits, batch, positions=places(at)).tokens) for at in range(5, 10)]
    assert drawn == [0, 0, 0, 8, 8]
    with_grammar = build([member(temperature=0.0, ends=(8, 9), min_tokens=3, grammar=REGEX)])
    assert with_grammar.bans is None


def test_penalties_count_what_was_drawn_and_a_refilled_slot_starts_anew() -> None:
    """With a large frequency penalty the even logits give every token once before any comes twice."""
    counts = TokenCounts(slots=2, vocab_size=V, device="cpu")
    counts.fill(1, prompt=[3])
    penalised = member(temperature=0.0, frequency_penalty=2.0, slot=1)
    batch = build([member(seed=1), penalised], counts=counts)
    logits = torch.linspace(0, 1, V).repeat(2, 1)
    drawn = [int(sample(logits, batch, positions=places(5, 5)).tokens[1]) for _ in range(V)]
    assert sorted(drawn) == list(range(V))
    counts.fill(1, prompt=[3], generated=drawn[:4])
    assert [int(sample(logits, batch, positions=places(5, 5)).tokens[1]) for _ in range(V - 4)] == drawn[4:]
    assert not counts.table[0].any()


def test_a_token_count_stops_at_its_largest() -> None:
    counts = TokenCounts(slots=1, vocab_size=4, device="cpu")
    counts.fill(0, prompt=[2], generated=[2] * 16384 + [1])
    before = counts.table.clone()
    counts.add(places(0), places(2))
    assert torch.equal(counts.table, before)
    assert counts.table.tolist() == [[0, 2, 2 * 16383 + 1, 0]]
    assert counts.size == counts.table.numel() * counts.table.element_size()


def test_raw_logits_stay_and_their_log_probabilities_are_reported() -> None:
    logits = logits_of(3)
    before = logits.clone()
    members = [
        member(temperature=0.0, logit_bias={7: 100.0}, logprobs=2),
        member(top_k=1),
        member(logprobs=5, min_tokens=1, ends=(1,)),
    ]
    result = sample(logits, build(members), positions=places(5, 5, 5))
    assert torch.equal(logits, before)
    assert result.tokens[0] == 7
    assert result.logprobs is not None
    exact = before.double().log_softmax(-1)
    # fp32 sums of 37 terms.
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(
        result.logprobs.logprobs, exact.gather(1, result.tokens[:, None])[:, 0], **close
    )
    values, ids = exact.topk(5)
    torch.testing.assert_close(result.logprobs.top_logprobs, values, **close)
    assert torch.equal(result.logprobs.top_ids, ids)
    assert sample(logits, build([member()] * 3), positions=places(5, 5, 5)).logprobs is None


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prompt_log_probabilities_do_not_depend_on_the_chunk(chunk: int) -> None:
    hidden, head = logits_of(11, 8), logits_of(V, 8, seed=1)
    tokens = torch.arange(11) * 3
    found = prompt_logprobs(hidden, tokens, compute_logits=lambda rows: rows @ head.T, top=2, chunk=chunk)
    expected = token_logprobs(hidden @ head.T, tokens, top=2)
    torch.testing.assert_close(found.logprobs, expected.logprobs)
    torch.testing.assert_close(found.top_logprobs, expected.top_logprobs)
    assert torch.equal(found.top_ids, expected.top_ids)


def test_what_no_member_uses_is_not_built() -> None:
    plain = build([member()])
    assert (plain.bias, plain.bans, plain.penalties, plain.logprobs) == (None, None, None, None)
    assert plain.filters is not None
    assert (plain.filters.width, plain.filters.top_p, plain.filters.greedy) == (0, None, None)
    logits = logits_of(1)
    assert adjust_logits(logits, plain, positions=places(5)) is logits
    widths = [
        [member(top_k=4, top_p=0.5), member()],
        [member(top_k=4), member(top_p=0.5)],
        [member(temperature=0.0, top_p=0.5), member()],
    ]
    assert [build(members).filters.width for members in widths] == [4, V, 0]
    assert build(
        [member(frequency_penalty=1.0)], counts=TokenCounts(slots=1, vocab_size=V, device="cpu")
    ).penalties
