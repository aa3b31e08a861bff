"""Log-probabilities where the plain cases end: characters in parts, impossible tokens, first tokens."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hrwkv.engine.request import TokenLogprob
from hrwkv.server.logprobs import IMPOSSIBLE, Logprobs
from tests.server.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
# The two bytes of one character, which alone are both "\ufffd".
FIRST, SECOND = TOKENIZER("\u00e9")["input_ids"]
LETTER = TOKENIZER("a")["input_ids"][0]


def test_tokens_that_look_alike_keep_the_largest_value() -> None:
    """lm-eval calls a token greedy if its value is the largest of the entries, so that one must be there."""
    entry = TokenLogprob(SECOND, -2.0, ((FIRST, -0.5), (LETTER, -1.0), (SECOND, -2.0)))
    found = Logprobs(TOKENIZER).completion([entry], offset=7)
    assert found["top_logprobs"] == [{"\ufffd": -0.5, "a": -1.0}]
    assert (found["token_logprobs"], found["text_offset"]) == ([-2.0], [7])


def test_the_token_itself_is_among_the_rivals() -> None:
    found = Logprobs(TOKENIZER).completion([TokenLogprob(LETTER, -3.0, ((FIRST, -0.5),))], offset=0)
    assert found["top_logprobs"] == [{"\ufffd": -0.5, "a": -3.0}]


def test_the_first_token_of_a_prompt_has_no_values() -> None:
    found = Logprobs(TOKENIZER).completion([TokenLogprob(LETTER, None), TokenLogprob(LETTER, -1.0)], offset=0)
    assert found["token_logprobs"] == [None, -1.0]
    assert found["top_logprobs"] == [None, {"a": -1.0}]
    assert found["text_offset"] == [0, 1]


def test_impossible_tokens_are_numbers_in_json() -> None:
    entry = TokenLogprob(LETTER, float("-inf"), ((LETTER, float("-inf")),))
    logprobs = Logprobs(TOKENIZER)
    for found in (logprobs.completion([entry], offset=0), logprobs.chat([entry])):
        assert str(IMPOSSIBLE) in json.dumps(found, allow_nan=False)


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: characters, and bytes of those that it does not have."""
    vocab = {name: number for number, name in enumerate(["a", "\ufffd", "<0xC3>", "<0xA9>"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, fallback_tokenizer()], ids=["bytes", "fallback"])
def test_bytes_of_tokens_are_those_of_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Parts of a character had none, so a client could not put them together."""
    ids = tokenizer("a\u00e9", add_special_tokens=False)["input_ids"]
    entries = Logprobs(tokenizer).chat([TokenLogprob(token, -1.0) for token in ids])
    assert [entry["bytes"] for entry in entries] == [[0x61], [0xC3], [0xA9]]
    assert [entry["token"] for entry in entries] == ["a", "\ufffd", "\ufffd"]


def test_bytes_that_are_not_known_are_null() -> None:
    assert Logprobs(fallback_tokenizer()).chat([TokenLogprob(1, -1.0)])[0]["bytes"] is None
