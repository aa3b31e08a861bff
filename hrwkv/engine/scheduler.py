"""Which sequences run in the next step, with how many tokens and in which memory: policy, without tensors.

New ones come in while a slot, and blocks for all that they already hold, are free; one of a higher priority
puts others aside for that. Then everybody continues, best first: each its next token, prompts with the rest
of the token budget. Who finds no KV block takes those of the worst, which is put aside: its memory copied to
the host, or computed again. Best is the lowest priority number, then the earliest. Who comes in with nothing
computed starts from the longest kept prefix of its tokens, if there is one; prompts and answers are kept at
their ends. Left out: reordering the line by length.

Sequences are decided about before their last token is known (``in_flight``): only its place counts here.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass, field

from hrwkv.engine.grammar import GrammarState
from hrwkv.engine.memory import Memory, Saved
from hrwkv.engine.prefixes import Prefixes
from hrwkv.engine.sampling import SequenceSampling


@dataclass(eq=False)
class Sequence:
    """One answer in the making.

    key: priority, arrival, choice; the best is the lowest. tokens: prompt and answer as far as the host knows
    it. limit: tokens at which it ends. grammar: what it must match; its next step depends on the text so far,
    so it waits until that is read. sampling: how its tokens are drawn. prompt_scores: prompt_logprobs of its
    request, if this is the answer that collects them. siblings: answers to the same prompt that start from
    this one's memory, once the prompt but for its last token is computed. num_computed: tokens whose keys and
    states are stored. in_flight: sampled tokens that are not read yet. fork: where it leaves what others have
    read, so that it is kept up to there.
    """

    key: tuple[int, int, int]
    tokens: list[int]
    limit: int
    grammar: GrammarState | None = None
    sampling: SequenceSampling | None = None
    prompt_scores: int | None = None
    siblings: list[Sequence] = field(default_factory=list)
    num_prompt: int = field(init=False)
    num_computed: int = 0
    in_flight: int = 0
    fork: int | None = None
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    saved: Saved | None = None
    is_finished: bool = False

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens it has, those included that are sampled and not yet read."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that a forward has to read before the next one can be sampled, or siblings can start."""
        return (self.prompt_end if self.siblings else self.length) - self.num_computed

    @property
    def prompt_end(self) -> int:
        """Tokens of the prompt that are computed before it has a first token or siblings."""
        return self.num_prompt - bool(self.siblings)

    @property
    def is_ready(self) -> bool:
        """True if a step could continue it now."""
        return self.length < self.limit and not (self.grammar is not None and self.in_flight)


@dataclass(frozen=True)
class Clear:
    """Give a slot the empty state."""

    slot: int


@dataclass(frozen=True)
class Copy:
    """Copy a state from slot to slot, and blocks in pairs of old and new."""

    slot: int
    to: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Save:
    """Copy a slot, and blocks in pairs of block and page, to the host."""

    saved: Saved
    slot: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Load:
    """Copy them back."""

    saved: Saved
    slot: int
    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``start + count`` of a sequence; samples: the next token is then drawn."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass
class Plan:
    """One step: moves of memory in their order, the pieces of one forward, then the prefixes to keep."""

    moves: list[Clear | Copy | Save | Load] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    keeps: dict[Sequence, Save] = field(default_factory=dict)
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return sum(piece.count for piece in self.pieces)

    def add(self, sequence: Sequence, count: int) -> None:
        """Let a sequence read its next ``count`` tokens."""
        start = sequence.num_computed
        samples = not sequence.siblings and start + count == sequence.length
        self.pieces.append(Piece(sequence, start, count, samples))
        sequence.num_computed += count
        sequence.in_flight += samples


class Scheduler:
    """The waiting line, the running sequences, and the memory that they hold.

    suspects: sequences of a step that failed, until each has got one token further. leaving: what the next
    step copies first, of answers that have ended.
    """

    def __init__(self, memory: Memory, prefixes: Prefixes, *, step_tokens: int) -> None:
        self.memory, self.prefixes, self.step_tokens = memory, prefixes, step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.suspects: list[Sequence] = []
        self.leaving: list[Save] = []

    def add(self, sequence: Sequence) -> None:
        """Into the line, behind its betters."""
        insort(self.waiting, sequence, key=lambda other: other.key)

    def schedule(self) -> Plan:
        """Decide on one step. After a failure the suspects run alone, one after the other, until cleared."""
        plan = Plan([*self.leaving])
        self.leaving.clear()
        suspect = self.suspects[0] if self.suspects else None
        for sequence in self.running.copy():
            if sequence.siblings and not sequence.remaining:
                self._fork(sequence, plan)
        self._admit(plan, suspect)
        self._continue(plan, [suspect] if suspect else self.running)
        return plan

    def append(self, sequence: Sequence, token: int) -> None:
        """A sampled token was read; a suspect that got so far is none any more."""
        if sequence in self.suspects:
            self.suspects.remove(sequence)
        sequence.tokens.append(token)
        sequence.in_flight -= 1

    def finish(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Take a sequence out, wherever it is, and free what it holds; keep: as a prefix, if it has run."""
        sequence.is_finished = True
        if keep and sequence.slot is not None and (save := self._keep(sequence)) is not None:
            self.leaving.append(save)
        self._leave(sequence)

    def confirm(self, plan: Plan, *, failed: Collection[Sequence]) -> None:
        """A step was read: what it has copied can be trusted, but of those that failed in it."""
        for move in [*plan.moves, *plan.keeps.values()]:
            if isinstance(move, Save):
                move.saved.is_certain = True
        for sequence in failed:
            if sequence in plan.keeps:
                self.prefixes.drop(plan.keeps[sequence].saved)

    def drop_uncertain(self) -> None:
        """A step failed: forget the prefixes that it may have left half-written."""
        self.prefixes.drop_uncertain()
        self.leaving.clear()

    def doubtful(self) -> list[Sequence]:
        """Those whose memory, or copy of it, a failed step may have left half-written."""
        unsaved = [one for one in self.waiting if one.saved is not None and not one.saved.is_certain]
        unread = [one for one in self.waiting if one.in_flight]
        return [*self.running, *dict.fromkeys([*unsaved, *unread])]

    def restart(self, sequence: Sequence) -> None:
        """A step with it failed: back into the line as a suspect, with nothing computed or in flight."""
        self._leave(sequence)
        sequence.num_computed = sequence.in_flight = 0
        self.suspects.append(sequence)
        self.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        line = self.waiting if sequence.slot is None else self.running
        if sequence in line:  # siblings that have not started are in none
            line.remove(sequence)
        if sequence in self.suspects:
            self.suspects.remove(sequence)
        self._free(sequence)
        self._drop_saved(sequence)

    def _continue(self, plan: Plan, sequences: list[Sequence]) -> None:
        ready = [one for one in sequences if one.slot is not None and one.is_ready]
        ready.sort(key=lambda one: one.key)
        budget = self.step_tokens - sum(one.remaining == 1 for one in ready)
        for sequence in ready:
            if sequence.slot is None:  # it made room for a better one
                continue
            count = min(sequence.remaining, budget)
            if sequence.remaining == 1:
                count = 1  # its place is reserved
            if sequence.fork is not None and sequence.num_computed < sequence.fork:
                count = min(count, sequence.fork - sequence.num_computed)
            if count and self._grow(sequence, plan):
                budget -= count if sequence.remaining > 1 else 0
                plan.add(sequence, count)
                if sequence.num_computed in (sequence.fork, sequence.prompt_end):
                    self._keep_in(plan, sequence)

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Give it a block for its next token, at the cost of the worst; False if it is the worst itself.

        The worst is never in the plan already: that is filled from the best on.
        """
        pool = self.memory.blocks
        need = self.memory.blocks_for(sequence.length) - len(sequence.blocks)
        while need > pool.free:
            worst = max(self.running, key=lambda one: one.key)
            self._preempt(worst, plan)
            if worst is sequence:
                return False
        sequence.blocks += pool.take(max(need, 0))
        return True

    def _admit(self, plan: Plan, suspect: Sequence | None) -> None:
        """Bring in the best of the line while their betters leave tokens of this step and memory has room."""
        while self.waiting:
            sequence = suspect or self.waiting[0]
            ahead = [one.remaining for one in self.running if one.is_ready and one.key < sequence.key]
            if sum(ahead) >= self.step_tokens:
                return
            # What is in flight has no place to be read from once its sequence was put aside.
            if sequence.slot is not None or sequence.in_flight or not self._make_room(sequence, plan):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._seat(sequence, plan)

    def _make_room(self, sequence: Sequence, plan: Plan) -> bool:
        """True if it fits, after putting aside those of a lower priority if that is what it takes."""
        memory, kept = self.memory, sorted(self.running, key=lambda one: one.key)
        slots, blocks = memory.slots.free, memory.blocks.free
        victims = []
        while not (slots and blocks >= memory.blocks_for(sequence.length) + self._about_to_take(kept)):
            # A suspect runs alone, so nobody else would ever make room.
            if not kept or not (sequence in self.suspects or kept[-1].key[0] > sequence.key[0]):
                return False
            victims.append(kept.pop())
            slots, blocks = slots + 1, blocks + memory.blocks.num_unshared(victims[-1].blocks)
            if not kept:
                blocks = memory.blocks.total  # those too that victims shared with one another
        for worst in victims:
            self._preempt(worst, plan)
        return True

    def _about_to_take(self, sequences: list[Sequence]) -> int:
        """Blocks that these need in this step: a newcomer without them would be put aside at once."""
        need = self.memory.blocks_for
        return sum(max(need(one.length) - len(one.blocks), 0) for one in sequences if one.is_ready)

    def _seat(self, sequence: Sequence, plan: Plan) -> None:
        """Give it a slot, blocks for all that it has, and what was saved of it."""
        memory, length = self.memory, sequence.length
        (sequence.slot,) = memory.slots.take(1)
        sequence.blocks = memory.blocks.take(memory.blocks_for(length))
        saved = sequence.saved or self._find(sequence)
        if saved is None:
            plan.moves.append(Clear(sequence.slot))
            return
        pairs = zip(sequence.blocks, saved.blocks, strict=False)  # it has more
        plan.moves.append(Load(saved, sequence.slot, tuple(pairs)))
        self._drop_saved(sequence)

    def _find(self, sequence: Sequence) -> Saved | None:
        """The kept prefix that a sequence with nothing computed starts from; its last token is read anyway.

        A suspect computes everything itself, and so does who needs the logits of every token.
        """
        sequence.fork = None
        if sequence in self.suspects or sequence.prompt_scores is not None:
            return None
        found = self.prefixes.find(sequence.tokens[:-1])
        sequence.num_computed, sequence.fork = found.length, found.fork
        return found.saved

    def _keep(self, sequence: Sequence) -> Save | None:
        """Room on the host for what is computed of a sequence, and how it is copied there."""
        assert sequence.slot is not None
        if sequence.prompt_scores is not None:  # a text to score, which nobody will continue
            return None
        kept = self.prefixes.keep(sequence.tokens[: sequence.num_computed])
        if kept is None:
            return None
        saved, known = kept
        return Save(saved, sequence.slot, tuple(zip(sequence.blocks, saved.blocks, strict=False))[known:])

    def _keep_in(self, plan: Plan, sequence: Sequence) -> None:
        if (save := self._keep(sequence)) is not None:
            plan.keeps[sequence] = save

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Put a sequence aside: its memory to the host if there is room, otherwise it is computed again."""
        if sequence.length < sequence.limit and sequence.num_computed:
            sequence.saved = self._save(sequence, plan)
        if sequence.saved is None:
            sequence.num_computed = 0
        self._free(sequence)
        self.running.remove(sequence)
        self.add(sequence)
        plan.num_preempted += 1

    def _save(self, sequence: Sequence, plan: Plan) -> Saved | None:
        memory = self.memory
        count = memory.pages_for(sequence.num_computed)
        if count > memory.swap.free:
            return None
        assert sequence.slot is not None
        pages = memory.swap.take(count)
        saved = Saved(pages[: memory.sizes.state_pages], pages[memory.sizes.state_pages :])
        pairs = zip(sequence.blocks, saved.blocks, strict=False)  # it may have one for the next token
        plan.moves.append(Save(saved, sequence.slot, tuple(pairs)))
        return saved

    def _free(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.memory.slots.release([sequence.slot])
            self.memory.blocks.release(sequence.blocks)
            sequence.slot, sequence.blocks = None, []

    def _drop_saved(self, sequence: Sequence) -> None:
        if sequence.saved is not None:
            sequence.saved.owners -= 1
            if not sequence.saved.owners:
                self.memory.swap.release(sequence.saved.pages)
            sequence.saved = None

    def _fork(self, stem: Sequence, plan: Plan) -> None:
        """Start the siblings where the prompt but for its last token is computed.

        Full blocks are shared, the last one is copied. Who finds no room waits, with a copy on the host.
        """
        memory, saved = self.memory, None
        full, partial = divmod(stem.num_computed, memory.sizes.block_size)
        full = min(full, len(stem.blocks))
        for sibling in stem.siblings:
            need = memory.blocks_for(sibling.length) - full
            sibling.num_computed = stem.num_computed
            if memory.slots.free and memory.blocks.free >= need:
                memory.blocks.share(stem.blocks[:full])
                (sibling.slot,) = memory.slots.take(1)
                sibling.blocks = stem.blocks[:full] + memory.blocks.take(need)
                tail = ((stem.blocks[full], sibling.blocks[full]),) if partial and stem.blocks else ()
                assert stem.slot is not None
                plan.moves.append(Copy(stem.slot, sibling.slot, tail))
                self.running.append(sibling)
                continue
            if saved is None:
                saved = self._save(stem, plan)
            else:
                saved.owners += 1
            sibling.saved = saved
            if saved is None:
                sibling.num_computed = 0
            self.add(sibling)
        stem.siblings = []
