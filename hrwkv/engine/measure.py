"""How fast an engine is beside what its machine allows, with requests as a client sends them.

Nothing is measured past the engine: the time is that between two counts of tokens, or from a request to its
answer. A decode step has to read the weights and the keys and values, and to read and write the states; its
floor is these bytes over the measured copy rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hrwkv.engine.engine import Engine, EngineStats
from hrwkv.engine.request import EngineError, SamplingParams
from hrwkv.engine.stream import Request
from hrwkv.model.config import HybridConfig
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import EngineSettings

POLL_SECONDS = 0.001
IDLE_POLLS = 500
# Prefills of one length: the first compiles and tunes kernels, the best of the others counts.
PREFILLS = 3


@dataclass(frozen=True)
class Decode:
    """``batch`` sequences of ``context`` tokens, one token each a step: seconds and bytes of a step."""

    batch: int
    context: int
    seconds: float
    bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Over the whole batch."""
        return self.batch / self.seconds

    def of_floor(self, copy_rate: float) -> float:
        """The floor's time over this one's, at so many bytes a second; 1 is as fast as can be."""
        return self.bytes / copy_rate / self.seconds


@dataclass(frozen=True)
class Prefill:
    """A prompt of ``length`` tokens: seconds to its first new token, and the operations behind it."""

    length: int
    seconds: float
    operations: int

    @property
    def tokens_per_second(self) -> float:
        """Of the prompt."""
        return self.length / self.seconds

    def utilisation(self, matmul_rate: float) -> float:
        """Share of so many operations a second (MFU, arXiv 2204.02311, if the rate is the data sheet's)."""
        return self.operations / matmul_rate / self.seconds


def weight_bytes(model: HybridModel) -> int:
    """Bytes of the weights that a step reads: all but an embedding of its own, of which it reads rows."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if model.config.tie_word_embeddings else total - model.model.embed_tokens.weight.nbytes


def prefill_operations(model: HybridModel, length: int) -> int:
    """Multiplications and additions for a prompt: 2 for each weight and token, attention's causal half,
    9 for each place of a state and token (hxa079.md 11, 12), and one row of logits."""
    config: HybridConfig = model.config
    matrices = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    width = config.num_attention_heads * config.head_dim
    attention = 2 * width * length**2 * len(config.full_layers)
    recurrence = 9 * width * config.head_dim * length * len(config.linear_layers)
    return 2 * matrices * length + 2 * config.hidden_size * config.vocab_size + attention + recurrence


def num_fitting(tokens: int, *, slots: int, blocks: int, block_size: int) -> int:
    """Sequences of so many tokens that this memory holds at once; blocks: 0 without attention layers."""
    return min(slots, blocks // -(-tokens // block_size)) if blocks else slots


def measure_decode(
    engine: Engine, model: HybridModel, settings: EngineSettings, *, batch: int, context: int, steps: int
) -> Decode:
    """The time of a step while ``batch`` sequences decode, over ``steps`` of them.

    settings: the engine's. The prompts have ``context`` tokens; while the last of them is read the first
    already decode, so the bytes are those that the engine holds in the middle of the measurement. Raises
    ValueError if they do not fit together, EngineError if the engine fails.
    """
    spare = settings.step_tokens - batch
    length = context + math.ceil(batch * context / max(spare, 1)) + batch + 2 * steps
    stats = engine.stats()
    fits = num_fitting(
        length, slots=stats.state_slots_total, blocks=stats.kv_blocks_total, block_size=settings.block_size
    )
    if length > engine.max_context:
        grown = f"{batch} sequences of {context} tokens grow to {length} before all have begun"
        raise ValueError(f"{grown}, and the longest context is {engine.max_context}")
    if batch > fits:
        raise ValueError(f"{batch} sequences of {length} tokens do not fit in the cache, {fits} do")
    params = SamplingParams(max_tokens=length - context, temperature=0.0, ignore_eos=True)
    _wait(engine, lambda stats: not stats.running and not stats.queued)
    before = sum(engine.stats().first_token.counts)
    requests = [engine.submit(random_prompt(engine, context), params) for _ in range(batch)]
    try:
        begun = _wait(engine, lambda stats: sum(stats.first_token.counts) == before + batch).generated_tokens
        # From just after one step's tokens to just after another's.
        first = _wait(engine, lambda stats: stats.generated_tokens > begun)
        start = time.perf_counter()
        middle = _wait(
            engine, lambda stats: stats.generated_tokens >= first.generated_tokens + batch * steps // 2
        )
        last = _wait(engine, lambda stats: stats.generated_tokens >= first.generated_tokens + batch * steps)
        seconds = time.perf_counter() - start
    finally:
        for request in requests:
            request.cancel()
    taken = (last.generated_tokens - first.generated_tokens) / batch
    return Decode(
        batch, context, seconds / taken, weight_bytes(model) + 2 * middle.state_bytes + middle.kv_bytes
    )


def measure_prefill(engine: Engine, model: HybridModel, *, length: int) -> Prefill:
    """The time from a request to its first token, nothing else running.

    Raises ValueError for a prompt that does not fit, EngineError if the engine fails.
    """
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    times = []
    for _ in range(PREFILLS):
        prompt = random_prompt(engine, length)
        start = time.perf_counter()
        _read(engine.submit(prompt, params))
        times.append(time.perf_counter() - start)
    return Prefill(length, min(times[1:]), prefill_operations(model, length))


def random_prompt(engine: Engine, length: int) -> Sequence[int]:
    """So many token ids; never the same, of which the engine would have kept a prefix."""
    generator = torch.Generator()
    generator.seed()
    ids: list[int] = torch.randint(engine.model_config.vocab_size, (length,), generator=generator).tolist()
    return ids


def _wait(engine: Engine, reached: Callable[[EngineStats], bool]) -> EngineStats:
    """Look again and again until the counts are so. Raises EngineError if they never will be."""
    idle = 0
    while not reached(stats := engine.stats()):
        idle = 0 if stats.running or stats.queued else idle + 1
        if not stats.healthy or idle > IDLE_POLLS:
            raise EngineError("the engine has ended the requests early: its log says why")
        time.sleep(POLL_SECONDS)
    return stats


def _read(request: Request) -> None:
    for _ in request:
        pass
