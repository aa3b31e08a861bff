"""``EngineCore``: requests in, events out, one step at a time, in one thread and without a clock of its own.

``Engine`` is this in a thread. A step that fails does not end it: the sequences of the step go back into the
line with nothing computed, since a forward that stopped half-way has left their memory half-written, and run
alone until each has its next token. The one that fails alone is at fault, and only its request fails.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from hrwkv.engine.request import (
    EngineError,
    Event,
    FinishReason,
    GrammarError,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from hrwkv.engine.runner import Runner, Sampled, Scored, Step
from hrwkv.engine.scheduler import Plan, Scheduler, Sequence
from hrwkv.engine.text import TextStream

logger = logging.getLogger(__name__)
# Seconds up to which each bucket of a histogram counts; one more holds the rest.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Sink(Protocol):
    """Where the events of a request go."""

    def put(self, event: Event) -> None:
        """The next event."""

    def fail(self, error: Exception) -> None:
        """No more events."""


@dataclass(eq=False)
class Choice:
    """One answer: its tokens for the scheduler, its text, and the tokens that no event has carried yet."""

    index: int
    sequence: Sequence
    text: TextStream
    includes_stop: bool
    held: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)
    last_time: float | None = None
    is_first_event: bool = True

    def add(self, token: int, logprob: TokenLogprob | None) -> str:
        """Text that a new token completes. An end token is no part of the answer, unless it is asked for."""
        text = self.text.add(token)
        is_end = self.text.is_stopped and not isinstance(self.text.stop_reason, str)
        if not is_end or self.includes_stop:
            self.held.append((token, logprob))
        return text

    def take(self, text: str) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """The tokens behind this text, with their log-probabilities; those of hidden stop text never come."""
        if not text and isinstance(self.text.stop_reason, str):
            self.held = []
        taken, self.held = self.held, []
        return tuple(token for token, _ in taken), tuple(score for _, score in taken if score is not None)


@dataclass(eq=False)
class Job:
    """One request while it is worked on.

    number: of its arrival. deadline: on the clock of ``EngineCore``. num_reused: tokens of its prompt that an
    earlier one has left.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    choices: list[Choice]
    sink: Sink
    arrived: float
    deadline: float = math.inf
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    num_generated: int = 0
    num_reused: int = 0
    has_started: bool = False


@dataclass
class Histogram:
    """How many times, in seconds, were up to each of ``BOUNDS`` and above the one before; and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one time."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def copy(self) -> Histogram:
        """As it is now."""
        return Histogram(list(self.counts), self.total)


@dataclass
class Totals:
    """What has happened since the start.

    prompt_tokens_reused: of prompt_tokens, those that were not read again. first_token: from a request to
    each choice's first token. inter_token: from token to token of one choice.
    """

    prompt_tokens: int = 0
    prompt_tokens_reused: int = 0
    generated_tokens: int = 0
    preempted: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    inter_token: Histogram = field(default_factory=Histogram)


class EngineCore:
    """Scheduler and runner, and the requests behind their sequences."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        overlap: bool,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler, self.totals = scheduler, Totals()
        self._runner, self._overlap, self._clock = runner, overlap, clock
        self._jobs: dict[int, Job] = {}
        self._owners: dict[Sequence, tuple[Job, Choice]] = {}
        self._pending: Step | None = None
        self._soonest = math.inf  # no deadline is earlier
        self.num_queued = 0

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished, a step unread or an answer that has ended not kept."""
        return bool(self._jobs or self.scheduler.leaving) or self._pending is not None

    def add(self, job: Job) -> None:
        """Into the line with a request that fits (``Intake`` checks that)."""
        self._jobs[job.number] = job
        self._soonest = min(self._soonest, job.deadline)
        self.num_queued += 1
        siblings = job.choices[0].sequence.siblings
        for choice in job.choices:
            self._owners[choice.sequence] = job, choice
            if choice.sequence not in siblings:
                self.scheduler.add(choice.sequence)

    def abort(self, number: int) -> None:
        """End what is unfinished of a request with finish_reason "abort"; nothing if it has ended."""
        if (job := self._jobs.get(number)) is not None:
            for choice in job.choices:
                if not choice.sequence.is_finished:
                    self._finish(job, choice, "abort")

    def abort_all(self) -> None:
        """End every request so."""
        for number in list(self._jobs):
            self.abort(number)

    def fail_all(self, error: EngineError) -> None:
        """The end: every request gets the error. The scheduler is not asked, which may be what is broken."""
        jobs, self._jobs, self._pending, self.num_queued = self._jobs, {}, None, 0
        self._owners.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self.scheduler.leaving.clear()
        for job in jobs.values():
            job.sink.fail(error)

    def step(self) -> None:
        """Launch one step and read one, itself or with ``overlap`` the one before.

        Raises only if the device can do no more work.
        """
        self._abort_late()
        plan = self.scheduler.schedule()
        self._count(plan)
        launched = self._launch(plan)
        assert launched is not None or self._pending is not None or not self._jobs, "the engine stands still"
        earlier, self._pending = self._pending, None
        if earlier is not None and not self._read(earlier):
            return  # all that ran goes back into the line, the newer step's sequences too
        if isinstance(launched, Exception):
            self._recover(plan, launched)
        elif self._overlap:
            self._pending = launched
        elif launched is not None:
            self._read(launched)

    def _abort_late(self) -> None:
        now = self._clock()
        if now < self._soonest:
            return
        for job in [job for job in self._jobs.values() if job.deadline <= now]:
            self.abort(job.number)
        self._soonest = min((job.deadline for job in self._jobs.values()), default=math.inf)

    def _count(self, plan: Plan) -> None:
        self.totals.preempted += plan.num_preempted
        for piece in plan.pieces:
            job, _ = self._owners[piece.sequence]
            if not job.has_started:
                job.has_started = True
                self.num_queued -= 1
                job.num_reused = piece.start
                self.totals.prompt_tokens += len(job.prompt)
                self.totals.prompt_tokens_reused += job.num_reused

    def _launch(self, plan: Plan) -> Step | Exception | None:
        if not plan.moves and not plan.pieces:
            return None
        try:
            return self._runner.launch(plan)
        except Exception as error:
            return error.with_traceback(None)  # which holds the forward's tensors

    def _read(self, step: Step) -> bool:
        """Hand out what a step has computed; False if the device failed in it."""
        try:
            sampled, scored = step.read()
        except Exception as error:
            self._recover(step.plan, error.with_traceback(None))
            return False
        now = self._clock()
        failed = [each.sequence for each in sampled if each.failure is not None]
        self.scheduler.confirm(step.plan, failed=failed)
        for scores in scored:
            self._add_scores(scores)
        for each in sampled:
            if each.sequence.is_finished:  # it ended while this step was on its way
                continue
            job, choice = self._owners[each.sequence]
            if each.failure is not None:
                logger.error("request %d failed: %s", job.number, each.failure)
                self._fail(job, each.failure)
                continue
            self.scheduler.append(each.sequence, each.token)
            try:
                self._deliver(job, choice, each, now)
            except GrammarError as error:
                self._fail(job, error)
            except Exception as error:
                logger.exception("request %d failed", job.number)
                self._fail(job, EngineError(f"the answer's text failed ({describe(error)})"))
        return True

    def _recover(self, plan: Plan, error: Exception) -> None:
        """Put back all that ran, as suspects; fail the request of a suspect that failed alone."""
        logger.error("a step of %d sequences failed: %s", len(plan.pieces), describe(error))
        self._runner.recover()
        self.scheduler.drop_uncertain()
        blamed = [piece.sequence for piece in plan.pieces if piece.sequence in self.scheduler.suspects]
        for sequence in self.scheduler.doubtful():
            self.scheduler.restart(sequence)
        for sequence in blamed:
            if sequence in self._owners:
                failure = EngineError(f"the model failed on this request ({describe(error)})")
                self._fail(self._owners[sequence][0], failure)

    def _add_scores(self, scores: Scored) -> None:
        """Log-probabilities of a piece of a prompt; those computed again after a preemption are left out."""
        if scores.sequence in self._owners:
            known = self._owners[scores.sequence][0].prompt_logprobs
            known += scores.logprobs[len(known) - scores.first :]

    def _deliver(self, job: Job, choice: Choice, sampled: Sampled, now: float) -> None:
        """One more token of a choice: its text, and the event that is due."""
        self.totals.generated_tokens += 1
        job.num_generated += 1
        if choice.last_time is None:
            self.totals.first_token.add(now - job.arrived)
        else:
            self.totals.inter_token.add(now - choice.last_time)
        choice.last_time = now
        logprob, wanted = sampled.logprob, job.params.logprobs
        if logprob is not None:  # with as many rivals as any sequence of the step asked for
            logprob = None if wanted is None else replace(logprob, top=logprob.top[:wanted])
        sequence = choice.sequence
        if sequence.grammar is not None:
            sequence.grammar.accept(sampled.token)
        text = choice.add(sampled.token, logprob)
        is_complete = sequence.grammar is not None and sequence.grammar.is_ended
        if choice.text.is_stopped or is_complete or len(sequence.tokens) >= sequence.limit:
            self._finish(job, choice, "stop" if is_complete else "length", text)
        elif text:
            job.sink.put(self._event(job, choice, text))

    def _finish(self, job: Job, choice: Choice, reason: FinishReason, text: str = "") -> None:
        """The last event of a choice, for this reason unless its text has stopped by itself."""
        # Of several answers at most one is continued, and what they share is kept with the prompt.
        self.scheduler.finish(choice.sequence, keep=reason != "abort" and len(job.choices) == 1)
        del self._owners[choice.sequence]
        event = self._event(job, choice, text + choice.text.finish())
        if choice.text.is_stopped:
            reason = "stop"
        job.sink.put(replace(event, finish_reason=reason, stop_reason=choice.text.stop_reason))
        if all(other.sequence.is_finished for other in job.choices):
            self._forget(job)

    def _fail(self, job: Job, error: EngineError | GrammarError) -> None:
        for choice in job.choices:
            if not choice.sequence.is_finished:
                self.scheduler.finish(choice.sequence)
                del self._owners[choice.sequence]
        self._forget(job)
        job.sink.fail(error)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.number]
        self.num_queued -= not job.has_started

    def _event(self, job: Job, choice: Choice, text: str) -> Event:
        tokens, logprobs = choice.take(text)
        prompt_logprobs = (
            tuple(job.prompt_logprobs) if choice.is_first_event and job.prompt_logprobs else None
        )
        choice.is_first_event = False
        usage = Usage(len(job.prompt), job.num_generated, job.num_reused)
        return Event(choice.index, text, tokens, usage, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
