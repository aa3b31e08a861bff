"""The policy by itself: no model, no tensors."""

from __future__ import annotations

import pytest

from hrwkv.engine.memory import Memory, MemorySizes
from hrwkv.engine.prefixes import Prefixes
from hrwkv.engine.scheduler import Clear, Copy, Load, Plan, Scheduler, Sequence

SLOT_BYTES, BLOCK_BYTES = 100, 10


def make(*, slots: int = 4, blocks: int = 20, step_tokens: int = 16, swap_bytes: int = 10**6) -> Scheduler:
    sizes = MemorySizes(slots, blocks, 4, SLOT_BYTES, BLOCK_BYTES)
    memory = Memory(sizes, swap_bytes=swap_bytes, prefix_bytes=10**4)
    return Scheduler(memory, Prefixes(memory), step_tokens=step_tokens)


def sequence(number: int, prompt: int, *, limit: int = 64, priority: int = 0, choice: int = 0) -> Sequence:
    return Sequence((priority, number, choice), [0] * prompt, limit)


def add(scheduler: Scheduler, *prompts: int, limit: int = 64) -> list[Sequence]:
    made = [sequence(number, prompt, limit=limit) for number, prompt in enumerate(prompts)]
    for one in made:
        scheduler.add(one)
    return made


def finish_step(scheduler: Scheduler, plan: Plan) -> None:
    """What the core does: copies are made, tokens are read, and whoever is at its limit ends."""
    scheduler.confirm(plan, failed=())
    for piece in plan.pieces:
        if piece.samples:
            scheduler.append(piece.sequence, 0)
            if len(piece.sequence.tokens) >= piece.sequence.limit:
                scheduler.finish(piece.sequence)


def pieces(plan: Plan) -> list[tuple[int, int, int, bool]]:
    return [(each.sequence.key[1], each.start, each.count, each.samples) for each in plan.pieces]


def test_next_tokens_come_before_prompts_in_the_token_budget() -> None:
    scheduler = make(step_tokens=8)
    add(scheduler, 3, 20, 2)
    steps = []
    for _ in range(4):
        plan = scheduler.schedule()
        steps.append(pieces(plan))
        finish_step(scheduler, plan)
    assert steps == [
        [(0, 0, 3, True), (1, 0, 5, False)],
        [(0, 3, 1, True), (1, 5, 7, False)],
        [(0, 4, 1, True), (1, 12, 7, False)],
        [(0, 5, 1, True), (1, 19, 1, True), (2, 0, 2, True)],
    ]


def test_no_more_run_than_there_are_slots() -> None:
    scheduler = make(slots=2)
    add(scheduler, 2, 2, 2)
    assert [number for number, *_ in pieces(scheduler.schedule())] == [0, 1]


def test_a_prompt_waits_until_all_its_blocks_are_free() -> None:
    scheduler = make(blocks=5)
    first, second = add(scheduler, 12, 12, limit=13)
    plan = scheduler.schedule()
    assert plan.moves == [Clear(0)]
    assert second.slot is None
    finish_step(scheduler, plan)
    assert first.is_finished
    assert pieces(scheduler.schedule()) == [(1, 0, 12, True)]


@pytest.mark.parametrize("swap_bytes", [SLOT_BYTES + 2 * BLOCK_BYTES, 0], ids=["saved", "again"])
def test_the_newest_makes_room_and_comes_back(swap_bytes: int) -> None:
    """Two sequences of 8 tokens fill 4 blocks; the first needs a fifth."""
    scheduler = make(blocks=4, swap_bytes=swap_bytes)
    first, second = add(scheduler, 8, 8, limit=10)
    finish_step(scheduler, scheduler.schedule())
    num_blocks = len(second.blocks)
    plan = scheduler.schedule()
    assert pieces(plan) == [(0, 8, 1, True)]
    assert (plan.num_preempted, second.slot, second.blocks) == (1, None, [])
    finish_step(scheduler, plan)
    assert first.is_finished
    assert scheduler.memory.swap.free == 0
    plan = scheduler.schedule()
    if swap_bytes:
        (move,) = plan.moves
        assert isinstance(move, Load)
        assert (move.slot, len(move.blocks)) == (second.slot, num_blocks)
        assert pieces(plan) == [(1, 8, 1, True)]
    else:
        assert second.slot is not None
        assert plan.moves == [Clear(second.slot)]
        assert pieces(plan) == [(1, 0, 9, True)]
    assert scheduler.memory.swap.used == 0


def test_among_priorities_the_lowest_number_takes_the_room_of_the_newest_of_the_highest() -> None:
    scheduler = make(slots=3)
    low = [sequence(number, 3, priority=5) for number in range(2)]
    middle = sequence(2, 3, priority=3)
    for one in (*low, middle):
        scheduler.add(one)
    finish_step(scheduler, scheduler.schedule())
    high = sequence(3, 3, priority=1)
    scheduler.add(high)
    plan = scheduler.schedule()
    assert plan.num_preempted == 1
    assert low[1].slot is None
    assert [number for number, *_ in pieces(plan)] == [3, 2, 0]


def test_one_of_the_same_priority_waits() -> None:
    scheduler = make(slots=1)
    add(scheduler, 3, 3)
    finish_step(scheduler, scheduler.schedule())
    plan = scheduler.schedule()
    assert (plan.num_preempted, pieces(plan)) == (0, [(0, 3, 1, True)])


def test_answers_to_one_prompt_share_its_full_blocks_and_copy_the_last() -> None:
    """A prompt of 11: ten tokens are read once, two blocks are full, the third holds two tokens."""
    scheduler = make()
    stem, twin = sequence(0, 11), sequence(0, 11, choice=1)
    stem.siblings = [twin]
    scheduler.add(stem)
    plan = scheduler.schedule()
    assert pieces(plan) == [(0, 0, 10, False)]
    finish_step(scheduler, plan)
    plan = scheduler.schedule()
    assert stem.slot is not None
    assert twin.slot is not None
    assert plan.moves == [Copy(stem.slot, twin.slot, ((stem.blocks[2], twin.blocks[2]),))]
    assert stem.blocks[:2] == twin.blocks[:2]
    assert scheduler.memory.blocks.used == 4
    assert pieces(plan) == [(0, 10, 1, True), (0, 10, 1, True)]
    scheduler.finish(stem)
    assert scheduler.memory.blocks.used == 3
    scheduler.finish(twin)
    assert scheduler.memory.blocks.used == 0


def test_suspects_run_alone_until_each_has_its_next_token() -> None:
    scheduler = make()
    add(scheduler, 3, 4, 5)
    plan = scheduler.schedule()
    for one in [piece.sequence for piece in plan.pieces]:
        scheduler.restart(one)
    found = []
    for _ in range(4):
        plan = scheduler.schedule()
        found.append(pieces(plan))
        finish_step(scheduler, plan)
    assert found[:3] == [[(0, 0, 3, True)], [(1, 0, 4, True)], [(2, 0, 5, True)]]
    assert [number for number, *_ in found[3]] == [0, 1, 2]


def test_what_was_put_aside_with_a_token_unread_does_not_come_back_in_the_same_step() -> None:
    """Its last token is on the device under the slot that it had. Shared blocks are counted low, so one more
    than needed makes room, and would fit again at once.
    """
    scheduler = make(blocks=10, step_tokens=64)
    low, stem, twin = (
        sequence(0, 3, priority=5),
        sequence(1, 9, priority=5),
        sequence(1, 9, priority=5, choice=1),
    )
    stem.siblings = [twin]
    scheduler.add(low)
    scheduler.add(stem)
    for _ in range(2):
        finish_step(scheduler, scheduler.schedule())
    unread = scheduler.schedule()
    assert len(unread.pieces) == 3
    scheduler.add(sequence(2, 28, priority=1))
    plan = scheduler.schedule()
    assert (plan.num_preempted, pieces(plan)) == (3, [(2, 0, 28, True)])
    finish_step(scheduler, unread)
    finish_step(scheduler, plan)
    assert [number for number, *_ in pieces(scheduler.schedule())] == [2, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_an_answer_leaves_first_in_the_next_step_and_not_after_a_failure(fails: bool) -> None:
    scheduler = make()
    (one,) = add(scheduler, 3)
    for _ in range(40):
        finish_step(scheduler, scheduler.schedule())
    slot, blocks = one.slot, tuple(one.blocks)
    scheduler.finish(one, keep=True)
    if fails:
        scheduler.drop_uncertain()
    add(scheduler, 2)
    plan = scheduler.schedule()
    saves = [(move.slot, tuple(block for block, _ in move.blocks)) for move in plan.moves[:-1]]  # type: ignore[union-attr]
    assert saves == ([] if fails else [(slot, blocks)])
    assert len(scheduler.prefixes) == (0 if fails else 1)
