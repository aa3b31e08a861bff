"""What a request must be before it may wait in line: whole, in range, and small enough to run alone."""

from __future__ import annotations

import operator
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hrwkv.engine.core import Choice, Job, Sink
from hrwkv.engine.grammar import GrammarCompiler
from hrwkv.engine.request import CapacityError, SamplingParams, TokenLogprob
from hrwkv.engine.sampling import SequenceSampling, choice_seed
from hrwkv.engine.scheduler import Sequence
from hrwkv.engine.text import TextStream


@dataclass(frozen=True)
class Intake:
    """Prompts to jobs. max_context: tokens of prompt and answer together. end_ids: they end an answer."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_context: int
    end_ids: tuple[int, ...]
    grammars: GrammarCompiler

    def job(
        self, prompt: Rows[int], params: SamplingParams, *, priority: int, number: int, sink: Sink, now: float
    ) -> Job:
        """A job that can run. number: of its arrival; now: when it came, in seconds.

        Raises ValueError for token ids that the model does not have and for a grammar that does not compile,
        CapacityError, with the numbers, for what could never run.
        """
        tokens = self._checked(prompt)
        self._check_ids(params)
        limit = self._limit(len(tokens), params)
        grammar = None if params.grammar is None else self.grammars.compile(params.grammar)
        choices = [
            Choice(
                index,
                Sequence(
                    (priority, number, index),
                    list(tokens),
                    limit,
                    grammar=None if grammar is None else grammar.fork(),
                    sampling=SequenceSampling(params, choice_seed(params, index), len(tokens), self.end_ids),
                    prompt_scores=params.prompt_logprobs if index == 0 else None,
                ),
                TextStream(self.tokenizer, tokens, params=params, end_ids=self.end_ids),
                params.include_stop,
            )
            for index in range(params.n)
        ]
        if len(tokens) > 1:  # all but its last token are read once, for all answers
            choices[0].sequence.siblings = [choice.sequence for choice in choices[1:]]
        job = Job(number, tokens, params, choices, sink, arrived=now)
        if params.prompt_logprobs is not None:
            job.prompt_logprobs.append(TokenLogprob(tokens[0], None))
        return job

    def _checked(self, prompt: Rows[int]) -> list[int]:
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError as error:
            raise ValueError(f"the prompt is not a list of token ids: {error}") from error
        if not tokens:
            raise ValueError("the prompt has no tokens, expected at least one: begin with some text")
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} in the prompt, expected 0 to {self.vocab_size - 1}")
        return tokens

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"token id {token} in {name}, expected 0 to {self.vocab_size - 1}")

    def _limit(self, num_prompt: int, params: SamplingParams) -> int:
        """Tokens of prompt and answer at most."""
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if num_prompt + wanted > self.max_context:
            raise CapacityError(
                f"the prompt has {num_prompt} tokens and the answer up to {wanted}, expected at most "
                f"{self.max_context} together: shorten the prompt or lower max_tokens"
            )
        return self.max_context if params.max_tokens is None else num_prompt + params.max_tokens
