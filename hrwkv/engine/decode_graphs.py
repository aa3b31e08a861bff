"""Decode steps as CUDA graphs: one recording for each size of batch, replayed with new indices.

A step of 44 layers is about a thousand launches, which the host cannot make in the time that the device
needs for a small batch. Everything that differs between steps lies in tensors that stay where they are; a
batch is padded to the next recorded size with rows that own no memory: state slot -1, no slot_mapping, a
context of 0. Only forms that take such rows can be recorded (``fit``).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hrwkv.kernels.wkv7 import TRITON_SIZES
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.cache import HybridCache
from hrwkv.model.modeling import HybridModel

if TYPE_CHECKING:
    from hrwkv.engine.runner import Places

FIELDS = 6  # token, position, slot_mapping, table row, context, state slot


def batch_sizes(most: int) -> list[int]:
    """The recorded sizes, rising: 1, 2, 3, 4, 6, 8, 12, ... and ``most``; at most a third is padding."""
    sizes = {most}
    for power in range(most.bit_length()):
        sizes |= {size for size in (2**power, 2**power * 3 // 2) if size < most}
    return sorted(sizes)


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [FIELDS, B] int64
    logits: Tensor  # [B, V]


class DecodeGraphs:
    """Recordings over one model and one cache. tables [S + 1, M] and last_tokens [S + 1]: the runner's."""

    def __init__(
        self, model: HybridModel, cache: HybridCache, *, tables: Tensor, last_tokens: Tensor
    ) -> None:
        self._model, self._cache = model, cache
        self._tables, self._last_tokens = tables, last_tokens
        self._sizes = batch_sizes(len(tables) - 1)
        self._recordings: dict[int, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all: only one runs at a time

    @staticmethod
    def fit(model: HybridModel) -> bool:
        """True where Triton's decode kernels serve, whose rows may be padding."""
        weight = model.lm_head.weight
        return weight.is_cuda and weight.dtype != torch.float64 and model.config.head_dim in TRITON_SIZES

    def record_all(self) -> None:
        """Record every size; the largest first, the others reuse its memory."""
        for size in reversed(self._sizes):
            self._record(size)

    def run(self, places: Places) -> Tensor:
        """Decode N sequences by one token each: logits [N, V], valid until the next run."""
        num = len(places.slots)
        size = self._sizes[bisect_left(self._sizes, num)]
        if size not in self._recordings:
            self._record(size)
        recording = self._recordings[size]
        inputs = torch.from_numpy(padded_inputs(places, size, spare=len(self._tables) - 1))
        recording.inputs.copy_(inputs.pin_memory(), non_blocking=True)
        recording.graph.replay()
        return recording.logits[:num]

    @torch.inference_mode()
    def _record(self, size: int) -> None:
        device = self._tables.device
        nobody = np.empty((FIELDS, 0), dtype=np.int64)
        inputs = torch.from_numpy(_pad(nobody, size, spare=len(self._tables) - 1)).to(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # kernels compile, and choose how to be launched, outside a recording
            self._decode(inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = self._decode(inputs)
        self._recordings[size] = _Recording(graph, inputs, logits)

    def _decode(self, inputs: Tensor) -> Tensor:
        return decode(self._model, self._cache, inputs, tables=self._tables, last_tokens=self._last_tokens)


def decode(
    model: HybridModel, cache: HybridCache, inputs: Tensor, *, tables: Tensor, last_tokens: Tensor
) -> Tensor:
    """What is recorded: inputs [FIELDS, B] int64 -> logits [B, V]."""
    tokens, positions, slot_mapping, rows, contexts, state_slots = inputs
    tokens = torch.where(tokens < 0, last_tokens[rows], tokens)
    batch = TokenBatch(
        positions=positions,
        cu_seqlens=torch.arange(len(tokens) + 1, dtype=torch.int32, device=inputs.device),
        lengths=(1,) * len(tokens),
        state_slots=state_slots,
        block_tables=tables[rows],
        slot_mapping=slot_mapping,
        context_lens=contexts,
    )
    return model.compute_logits(model(tokens, batch, cache))


def padded_inputs(places: Places, size: int, *, spare: int) -> np.ndarray:
    """[FIELDS, size] int64: the sequences' rows, then rows that own nothing and read table row ``spare``."""
    fields = (
        places.tokens,
        places.positions,
        places.slot_mapping,
        places.slots,
        places.contexts,
        places.slots,
    )
    return _pad(np.stack(fields), size, spare=spare)


def _pad(inputs: np.ndarray, size: int, *, spare: int) -> np.ndarray:
    padding = np.array([0, 0, -1, spare, 0, -1])[:, None]
    return np.concatenate([inputs, np.repeat(padding, size - inputs.shape[1], axis=1)], axis=1)
