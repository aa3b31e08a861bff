"""An engine's core driven by hand, and what its answers have to be."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hrwkv.engine.build import build_core, fit_memory, longest_context
from hrwkv.engine.core import Job
from hrwkv.engine.grammar import GrammarCompiler
from hrwkv.engine.intake import Intake
from hrwkv.engine.memory import MemorySizes
from hrwkv.engine.prefixes import Prefixes
from hrwkv.engine.request import Event, SamplingParams
from hrwkv.engine.stream import join
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import EngineSettings
from tests.builders import VOCAB, hybrid_model, logits_of

KINDS = {"hybrid": (2,), "all-linear": (), "all-attention": (0, 1, 2, 3)}


@functools.cache
def model_of(kind: str) -> HybridModel:
    return hybrid_model(KINDS[kind], eos_token_id=None)


@functools.cache
def apart(kind: str) -> HybridModel:
    """The same, never fused as an engine's model is."""
    return hybrid_model(KINDS[kind], eos_token_id=None)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One printable letter a token."""
    core = Tokenizer(models.BPE({chr(33 + n): n for n in range(VOCAB - 1)} | {"~~": VOCAB - 1}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@functools.cache
def greedy_alone(kind: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The answer by whole forwards, not fused, without a cache, one request and one token at a time."""
    if not count:
        return ()
    before = greedy_alone(kind, prompt, count - 1)
    ids = torch.tensor([*prompt, *before])
    return (*before, int(logits_of(apart(kind), ids, [len(ids)])[-1].argmax()))


@dataclass
class Reader:
    """A sink that joins the events of each choice."""

    events: dict[int, Event] = field(default_factory=dict)
    error: Exception | None = None

    def put(self, event: Event) -> None:
        earlier = self.events.get(event.index)
        assert earlier is None or earlier.finish_reason is None
        self.events[event.index] = event if earlier is None else join([earlier, event])

    def fail(self, error: Exception) -> None:
        assert self.error is None
        self.error = error

    def tokens(self, index: int = 0) -> tuple[int, ...]:
        return self.events[index].tokens

    def reason(self, index: int = 0) -> str | None:
        return self.events[index].finish_reason


class Driver:
    """A core with a clock that stands still unless told otherwise."""

    def __init__(
        self,
        kind: str = "hybrid",
        *,
        model: HybridModel | None = None,
        sizes: MemorySizes | None = None,
        min_gain: int = 1,
        **settings: Any,
    ) -> None:
        values = {"max_sequences": 4, "step_tokens": 16, "block_size": 4, "device": "cpu"}
        values |= {"swap_bytes": 2**28, "prefix_cache_bytes": 0, **settings}
        self.settings = EngineSettings(**values)
        self.model = model or model_of(kind)
        self.model.fuse_projections()
        self.now = 0.0
        self.sizes = sizes or fit_memory(self.model, self.settings)
        self.core = build_core(self.model, self.settings, sizes=self.sizes, clock=lambda: self.now)
        self.core.scheduler.prefixes = Prefixes(self.core.scheduler.memory, min_gain=min_gain)
        context = longest_context(self.model, self.settings, sizes=self.sizes)
        grammars = GrammarCompiler(tokenizer(), vocab_size=VOCAB, end_ids=(2,))
        self.intake = Intake(tokenizer(), VOCAB, context, (2,), grammars)
        self.count = 0

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> tuple[int, Reader]:
        reader = Reader()
        self.count += 1
        job: Job = self.intake.job(
            prompt, params, priority=priority, number=self.count, sink=reader, now=self.now
        )
        job.deadline = math.inf if deadline is None else deadline
        self.core.add(job)
        return self.count, reader

    def run(self, *, limit: int = 2000) -> None:
        for _ in range(limit):
            if not self.core.has_work:
                return
            self.core.step()
        raise AssertionError(f"still working after {limit} steps")

    def assert_nothing_held(self) -> None:
        memory = self.core.scheduler.memory
        assert (memory.slots.used, memory.blocks.used) == (0, 0)
        assert memory.swap.used == 0
        assert memory.kept.used * memory.sizes.page_bytes <= (self.settings.prefix_cache_bytes or 0)
        assert [*self.core.scheduler.running, *self.core.scheduler.waiting] == []
        assert self.core.num_queued == 0
        assert not self.core._owners


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, **{"ignore_eos": True, **changes})


def sizes_of(kind: str, *, slots: int, blocks: int, block_size: int = 4) -> MemorySizes:
    """Memory for so many sequences of the tiny model, however small."""
    config = model_of(kind).config
    slot_bytes = len(config.linear_layers) * 4 * 8 * 8 * 4
    block_bytes = len(config.full_layers) * 2 * 2 * 8 * 4 * block_size
    return MemorySizes(slots, blocks if block_bytes else 0, block_size, slot_bytes, block_bytes)
