"""Batches ahead of the step: one thread makes the next ones while the device works on this one.

A single thread, so their order is that of the indices; the first error surfaces at the batch that it belongs
to, as itself. The bookmark is the one that was right after the batch handed out last, not after those that
wait.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch import Tensor

from hrwkv.data.mixing import Rows
from hrwkv.layers.batch import TokenBatch

Made = tuple[tuple[Tensor, TokenBatch], dict[str, Any]]


class Prefetch:
    """The batches of `rows`, up to `depth` of them made ahead; 0 makes each when it is asked for.

    pin: put them into page-locked memory, from which a GPU copies without waiting. Indices in rising order
    are quick; another one throws away what was made ahead.
    """

    def __init__(self, rows: Rows, *, depth: int, pin: bool = False) -> None:
        self._rows, self._depth, self._pin = rows, depth, pin
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[Made]] = deque()
        self._last: tuple[int, Made] | None = None

    def batch(self, index: int) -> tuple[Tensor, TokenBatch]:
        """Return token ids [T] int64 and their sequences, on the CPU; raises what making them raised."""
        if self._last is None or self._last[0] != index:
            try:
                made = self._next(index)
            except BaseException:
                self.close()
                raise
            self._last = (index, made)
        return self._last[1][0]

    def state_dict(self) -> dict[str, Any]:
        """Return the bookmark after the batch that was handed out last, for JSON."""
        return self._rows.state_dict() if self._last is None else self._last[1][1]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a bookmark; what was made ahead is thrown away."""
        self.close()
        self._rows.load_state_dict(state)

    def close(self) -> None:
        """End the thread after the batch that it is making; the next batch starts another one."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._last = None, None
        self._waiting.clear()

    def _next(self, index: int) -> Made:
        if not self._depth:
            return self._make(index)
        if self._pool is None or self._last is None or index != self._last[0] + 1:
            self.close()
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
            self._waiting.append(self._pool.submit(self._make, index))
        made = self._waiting.popleft().result()
        while len(self._waiting) < self._depth:
            ahead = index + 1 + len(self._waiting)
            self._waiting.append(self._pool.submit(self._make, ahead))
        return made

    def _make(self, index: int) -> Made:
        token_ids, batch = self._rows.batch(index)
        if self._pin:
            batch = replace(
                batch, positions=batch.positions.pin_memory(), cu_seqlens=batch.cu_seqlens.pin_memory()
            )
            token_ids = token_ids.pin_memory()
        return (token_ids, batch), self._rows.state_dict()
