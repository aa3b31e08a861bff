"""How packed sequences are cut into chunks, and chunks into blocks that are worked on together.

A chunk is ``chunk`` tokens of one sequence. A block is a run of chunk steps of several sequences, ordered
step by step, so that all its chunks can be computed in one batched product and the state can still walk
through it. Sequences stand in order of falling length: those that still run at a step are then always the
first ones.

When every length is the same multiple of the chunk, a block is a strided view of the packed tensor and
nothing is copied. Otherwise its tokens are gathered by index, and rows past a sequence's end are zeros that
leave the state as it is. Lengths come from the host, so planning never waits for a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# Share of a block's chunks that must hold tokens.
MIN_FILL = 0.75


@dataclass(frozen=True)
class Block:
    """``num_steps`` chunk steps from ``first_step`` on, of the first ``num`` sequences of the layout.

    Args:
        first_step: index of the first chunk step.
        num_steps: number of chunk steps.
        num: number of sequences that run at the first of them; some may end inside.
        chunk: tokens in a chunk.
        steps: chunk steps of a sequence; only read when the block is a view.
        rows: ``[num_steps * num * chunk]`` token of each row, or None when the block is a view.
        targets: as ``rows``, but rows past a sequence's end name the row after the last token.
        padding: ``[num_steps * num * chunk, 1, 1]`` true past a sequence's end, or None when no row is.
    """

    first_step: int
    num_steps: int
    num: int
    chunk: int
    steps: int
    rows: Tensor | None = None
    targets: Tensor | None = None
    padding: Tensor | None = None

    def read(self, x: Tensor, *, zero_padding: bool = False) -> Tensor:
        """Give the block's part of packed ``x [T, H, K]`` as ``[num_steps, num, H, chunk, K]``."""
        if self.rows is None:
            return self._slice(x)
        x = x.index_select(0, self.rows)
        if zero_padding and self.padding is not None:
            x.masked_fill_(self.padding, 0.0)
        return self._chunked(x)

    def target(self, out: Tensor) -> Tensor:
        """Give a tensor ``[num_steps, num, H, chunk, K]`` to fill and then hand to ``commit``."""
        if self.rows is None:
            return self._slice(out)
        return self._chunked(out.new_empty((len(self.rows), *out.shape[1:])))

    def commit(self, out: Tensor, target: Tensor) -> None:
        """Move a filled ``target`` to its place in ``out``."""
        if self.targets is not None:
            out.index_copy_(0, self.targets, target.transpose(2, 3).flatten(0, 2))

    def _slice(self, x: Tensor) -> Tensor:
        chunks = x.unflatten(0, (self.num, self.steps, self.chunk))
        return chunks[:, self.first_step : self.first_step + self.num_steps].permute(1, 0, 3, 2, 4)

    def _chunked(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.num_steps, self.num, self.chunk)).transpose(2, 3)


@dataclass(frozen=True)
class Layout:
    """The blocks of a packed batch, in the order in which the state walks.

    Args:
        blocks: the blocks; empty when every sequence is.
        order: sequences by falling length, or None when they stand in that order already.
        num_tokens: T.
    """

    blocks: tuple[Block, ...]
    order: tuple[int, ...] | None
    num_tokens: int

    def empty(self, like: Tensor) -> Tensor:
        """Make an output for ``Block.target``: packed rows, and one for rows past a sequence's end."""
        spare = bool(self.blocks) and self.blocks[0].rows is not None
        return like.new_empty((self.num_tokens + spare, *like.shape[1:]))

    def finish(self, out: Tensor) -> Tensor:
        """Drop the spare row."""
        return out[: self.num_tokens]

    def sort(self, states: Tensor) -> Tensor:
        """Bring per-sequence states ``[N, ...]`` into the layout's order."""
        if self.order is None:
            return states
        return states.index_select(0, to_device(self.order, states.device))

    def unsort(self, states: Tensor) -> Tensor:
        """Bring per-sequence states back into the caller's order."""
        if self.order is None:
            return states
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return states.index_select(0, to_device(inverse, states.device))


def to_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Copy host integers to a device without waiting for it."""
    host = torch.as_tensor(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def plan(lengths: Sequence[int], *, chunk: int, block_chunks: int, device: torch.device) -> Layout:
    """Cut sequences of the given lengths into blocks of at most about ``block_chunks`` chunks.

    Args:
        lengths: tokens of each sequence, >= 0.
        chunk: tokens in a chunk.
        block_chunks: chunks in a block; a block holds at least one step of every running sequence.
        device: where the indices shall lie.
    """
    counts = [-(-length // chunk) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda n: -counts[n])
    spans = _spans([counts[n] for n in order], block_chunks=block_chunks)
    total = sum(lengths)
    if total and min(lengths) == max(lengths) and lengths[0] % chunk == 0:
        return Layout(tuple(Block(*span, chunk, counts[0]) for span in spans), None, total)
    starts = torch.tensor(list(accumulate(lengths, initial=0)))[order]
    ends = starts + torch.tensor(list(lengths))[order] if order else starts
    blocks = tuple(
        _gathered(span, starts=starts, ends=ends, chunk=chunk, total=total, device=device) for span in spans
    )
    return Layout(blocks, None if order == sorted(order) else tuple(order), total)


def _spans(counts: Sequence[int], *, block_chunks: int) -> list[tuple[int, int, int]]:
    """Split the chunk steps into (first step, number of steps, running sequences), for falling counts.

    A block goes on past the end of its shorter sequences while at least ``MIN_FILL`` of its chunks hold
    tokens: many short blocks cost more than a few empty chunks.
    """
    running = [0] * (counts[0] if counts else 0)  # sequences that still run at each step
    num = len(counts)
    for step in range(len(running)):
        while counts[num - 1] <= step:
            num -= 1
        running[step] = num
    spans, step = [], 0
    while step < len(running):
        num, size, filled = running[step], 1, running[step]
        while step + size < len(running) and (size + 1) * num <= block_chunks:
            if filled + running[step + size] < MIN_FILL * (size + 1) * num:
                break
            filled += running[step + size]
            size += 1
        spans.append((step, size, num))
        step += size
    return spans


def _gathered(
    span: tuple[int, int, int], *, starts: Tensor, ends: Tensor, chunk: int, total: int, device: torch.device
) -> Block:
    """Make a block whose tokens are gathered by index; ``starts`` and ``ends [N]`` are on the host."""
    step, size, num = span
    offsets = torch.arange(step * chunk, (step + size) * chunk).view(size, 1, chunk)
    token = (starts[:num].view(-1, 1) + offsets).flatten()  # [size * num * chunk]
    padding = token >= ends[:num].view(1, -1, 1).expand(size, num, chunk).flatten()
    rows = to_device(token.masked_fill(padding, 0), device)
    targets = to_device(token.masked_fill(padding, total), device)
    masked = to_device(padding.view(-1, 1, 1), device) if bool(padding.any()) else None
    return Block(step, size, num, chunk, 0, rows, targets, masked)
