"""Tokens from logits: filters, penalties, seeded draws; a whole batch at once, without a host sync.

A draw depends on the seed, the position and the row's own logits, never on the batch: its noise is a hash of
(seed, position, token), a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"). The token is the argmax of log p + Gumbel noise (Gumbel 1954), drawn in two exact steps, first a
block of the vocabulary and then a token in it, so that noise is needed for some hundred places and not for
all of the vocabulary.

What no member of a batch uses costs nothing: ``SamplingBatch`` decides that on the host, and logits are
widened to fp32 only for what computes with them; the likeliest token is the same without. min_p, top_k and
top_p are one floor under the logits; tokens with the same logit as the last one kept stay, so the outcome
does not depend on how a sort breaks ties.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrwkv.engine.request import SamplingParams
from hrwkv.kernels.sampling import kept_edge

# Tokens of a block in a draw; about the square root of a vocabulary, so that both steps are small.
BLOCK = 512
TINY = torch.finfo(torch.float32).tiny
# SplitMix64 (Steele, Lea, Flood 2014): its increment and its finaliser, as signed 64-bit numbers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class SequenceSampling:
    """One sequence's part in a batch.

    seed: 64 bits, of this choice (``choice_seed``). prompt_length: tokens before its first new one.
    end_ids: tokens that may not come before ``params.min_tokens``. slot: its row in ``TokenCounts``, which
    only a sequence with penalties needs.
    """

    params: SamplingParams
    seed: int
    prompt_length: int
    end_ids: tuple[int, ...] = ()
    slot: int = 0

    @property
    def is_penalised(self) -> bool:
        """True if its tokens have to be counted."""
        params = self.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def choice_seed(params: SamplingParams, index: int) -> int:
    """The seed of a request's choice ``index``: from its own seed, or a fresh one."""
    if params.seed is None:
        return secrets.randbits(63)
    return int(_mix(_mix(torch.tensor(params.seed)) ^ index)) if index else params.seed


class TokenCounts:
    """How often each slot's sequence has each token, on the device: [slots, V] int16, 2 bytes a place.

    A place holds twice the number of times that the token was generated, at most 16,383 of them, and one more
    if the prompt has it. The table comes with the first sequence that has a penalty and stays: 51 MB for 256
    slots and 100,352 tokens (``size`` bytes).
    """

    def __init__(self, *, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.shape, self._device = (slots, vocab_size), device
        self._table: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of the table once it is there."""
        return math.prod(self.shape) * torch.int16.itemsize

    @property
    def table(self) -> Tensor:
        """[slots, V] int16."""
        if self._table is None:
            self._table = torch.zeros(self.shape, dtype=torch.int16, device=self._device)
        return self._table

    def fill(self, slot: int, *, prompt: Sequence[int], generated: Sequence[int] = ()) -> None:
        """Give a slot to a sequence that comes, or comes back, with these tokens."""
        row = (
            torch.tensor(generated, dtype=torch.int64).bincount(minlength=self.shape[1]).clamp_(max=16383) * 2
        )
        row[list(set(prompt))] += 1
        self.table[slot] = _to_device(row.to(torch.int16), self._device)

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """Count one more token in each of these slots, [P] int64 both; no slot twice."""
        now = self.table[slots, tokens]
        self.table[slots, tokens] = torch.where(now < 2 * 16383, now + 2, now)


@dataclass(frozen=True)
class _Places:
    """Single logits: rows [P], tokens [P], values [P]."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Penalties:
    """Members with penalties: rows and slots [P], the three penalties [P, 1], and the counts of tokens."""

    rows: Tensor
    slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    counts: TokenCounts


@dataclass(frozen=True)
class Filters:
    """What members that draw need, None where none needs it.

    temperature: [N, 1], 1 in greedy rows. greedy: [N] bool. log_min_p: [N, 1], -inf where off. top_k:
    [N, 1] int64, V where off. top_p: [N, 1], 2 where off. width: columns that a sort for the latter two
    needs: 0 for none, and V only if some member has top_p without top_k.
    """

    temperature: Tensor
    greedy: Tensor | None
    log_min_p: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    width: int


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of N sequences on the device, rebuilt only when the members change.

    seeds: [N] int64. filters: None if every member is greedy. logprobs: the most alternatives that a member
    asked for, None if none asked.
    """

    seeds: Tensor
    filters: Filters | None
    bias: _Places | None
    bans: _Places | None
    penalties: _Penalties | None
    logprobs: int | None

    @classmethod
    def build(
        cls,
        members: Sequence[SequenceSampling],
        *,
        vocab_size: int,
        device: torch.device | str,
        counts: TokenCounts | None = None,
    ) -> SamplingBatch:
        """Tensors for these members in this order. ``counts`` is needed if one ``is_penalised``.

        A member with a grammar bans its end tokens in its mask (``GrammarState.fill_mask``), not here.
        """
        params = [member.params for member in members]
        asked = [each.logprobs for each in params if each.logprobs is not None]
        bias = [(row, *place) for row, each in enumerate(params) for place in each.logit_bias.items()]
        bans = [
            (row, token, member.prompt_length + member.params.min_tokens)
            for row, member in enumerate(members)
            if member.params.min_tokens and member.params.grammar is None
            for token in sorted(set(member.end_ids))
        ]
        return cls(
            seeds=_tensor([member.seed for member in members], torch.int64, device),
            filters=_filters(params, vocab_size=vocab_size, device=device),
            bias=_places(bias, torch.float32, device),
            bans=_places(bans, torch.int64, device),
            penalties=_penalties(members, counts, device),
            logprobs=max(asked, default=None),
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of raw logits: logprobs [N] fp32 of given tokens, top_ids and top_logprobs [N, k]."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class SampleResult:
    """tokens: [N] int64. logprobs: if a member asked, with the most alternatives that any asked for.

    is_finite: [N] bool, False where the largest logit is no number or infinite: such a row's token means
    nothing.
    """

    tokens: Tensor
    is_finite: Tensor
    logprobs: TokenLogprobs | None


def sample(
    logits: Tensor, batch: SamplingBatch, *, positions: Tensor, bitmask: Tensor | None = None
) -> SampleResult:
    """logits [N, V] any float dtype, left as they are -> the next token of each row, counted for penalties.

    positions: [N] int64, the place in its sequence that each new token will have (the first new one has
    ``prompt_length``). bitmask: [N, ceil(V / 32)] int32, bit t of a row allows token t; all ones where no
    grammar speaks. In a greedy row equal logits give the lowest id.
    """
    adjusted = adjust_logits(logits, batch, positions=positions, bitmask=bitmask)
    peak, likeliest = adjusted.max(-1, keepdim=True)
    tokens = likeliest.squeeze(-1)
    if (filters := batch.filters) is not None:
        # The peak goes first: a temperature next to 0 then gives -inf and 0, never NaN.
        weights = kept_weights((adjusted.float() - peak) / filters.temperature, filters)
        drawn = draw(weights, seeds=batch.seeds, positions=positions)
        tokens = drawn if filters.greedy is None else torch.where(filters.greedy, tokens, drawn)
    if batch.penalties is not None:
        batch.penalties.counts.add(batch.penalties.slots, tokens[batch.penalties.rows])
    wanted = batch.logprobs
    scores = None if wanted is None else token_logprobs(logits, tokens, top=wanted)
    # A maximum is NaN if any logit is, so this costs no pass over the vocabulary.
    return SampleResult(tokens, peak.squeeze(-1).abs() < math.inf, scores)


def adjust_logits(
    logits: Tensor, batch: SamplingBatch, *, positions: Tensor, bitmask: Tensor | None = None
) -> Tensor:
    """logits [N, V] with bias, bans, grammar and penalties, in this order; a copy in fp32 if there is any."""
    if batch.bias is None and batch.bans is None and batch.penalties is None and bitmask is None:
        return logits
    logits = logits.to(torch.float32, copy=True)
    if batch.bias is not None:
        logits.index_put_((batch.bias.rows, batch.bias.tokens), batch.bias.values, accumulate=True)
    if batch.bans is not None:
        early = positions[batch.bans.rows] < batch.bans.values
        ban = torch.zeros_like(early, dtype=logits.dtype).masked_fill_(early, -math.inf)
        logits.index_put_((batch.bans.rows, batch.bans.tokens), ban, accumulate=True)
    if bitmask is not None:
        bits = bitmask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=bitmask.device)
        logits.masked_fill_((bits & 1).flatten(1)[:, : logits.shape[1]] == 0, -math.inf)
    if batch.penalties is not None:
        rows = batch.penalties.rows
        logits[rows] = _penalise(logits[rows], batch.penalties)
    return logits


def kept_weights(scaled: Tensor, filters: Filters) -> Tensor:
    """scaled [N, V]: logits over temperature, the largest 0 -> exp, or 0 for what a filter leaves out."""
    weights = scaled.exp()
    floor = filters.log_min_p
    if filters.width:
        assert filters.top_k is not None
        edge = kept_edge(
            scaled,
            top_k=filters.top_k,
            top_p=filters.top_p,
            log_min_p=filters.log_min_p,
            width=filters.width,
        )
        floor = edge if floor is None else floor.maximum(edge)
    return weights if floor is None else weights.masked_fill_(scaled < floor, 0.0)


def draw(weights: Tensor, *, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token for each row of weights [N, V] (none negative, not all 0) in their proportion -> [N] int64.

    seeds, positions: [N] int64. The same row, seed and position give the same token in any batch.
    """
    keys = _mix(_mix(seeds) ^ positions).unsqueeze(-1)
    blocks = nn.functional.pad(weights, (0, -weights.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    numbers = torch.arange(blocks.shape[1], device=weights.device)
    # Negative counters, so that a block shares its noise with no token.
    block = (blocks.sum(-1).double().log() + _gumbel(keys, -1 - numbers)).argmax(-1, keepdim=True)  # [N, 1]
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)  # [N, BLOCK]
    tokens = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    best = (inside.double().log() + _gumbel(keys, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(-1, best).squeeze(-1)


def token_logprobs(logits: Tensor, tokens: Tensor, *, top: int) -> TokenLogprobs:
    """Log-probabilities of tokens [N] under logits [N, V], and the ``top`` likeliest, sorted; fp32."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(min(top, logits.shape[1]), dim=-1)
    return TokenLogprobs((logits.gather(-1, tokens.unsqueeze(-1)) - total).squeeze(-1), ids, values - total)


def prompt_logprobs(
    hidden: Tensor,
    tokens: Tensor,
    *,
    compute_logits: Callable[[Tensor], Tensor],
    top: int,
    chunk: int = 256,
) -> TokenLogprobs:
    """Log-probabilities of a prompt: hidden [T, D] of its tokens, and the token [T] that follows each.

    ``chunk`` rows of logits are in memory at a time.
    """
    parts = [
        token_logprobs(compute_logits(rows), after, top=top)
        for rows, after in zip(hidden.split(chunk), tokens.split(chunk), strict=True)
    ]
    return TokenLogprobs(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.top_ids for part in parts]),
        torch.cat([part.top_logprobs for part in parts]),
    )


def _penalise(logits: Tensor, penalties: _Penalties) -> Tensor:
    """logits [P, V] of the members with penalties, with theirs."""
    seen = penalties.counts.table[penalties.slots]  # [P, V] int16
    generated = seen >> 1
    factor = torch.where(logits > 0, 1 / penalties.repetition, penalties.repetition)
    logits = torch.where(seen > 0, logits * factor, logits)
    return logits - penalties.frequency * generated - penalties.presence * (generated > 0)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser over int64 numbers, which wrap."""
    bits = bits + GOLDEN
    for shift, factor in MIX:
        bits = (bits ^ _shift(bits, shift)) * factor
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift to the right that brings in zeros; torch's own brings in the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _gumbel(keys: Tensor, counters: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64 for keys [N, 1] and counters [N or 1, M]."""
    # 52 bits and a half are exact in fp64 and neither 0 nor 1.
    uniform = (_shift(_mix(keys + counters * GOLDEN), 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()


def _filters(
    params: Sequence[SamplingParams], *, vocab_size: int, device: torch.device | str
) -> Filters | None:
    """Tensors for what some member uses; None if all are greedy."""
    greedy = [each.temperature == 0 for each in params]
    if all(greedy):
        return None
    drawn = [each for each in params if each.temperature]
    limits = [each.top_k or vocab_size for each in params]
    asked = [min(each.top_k or vocab_size, vocab_size) for each in drawn if each.top_k or each.top_p < 1]

    min_p = [math.log(each.min_p) if each.min_p else -math.inf for each in params]
    top_p = [each.top_p if each.top_p < 1 else 2.0 for each in params]
    return Filters(
        # fp32 would round the smallest to 0, and 0 / 0 is NaN.
        temperature=_column([max(each.temperature or 1.0, TINY) for each in params], torch.float32, device),
        greedy=_tensor(greedy, torch.bool, device) if any(greedy) else None,
        log_min_p=_column(min_p, torch.float32, device) if any(each.min_p for each in drawn) else None,
        top_k=_column(limits, torch.int64, device) if asked else None,
        top_p=_column(top_p, torch.float32, device) if any(each.top_p < 1 for each in drawn) else None,
        width=max(asked, default=0),
    )


def _places(
    entries: Sequence[tuple[int, int, float]], dtype: torch.dtype, device: torch.device | str
) -> _Places | None:
    """(row, token, value) triples as tensors."""
    if not entries:
        return None
    rows, tokens, values = zip(*entries, strict=True)
    places = _tensor([rows, tokens], torch.int64, device)
    return _Places(places[0], places[1], _tensor(values, dtype, device))


def _penalties(
    members: Sequence[SequenceSampling], counts: TokenCounts | None, device: torch.device | str
) -> _Penalties | None:
    """The penalties of those members that have any."""
    found = [(row, member.slot, member.params) for row, member in enumerate(members) if member.is_penalised]
    if not found:
        return None
    assert counts is not None, "a member has penalties: give the counts of tokens"
    places = _tensor([[row, slot] for row, slot, _ in found], torch.int64, device)
    values = _tensor(
        [[each.repetition_penalty, each.presence_penalty, each.frequency_penalty] for *_, each in found],
        torch.float32,
        device,
    )
    repetition, presence, frequency = values.split(1, dim=1)
    return _Penalties(places[:, 0], places[:, 1], repetition, presence, frequency, counts)


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return _tensor(values, dtype, device).unsqueeze(-1)


def _tensor(values: object, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return _to_device(torch.tensor(values, dtype=dtype), device)


def _to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device for which the host does not wait."""
    if torch.device(device).type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)
