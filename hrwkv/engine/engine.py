"""``Engine``: a model that answers many requests at once, in a thread of its own.

Callers submit from any thread or event loop and read from a ``Request``; only the engine's thread touches the
model. If that thread fails, every request fails at once and ``is_alive`` turns false: nobody waits for ever.
"""

from __future__ import annotations

import copy
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hrwkv.engine.build import build_core, fit_memory, longest_context
from hrwkv.engine.core import Histogram, Job
from hrwkv.engine.grammar import GrammarCompiler
from hrwkv.engine.intake import Intake
from hrwkv.engine.request import (
    EngineError,
    Event,
    FinishReason,
    Grammar,
    QueueFullError,
    SamplingParams,
    TokenLogprob,
)
from hrwkv.engine.stream import Request, join
from hrwkv.model.checkpoint import load_model
from hrwkv.model.config import HybridConfig
from hrwkv.model.generate import open_tokenizer
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import EngineSettings

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class EngineStats:
    """The engine at one moment; tokens, preempted and times count since the start, bytes are those in use.

    prompt_tokens_reused: of prompt_tokens, those that were not read again; prefix_bytes: of host memory.
    first_token: from a request to each choice's first token; inter_token: from token to token of one choice.
    """

    queued: int
    running: int
    prompt_tokens: int
    prompt_tokens_reused: int
    generated_tokens: int
    preempted: int
    first_token: Histogram
    inter_token: Histogram
    kv_blocks_used: int
    kv_blocks_total: int
    state_slots_used: int
    state_slots_total: int
    state_bytes: int
    kv_bytes: int
    prefix_bytes: int
    healthy: bool


@dataclass(frozen=True)
class Answer:
    """One whole answer of ``Engine.generate``."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...]


class Engine:
    """A model with its memory and its thread; a context manager, which lets what runs finish.

    end_ids: tokens that end an answer; None takes the config's and the tokenizer's. Raises ValueError if the
    memory that the settings leave holds no sequence.
    """

    def __init__(
        self,
        model: HybridModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EngineSettings | None = None,
        *,
        end_ids: Iterable[int] | None = None,
    ) -> None:
        self.tokenizer, self._settings = tokenizer, settings or EngineSettings()
        self.model_config: HybridConfig = model.config
        model.eval().fuse_projections()  # before memory is measured
        self._sizes = fit_memory(model, self._settings)
        self._core = build_core(model, self._settings, sizes=self._sizes)
        self.max_context = longest_context(model, self._settings, sizes=self._sizes)
        ends = _ids(model.config.eos_token_id) | _ids(tokenizer.eos_token_id) if end_ids is None else end_ids
        vocab_size = model.config.vocab_size
        end_ids = tuple(sorted(set(ends)))
        # Callers set padding and the like on theirs, which a decoding thread must not meet half-way.
        own = copy.deepcopy(tokenizer)
        grammars = GrammarCompiler(own, vocab_size=vocab_size, end_ids=end_ids)
        self._intake = Intake(own, vocab_size, self.max_context, end_ids, grammars)
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._arriving: deque[Job] = deque()
        self._cancelled: deque[int] = deque()
        self._stop_at: float | None = None  # on the monotonic clock, once it is closed
        self._is_dead = False
        self._thread = threading.Thread(target=self._run, name="hrwkv-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path | str, settings: EngineSettings | None = None) -> Engine:
        """An engine on one of our directories or a teacher's. Raises CheckpointError or ValueError."""
        path, settings = Path(path), settings or EngineSettings()
        if not path.is_dir():
            raise ValueError(f"{path} is no directory: give that of a model on this machine")
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no GPU here: take cpu or auto")
        dtype = settings.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        tokenizer = open_tokenizer(path)
        model = load_model(path, dtype=getattr(torch, dtype), device=device)
        ends = _ids(model.config.eos_token_id) | _ids(tokenizer.eos_token_id)
        if (path / "generation_config.json").exists():
            ends |= _ids(GenerationConfig.from_pretrained(path).eos_token_id)
        return cls(model, tokenizer, settings, end_ids=ends)

    @property
    def is_alive(self) -> bool:
        """True while it takes requests."""
        return self._thread.is_alive() and not self._is_dead and self._stop_at is None

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Request:
        """A prompt of token ids into the line. priority: the lower goes first. deadline: seconds from now.

        Raises ValueError for what the model does not know, CapacityError for what could never run,
        QueueFullError if the line is full, EngineError if the engine has stopped.
        """
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline is {deadline!r}, expected more than 0 seconds, or none")
        now = time.monotonic()
        with self._changed:
            self._check_open()
            number = next(self._numbers)
        request = Request(number, params.n, cancel=self._cancel)
        # Outside the lock: a grammar may take a while to compile.
        job = self._intake.job(prompt, params, priority=priority, number=number, sink=request, now=now)
        if deadline is not None:
            job.deadline = now + deadline
        with self._changed:
            self._check_open()
            self._arriving.append(job)
            self._changed.notify()
        return request

    def check_grammar(self, grammar: Grammar) -> None:
        """Raise what ``submit`` would for such a form of an answer: GrammarError, ValueError."""
        self._intake.grammars.compile(grammar)

    def generate(self, prompts: Iterable[Sequence[int]], params: SamplingParams) -> list[Answer]:
        """Whole answers in the order of the prompts, n in a row for each; waits for all.

        Any number of prompts: those that find the line full are submitted when it is shorter. Raises as
        ``submit`` does.
        """
        answers: list[Answer] = []
        waiting: deque[Request] = deque()
        try:
            for prompt in prompts:
                while (request := self._try_submit(prompt, params)) is None:
                    if not waiting:
                        raise QueueFullError("the line is full of other requests: come again later")
                    answers += _collect(waiting.popleft(), params.n)
                waiting.append(request)
            while waiting:
                answers += _collect(waiting.popleft(), params.n)
        finally:
            for request in waiting:
                request.cancel()
        return answers

    def stats(self) -> EngineStats:
        """Counts for whoever watches; may be called from any thread."""
        core, memory, sizes = self._core, self._core.scheduler.memory, self._sizes
        slots, blocks = memory.slots.used, memory.blocks.used
        return EngineStats(
            queued=core.num_queued + len(self._arriving),
            running=len(core.scheduler.running),
            prompt_tokens=core.totals.prompt_tokens,
            prompt_tokens_reused=core.totals.prompt_tokens_reused,
            generated_tokens=core.totals.generated_tokens,
            preempted=core.totals.preempted,
            first_token=core.totals.first_token.copy(),
            inter_token=core.totals.inter_token.copy(),
            kv_blocks_used=blocks,
            kv_blocks_total=sizes.blocks,
            state_slots_used=slots,
            state_slots_total=sizes.slots,
            state_bytes=slots * sizes.slot_bytes,
            kv_bytes=blocks * sizes.block_bytes,
            prefix_bytes=memory.kept.used * sizes.page_bytes,
            healthy=self.is_alive,
        )

    def close(self, timeout: float = 30.0) -> None:
        """Take no more requests, let those that are there finish for ``timeout`` seconds, abort the rest."""
        with self._changed:
            stop_at = time.monotonic() + timeout
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.close(0)

    def _check_open(self) -> None:
        if self._stop_at is not None:
            raise EngineError("the engine is closed")
        if self._is_dead:
            raise EngineError("the engine has failed: start it again, its log says why")
        waiting = self._core.num_queued + len(self._arriving)
        if waiting >= self._settings.max_waiting:
            raise QueueFullError(f"{waiting} requests wait already: come again later")

    def _try_submit(self, prompt: Sequence[int], params: SamplingParams) -> Request | None:
        try:
            return self.submit(prompt, params)
        except QueueFullError:
            return None

    def _cancel(self, number: int) -> None:
        with self._changed:
            self._cancelled.append(number)
            self._changed.notify()

    def _run(self) -> None:
        error = EngineError("the engine is closed")
        try:
            while self._take_in():
                self._core.step()
        except Exception as failure:
            logger.exception("the engine has failed")
            error = EngineError(f"the engine has failed ({type(failure).__name__}): its log says why")
        finally:
            with self._changed:
                self._is_dead = True
                arriving = list(_drain(self._arriving))
            self._core.fail_all(error)
            for job in arriving:
                job.sink.fail(error)

    def _take_in(self) -> bool:
        """Wait for work and take in what came; False when there is none and never will be."""
        with self._changed:
            while not (self._arriving or self._cancelled or self._core.has_work or self._stop_at is not None):
                self._changed.wait()
            arriving, cancelled = list(_drain(self._arriving)), list(_drain(self._cancelled))
            for job in arriving:
                self._core.add(job)
        for number in cancelled:
            self._core.abort(number)
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self._core.abort_all()
        return self._core.has_work or self._stop_at is None


def _collect(request: Request, num_choices: int) -> list[Answer]:
    """Read a request to its end: its choices in order."""
    parts: list[list[Event]] = [[] for _ in range(num_choices)]
    for event in request:
        parts[event.index].append(event)
    return [_answer(events) for events in parts]


def _answer(events: list[Event]) -> Answer:
    """All events of one choice as one."""
    whole = join(events)
    assert whole.finish_reason is not None
    return Answer(whole.text, whole.tokens, whole.finish_reason, whole.logprobs)


def _ids(found: int | list[int] | None) -> set[int]:
    """An end-of-sequence setting as a set."""
    return set(found) if isinstance(found, list) else set() if found is None else {found}


def _drain(items: deque[T]) -> Iterator[T]:
    """Take items out until there is none; others may add some meanwhile."""
    while items:
        yield items.popleft()
