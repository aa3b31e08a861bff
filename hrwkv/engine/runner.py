"""One step on the device: moves of memory, one forward over packed pieces, the next tokens.

``launch`` only hands work to the device and ``Step.read`` waits for it, so that the step after it can be
prepared meanwhile: a sequence's last token stays on the device, by its slot, where the next step finds it
before the host does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hrwkv.engine.decode_graphs import DecodeGraphs
from hrwkv.engine.grammar import allocate_mask
from hrwkv.engine.memory import MemorySizes
from hrwkv.engine.request import EngineError, GrammarError, TokenLogprob
from hrwkv.engine.sampling import (
    SamplingBatch,
    SequenceSampling,
    TokenCounts,
    TokenLogprobs,
    prompt_logprobs,
    sample,
)
from hrwkv.engine.scheduler import Clear, Copy, Load, Piece, Plan, Save, Sequence
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.cache import HostPages, HybridCache
from hrwkv.model.modeling import HybridModel

logger = logging.getLogger(__name__)
UNREAD = -1  # a token id that only the device knows yet
NOT_FINITE = -2  # instead of the token of a row whose logits are not finite


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of a prompt's tokens ``first``, ``first + 1``, ..."""

    sequence: Sequence
    first: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Sampled:
    """A sequence's next token; its log-probability if some member of the batch asked for any.

    failure: why there is none; the sequence cannot go on.
    """

    sequence: Sequence
    token: int
    logprob: TokenLogprob | None
    failure: EngineError | GrammarError | None


class Step:
    """What a launched step will say."""

    def __init__(self, plan: Plan, sampled: list[Sequence]) -> None:
        self.plan, self._sampled = plan, sampled
        self._tokens: Tensor | None = None
        self._logprobs: TokenLogprobs | None = None
        self._scored: list[tuple[Sequence, int, list[int], TokenLogprobs]] = []
        self._failures: dict[Sequence, GrammarError] = {}
        self._done: torch.cuda.Event | None = None

    def add_failure(self, sequence: Sequence, failure: GrammarError) -> None:
        """A sequence whose next token means nothing."""
        self._failures[sequence] = failure

    def set_tokens(self, tokens: Tensor, logprobs: TokenLogprobs | None) -> None:
        """Sampled tokens [N], or NOT_FINITE, and their log-probabilities, on the device."""
        self._tokens, self._logprobs = _to_host(tokens), _all_to_host(logprobs)

    def add_scores(self, sequence: Sequence, first: int, *, tokens: list[int], scores: TokenLogprobs) -> None:
        """Log-probabilities of a piece of a prompt, on the device."""
        scores_on_host = _all_to_host(scores)
        assert scores_on_host is not None
        self._scored.append((sequence, first, tokens, scores_on_host))

    def close(self, device: torch.device) -> None:
        """All work is handed over."""
        if device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> tuple[list[Sampled], list[Scored]]:
        """Wait for the device, and give tokens and log-probabilities. Raises what the device raises."""
        if self._done is not None:
            self._done.synchronize()
        scored = [
            Scored(sequence, first, tuple(_logprob_rows(scores, tokens)))
            for sequence, first, tokens, scores in self._scored
        ]
        if self._tokens is None:
            return [], scored
        tokens = self._tokens.tolist()
        logprobs: Rows[TokenLogprob | None] = [None] * len(tokens)
        if self._logprobs is not None:
            logprobs = _logprob_rows(self._logprobs, tokens)
        rows = zip(self._sampled, tokens, logprobs, strict=True)
        return [Sampled(*row, self._failure(row[0], token=row[1])) for row in rows], scored

    def _failure(self, sequence: Sequence, *, token: int) -> EngineError | GrammarError | None:
        if token == NOT_FINITE and sequence not in self._failures:
            place = len(sequence.tokens) - sequence.num_prompt
            return EngineError(
                f"the model's logits are not finite (NaN or infinity) at token {place} of the answer: "
                "its weights or this prompt make it overflow"
            )
        return self._failures.get(sequence)


class Runner:
    """A model with its cache; called by one thread."""

    def __init__(
        self,
        model: HybridModel,
        cache: HybridCache,
        pages: HostPages,
        *,
        sizes: MemorySizes,
        max_context: int,
    ) -> None:
        self.model, self._cache, self._pages, self._sizes = model, cache, pages, sizes
        self.device = model.lm_head.weight.device
        width = -(-max_context // sizes.block_size) if sizes.block_bytes else 1
        # The last row belongs to nobody: the padding of a CUDA graph reads and writes it.
        self._host_tables = np.zeros((sizes.slots + 1, width), dtype=np.int64)
        self._tables = torch.from_numpy(self._host_tables.copy()).to(self.device)
        self._last_tokens = torch.zeros(sizes.slots + 1, dtype=torch.int64, device=self.device)
        # A new list of blocks begins with each time that a sequence is seated.
        self._known: list[tuple[list[int] | None, int]] = [(None, 0)] * sizes.slots
        self._counted: list[list[int] | None] = [None] * sizes.slots
        vocab_size = model.config.vocab_size
        self._counts = TokenCounts(slots=sizes.slots, vocab_size=vocab_size, device=self.device)
        self._members: list[tuple[Sequence, int]] = []
        self._batch: SamplingBatch | None = None
        self.graphs: DecodeGraphs | None = None

    def use_graphs(self, *, now: bool) -> None:
        """Run decode steps as CUDA graphs, recorded now or when a size first comes, where the kernels can."""
        if not DecodeGraphs.fit(self.model):
            logger.warning("decode steps run without CUDA graphs: its kernels do not take this head size")
            return
        self.graphs = DecodeGraphs(
            self.model, self._cache, tables=self._tables, last_tokens=self._last_tokens
        )
        if now:
            self.graphs.record_all()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Step:
        """Hand one step to the device. Raises what the model raises; memory is then undefined."""
        for move in plan.moves:
            self._move(move)
        # Neighbours of one length attend in one call; the order of the slots seldom changes between steps.
        pieces = sorted(plan.pieces, key=lambda piece: (piece.count, piece.sequence.slot))
        drawn = [piece for piece in pieces if piece.samples]
        step = Step(plan, [piece.sequence for piece in drawn])
        if pieces:
            self._update_tables(pieces)
            logits = self._logits(pieces, step)
            if drawn:
                self._sample(logits, drawn, step)
        step.close(self.device)  # before the copies, for which nobody's token has to wait
        for save in plan.keeps.values():
            self._move(save)
        return step

    def recover(self) -> None:
        """After a failed step: give unused memory back. Raises if the device can do no more work."""
        self._members, self._batch = [], None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _move(self, move: Clear | Copy | Save | Load) -> None:
        match move:
            case Clear(slot):
                self._cache.clear_state(slot)
            case Copy(slot, to, blocks):
                self._cache.copy_sequence(slot, to, blocks=blocks)
            case Save(saved, slot, blocks):
                self._pages.save(slot, state=saved.state, blocks=blocks)
            case Load(saved, slot, blocks):
                self._pages.load(slot, state=saved.state, blocks=blocks)

    def _update_tables(self, pieces: list[Piece]) -> None:
        """Bring the block tables of sequences that have new blocks up to date, on the host and the device."""
        changed = []
        for sequence in (piece.sequence for piece in pieces):
            slot, blocks = sequence.slot, sequence.blocks
            assert slot is not None
            known, count = self._known[slot]
            if known is not blocks or count != len(blocks):
                self._host_tables[slot, : len(blocks)] = blocks
                self._known[slot] = (blocks, len(blocks))
                changed.append((slot, len(blocks)))
        if changed and (width := max(count for _, count in changed)):
            slots = np.array([slot for slot, _ in changed])
            rows = self._upload(self._host_tables[slots, :width])
            self._tables[:, :width].index_copy_(0, self._upload(slots), rows)

    def _logits(self, pieces: list[Piece], step: Step) -> Tensor:
        """The forward: logits [N, V] of the pieces that sample, in their order."""
        places = _places(pieces, self._host_tables, self._sizes)
        drawn = [n for n, piece in enumerate(pieces) if piece.samples]
        if self.graphs is not None and all(piece.count == 1 and not _num_scored(piece) for piece in pieces):
            logits = self.graphs.run(places)
            return logits if len(drawn) == len(pieces) else logits[self._upload(np.array(drawn))]
        lengths = tuple(piece.count for piece in pieces)
        ends = np.cumsum([0, *lengths])
        fields = [places.tokens, places.positions, places.slot_mapping, places.token_slots]
        fields += [places.slots, places.contexts, ends, ends[1:][drawn] - 1]
        uploaded = self._upload(np.concatenate(fields)).split([len(field) for field in fields])
        tokens, positions, slot_mapping, token_slots, slots, contexts, cu_seqlens, last = uploaded
        if UNREAD in places.tokens:
            tokens = torch.where(tokens == UNREAD, self._last_tokens[token_slots], tokens)
        width = max(len(piece.sequence.blocks) for piece in pieces)
        batch = TokenBatch(
            positions=positions,
            cu_seqlens=cu_seqlens.to(torch.int32),
            lengths=lengths,
            state_slots=slots,
            block_tables=self._tables[slots, :width],
            slot_mapping=slot_mapping,
            context_lens=contexts,
            contexts=tuple(places.contexts.tolist()),
        )
        hidden = self.model(tokens, batch, self._cache)
        self._score_prompts(pieces, hidden, step)
        return self.model.compute_logits(hidden[last])

    def _score_prompts(self, pieces: list[Piece], hidden: Tensor, step: Step) -> None:
        start = 0
        for piece in pieces:
            sequence, begin = piece.sequence, start
            start += piece.count
            count = _num_scored(piece)
            if not count or sequence.prompt_scores is None:
                continue
            after = sequence.tokens[piece.start + 1 : piece.start + 1 + count]
            scores = prompt_logprobs(
                hidden[begin : begin + count],
                self._upload(np.array(after)),
                compute_logits=self.model.compute_logits,
                top=sequence.prompt_scores,
            )
            step.add_scores(sequence, piece.start + 1, tokens=after, scores=scores)

    def _sample(self, logits: Tensor, drawn: list[Piece], step: Step) -> None:
        sequences = [piece.sequence for piece in drawn]
        slots = np.array([sequence.slot for sequence in sequences])
        for sequence, slot in zip(sequences, slots, strict=True):
            self._count_tokens(sequence, slot)
        members = list(zip(sequences, slots.tolist(), strict=True))
        if self._batch is None or members != self._members:
            self._members = members
            self._batch = SamplingBatch.build(
                [_at_slot(sequence, slot) for sequence, slot in members],
                vocab_size=logits.shape[1],
                device=self.device,
                counts=self._counts,
            )
        places = np.stack([slots, [piece.start + piece.count for piece in drawn]])
        device_slots, positions = self._upload(places)
        bitmask = self._bitmask(sequences, step, vocab_size=logits.shape[1])
        result = sample(logits, self._batch, positions=positions, bitmask=bitmask)
        self._last_tokens[device_slots] = result.tokens
        step.set_tokens(result.tokens.where(result.is_finite, NOT_FINITE), result.logprobs)

    def _count_tokens(self, sequence: Sequence, slot: int) -> None:
        """Fill the counts of a sequence with penalties that has just been seated: all its tokens are read."""
        assert sequence.sampling is not None
        if sequence.sampling.is_penalised and self._counted[slot] is not sequence.blocks:
            prompt = sequence.num_prompt
            self._counts.fill(slot, prompt=sequence.tokens[:prompt], generated=sequence.tokens[prompt:])
            self._counted[slot] = sequence.blocks

    def _bitmask(self, sequences: list[Sequence], step: Step, *, vocab_size: int) -> Tensor | None:
        """What grammars allow, [N, ceil(V / 32)] int32; one that becomes too complex fails its sequence."""
        if all(sequence.grammar is None for sequence in sequences):
            return None
        mask = allocate_mask(len(sequences), vocab_size)
        for row, sequence in enumerate(sequences):
            if sequence.grammar is not None and sequence.sampling is not None:
                generated = len(sequence.tokens) - sequence.num_prompt
                may_end = generated >= sequence.sampling.params.min_tokens
                try:
                    sequence.grammar.fill_mask(mask, row, may_end=may_end)
                except GrammarError as error:
                    step.add_failure(sequence, error)
        return self._upload(mask)

    def _upload(self, array: np.ndarray) -> Tensor:
        """A copy on the device for which the host does not wait."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Places:
    """A batch's indices on the host, int64: tokens, positions, slot_mapping and token_slots [T], slots and
    contexts [N]."""

    tokens: np.ndarray
    positions: np.ndarray
    slot_mapping: np.ndarray
    token_slots: np.ndarray
    slots: np.ndarray
    contexts: np.ndarray


def _places(pieces: list[Piece], tables: np.ndarray, sizes: MemorySizes) -> Places:
    """Where each token of the pieces comes from and goes to; ``UNREAD`` for ids not known yet."""
    tokens: list[int] = []
    for piece in pieces:
        known = piece.sequence.tokens[piece.start : piece.start + piece.count]
        tokens += known if len(known) == piece.count else [*known, UNREAD]
    counts = np.array([piece.count for piece in pieces])
    starts = np.array([piece.start for piece in pieces])
    slots = np.array([piece.sequence.slot for piece in pieces], dtype=np.int64)
    begins = np.cumsum(counts) - counts
    positions = np.arange(len(tokens)) + np.repeat(starts - begins, counts)
    token_slots = np.repeat(slots, counts)
    block, row = np.divmod(positions, sizes.block_size)
    if not sizes.block_bytes:
        block[:] = 0  # tables without content
    mapping = tables[token_slots, block] * sizes.block_size + row
    return Places(np.array(tokens, dtype=np.int64), positions, mapping, token_slots, slots, starts + counts)


def _num_scored(piece: Piece) -> int:
    """How many of its tokens are followed by one of a prompt whose log-probabilities are asked for."""
    sequence = piece.sequence
    if sequence.prompt_scores is None:
        return 0
    return max(min(piece.count, sequence.num_prompt - 1 - piece.start), 0)


def _at_slot(sequence: Sequence, slot: int) -> SequenceSampling:
    assert sequence.sampling is not None
    return replace(sequence.sampling, slot=slot)


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _all_to_host(scores: TokenLogprobs | None) -> TokenLogprobs | None:
    if scores is None:
        return None
    return TokenLogprobs(_to_host(scores.logprobs), _to_host(scores.top_ids), _to_host(scores.top_logprobs))


def _logprob_rows(scores: TokenLogprobs, tokens: Rows[int]) -> list[TokenLogprob]:
    rows = zip(
        tokens, scores.logprobs.tolist(), scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True
    )
    return [
        TokenLogprob(token, own, tuple(zip(ids, values, strict=True))) for token, own, ids, values in rows
    ]
