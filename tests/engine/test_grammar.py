"""Random walks along the masks: what they write matches, and nothing that would match is left out."""

import json
import random
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hrwkv.engine.grammar import GrammarCompiler, GrammarState, allocate_mask
from hrwkv.engine.request import Grammar, SamplingParams
from hrwkv.engine.sampling import SamplingBatch, SequenceSampling, sample
from tests.tokenizers import byte_tokenizer, byte_tokens

END, VOCAB = 256, 301
BYTE = byte_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["na\u00efve", "b"]},
        "counts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "done": {"type": "boolean"},
    },
    "required": ["name", "counts", "done"],
    "additionalProperties": False,
}


def compiler(vocab_size: int = VOCAB) -> GrammarCompiler:
    return GrammarCompiler(BYTE, vocab_size=vocab_size, end_ids=[END])


COMPILER = compiler()


def allowed(state: GrammarState, *, may_end: bool = True) -> list[int]:
    mask = allocate_mask(2, VOCAB)
    state.fill_mask(mask, 1, may_end=may_end)
    assert (mask[0] == -1).all()
    bits = np.unpackbits(mask[1].view(np.uint8), bitorder="little")
    return [int(token) for token in bits.nonzero()[0]]


def walk(state: GrammarState, seed: int) -> tuple[str, bool]:
    """A text of at most 300 tokens, drawn evenly from the masks, and whether the grammar ended it."""
    rng, tokens = random.Random(seed), []
    while not state.is_ended and len(tokens) < 300:
        tokens.append(rng.choice(allowed(state)))
        state.accept(tokens[-1])
    return str(BYTE.decode(tokens, skip_special_tokens=True)), state.is_ended


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_a_json_schema_gives_valid_json(seed: int) -> None:
    text, ended = walk(COMPILER.compile(Grammar("json_schema", json.dumps(SCHEMA))), seed)
    assume(ended)  # white space may go on for ever
    value = json.loads(text)
    assert list(value) == ["name", "counts", "done"]
    assert value["name"] in ("na\u00efve", "b")
    assert len(value["counts"]) <= 3
    assert all(type(count) is int and 0 <= count <= 9 for count in value["counts"])
    assert isinstance(value["done"], bool)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(["a{2,5}b|\u20ac[0-3]+", "(x|yz){1,4}", "[0-9]{3}-[^a]"]),
)
def test_a_regular_expression_gives_what_it_matches(seed: int, pattern: str) -> None:
    text, ended = walk(COMPILER.compile(Grammar("regex", pattern)), seed)
    assert ended == bool(re.fullmatch(pattern, text))
    assert ended or len(text) > 50


def test_a_lark_grammar_gives_its_language() -> None:
    grammar = Grammar("lark", 'start: pair+\npair: "(" pair* ")"')
    for seed in range(5):
        text, ended = walk(COMPILER.compile(grammar), seed)
        depth = [text[:end].count("(") - text[:end].count(")") for end in range(1, len(text) + 1)]
        assert set(text) == {"(", ")"}
        assert min(depth) == 0 or not ended
        assert not ended or depth[-1] == 0


def test_the_mask_allows_exactly_what_can_go_on() -> None:
    state = COMPILER.compile(Grammar("regex", "ab?"))
    a, b = byte_tokens(b"ab")
    assert allowed(state) == [a]
    state.accept(a)
    assert allowed(state) == sorted([b, END])
    assert allowed(state, may_end=False) == [b]
    other = state.fork()
    state.accept(b)
    assert state.is_ended
    assert not other.is_ended
    other.accept(END)
    assert other.is_ended


def test_an_end_that_is_the_only_way_stays_allowed_before_min_tokens() -> None:
    """Without it the row would have no token at all and would draw token 0."""
    core = Tokenizer(models.BPE({"a": 0}, []))
    core.decoder = decoders.ByteLevel()
    only_a = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    state = GrammarCompiler(only_a, vocab_size=2, end_ids=[1]).compile(Grammar("regex", "ab?"))
    state.accept(0)
    mask = allocate_mask(1, 2)
    state.fill_mask(mask, 0, may_end=False)
    assert mask[0, 0] == 0b10


def test_a_sampled_row_obeys_its_mask_and_the_others_are_free() -> None:
    state = COMPILER.compile(Grammar("regex", "[ab]{40}"))
    params = SamplingParams(temperature=0.0)
    members = [SequenceSampling(params, 0, 1), SequenceSampling(SamplingParams(temperature=5.0), 1, 1)]
    batch = SamplingBatch.build(members, vocab_size=VOCAB, device="cpu")
    logits = torch.arange(2.0 * VOCAB).view(2, VOCAB)
    tokens = []
    while not state.is_ended:
        mask = allocate_mask(2, VOCAB)
        state.fill_mask(mask, 1)
        result = sample(
            logits, batch, positions=torch.tensor([1, len(tokens)]), bitmask=torch.from_numpy(mask)
        )
        assert result.tokens[0] == VOCAB - 1
        tokens.append(int(result.tokens[1]))
        state.accept(tokens[-1])
    assert len(tokens) == 40
    assert set(tokens) == set(byte_tokens(b"ab"))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"type": "foo"}', "json_schema .*Invalid type"),
        ("json_schema", "{", "json_schema .*expected"),
        ("json_schema", '{"not": {}}', "json_schema .*Unimplemented"),
        ("json_schema", '{"enum": []}', "json_schema .*Unsatisfiable"),
        ("regex", "a(b", "regex .*unclosed group"),
        ("regex", "(?=x)y", "regex .*look-around"),
        ("lark", "start: foo", "lark .*unknown name"),
    ],
)
def test_a_wrong_grammar_is_refused_in_one_line(kind: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        COMPILER.compile(Grammar(kind, text))
    assert "\n" not in str(caught.value)


def test_a_token_that_the_mask_forbids_is_refused() -> None:
    state = COMPILER.compile(Grammar("regex", "ab"))
    with pytest.raises(ValueError, match="cannot go on: .*doesn't satisfy") as caught:
        state.accept(byte_tokens(b"k")[0])
    assert "\n" not in str(caught.value)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be used with grammars: .*too small"):
        compiler(100).compile(Grammar("regex", "a"))


def test_without_llguidance_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install hrwkv\[serve\]"):
        compiler().compile(Grammar("regex", "a"))
