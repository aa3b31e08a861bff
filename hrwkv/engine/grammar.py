"""Structured output: a JSON schema, regular expression or Lark grammar as a mask of allowed tokens per step.

The only file that knows llguidance, an optional package, which is imported when the first grammar comes. A
mask depends on the token before it, so it is made on the host: a sequence with a grammar waits for its own
token in each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hrwkv.engine.request import Grammar, GrammarError

WORD = 32


def allocate_mask(rows: int, vocab_size: int) -> NDArray[np.int32]:
    """[rows, ceil(vocab_size / 32)] int32 with every token allowed, as ``sampling.sample`` takes it."""
    return np.full((rows, -(-vocab_size // WORD)), -1, dtype=np.int32)


class GrammarCompiler:
    """Makes the state of a grammar for one tokenizer. Building what it needs takes a second, at first use.

    vocab_size: columns of the logits; tokens that the tokenizer does not have are never allowed. end_ids: the
    model's end-of-sequence tokens, which are allowed where the text may end.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, end_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, tuple(end_ids)

    def compile(self, grammar: Grammar) -> GrammarState:
        """The state at the beginning of a text.

        Raises GrammarError for a grammar that is wrong or too large, ValueError for a tokenizer that cannot
        be used with grammars, and without llguidance.
        """
        matcher_class, tokenizer = self._library.LLMatcher, self._vocabulary
        build = {
            "json_schema": matcher_class.grammar_from_json_schema,
            "regex": matcher_class.grammar_from_regex,
            "lark": matcher_class.grammar_from_lark,
        }[grammar.kind]
        matcher = matcher_class(tokenizer, build(grammar.text), log_level=0)
        state = GrammarState(matcher, end_ids=self._end_ids)
        state.check(f"the {grammar.kind} is not one that can be matched")
        return state

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise ValueError("a grammar needs llguidance: pip install hrwkv[serve]") from error
        return llguidance

    @cached_property
    def _vocabulary(self) -> Any:
        """llguidance's tokenizer."""
        from llguidance.hf import from_tokenizer

        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise ValueError("a grammar needs a tokenizer with a tokenizer.json, which this model has not")
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=list(self._end_ids))
        except ValueError as error:
            raise ValueError(f"this model's tokenizer cannot be used with grammars: {error}") from error


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: Any, *, end_ids: Sequence[int]) -> None:
        self._matcher, self._end_ids = matcher, end_ids

    @property
    def is_ended(self) -> bool:
        """True if nothing may follow: the text is complete, or an end token came."""
        return bool(self._matcher.is_stopped())

    def fill_mask(self, mask: NDArray[np.int32], row: int, *, may_end: bool = True) -> None:
        """Write the tokens allowed next into a row of ``allocate_mask``; not after the end.

        may_end: False (before ``min_tokens``) leaves out the end tokens, unless only they are allowed. Raises
        GrammarError if the grammar turns out too complex.
        """
        from llguidance.numpy import fill_next_token_bitmask

        assert not self.is_ended, "a mask after the end"
        fill_next_token_bitmask(self._matcher, mask, row)
        self.check("the grammar cannot go on")
        if may_end:
            return
        rest = mask[row].copy()
        for token in self._end_ids:
            rest.view(np.uint32)[token // WORD] &= ~np.uint32(1 << token % WORD)
        if rest.any():
            mask[row] = rest

    def accept(self, token: int) -> None:
        """Move past a token. Raises GrammarError if the mask did not allow it, or for too much complexity."""
        self._matcher.consume_token(token)
        self.check("the grammar cannot go on")

    def fork(self) -> GrammarState:
        """The same state, to be moved on by itself."""
        return GrammarState(self._matcher.deep_copy(), end_ids=self._end_ids)

    def check(self, what: str) -> None:
        """Raise GrammarError, in one line, if the matcher has failed."""
        if self._matcher.is_error():
            first, *_ = self._matcher.get_error().split("<state>")
            raise GrammarError(f"{what}: {' '.join(first.split())[:300]}")
