"""Answers of the recall tasks can be read off the prompt, and only off the part before them."""

import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrwkv.data.passkey import leading_special_ids
from hrwkv.data.recall import MAX_LOOKUPS, RecallTasks

TEXT = np.arange(3, 203, dtype=np.int32)


@pytest.fixture(params=["tokenizer", "merging_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), length=st.integers(150, 400))
def test_every_kind_fits_its_length_and_marks_its_last_tokens(any_tokenizer, seed, length):
    tasks = RecallTasks(any_tokenizer, TEXT)
    for kind, make in tasks.kinds.items():
        sample = make(length, random.Random(seed))
        assert len(sample.token_ids) <= length
        assert len(sample.token_ids) > length // 2 or kind == "associative"
        assert sample.places == sorted(set(sample.places))
        assert sample.places[0] > 0
        assert sample.places[-1] == len(sample.token_ids) - 1


def test_passkey_answers_are_the_key_of_the_needle(any_tokenizer):
    tasks = RecallTasks(any_tokenizer, TEXT)
    sample = tasks.passkey(200, random.Random(5))
    answer = any_tokenizer.decode([sample.token_ids[place] for place in sample.places]).strip()
    assert len(sample.token_ids) == 200
    told = re.findall(r"pass key is (\d{5})\.", any_tokenizer.decode(sample.token_ids))
    assert told == [answer]


def test_lookup_asks_for_lines_that_stand_before(any_tokenizer):
    sample = RecallTasks(any_tokenizer, TEXT).lookup(300, random.Random(3))
    lines = re.findall(r"(\d{5}): (\d{5})", any_tokenizer.decode(sample.token_ids))
    asked, told = lines[-MAX_LOOKUPS:], dict(lines[:-MAX_LOOKUPS])
    assert len(told) == len(lines) - MAX_LOOKUPS
    assert all(told[key] == value for key, value in asked)
    # What is scored are the values and nothing of the keys.
    scored = any_tokenizer.decode([sample.token_ids[place] for place in sample.places])
    assert scored.replace(" ", "") == "".join(value for _, value in asked)


def test_associative_queries_repeat_every_pair(any_tokenizer):
    sample = RecallTasks(any_tokenizer, TEXT).associative(101, random.Random(3))
    ids = sample.token_ids[len(leading_special_ids(any_tokenizer)) :]
    half = len(ids) // 2
    pairs = [tuple(ids[i : i + 2]) for i in range(0, half, 2)]
    queries = [tuple(ids[i : i + 2]) for i in range(half, 2 * half, 2)]
    assert sorted(pairs) == sorted(queries)
    assert len({key for key, _ in pairs}) == len(pairs) == 25 - (len(ids) < 100)
    assert [sample.token_ids[place] for place in sample.places] == [value for _, value in queries]


def test_seed_and_kind_decide_the_samples(tokenizer):
    tasks = RecallTasks(tokenizer, TEXT)
    first = tasks.samples("lookup", lengths=(150, 200), count=2, seed=1)
    assert first == tasks.samples("lookup", lengths=(150, 200), count=2, seed=1)
    assert first != tasks.samples("lookup", lengths=(150, 200), count=2, seed=2)
    assert [len(sample.token_ids) > 150 for sample in first] == [False, False, True, True]


@pytest.mark.parametrize("kind", ["passkey", "lookup", "associative"])
def test_too_short_a_length_is_told(kind, tokenizer):
    with pytest.raises(ValueError, match="too short"):
        RecallTasks(tokenizer, TEXT).samples(kind, lengths=(3,), count=1, seed=0)


def test_a_text_of_one_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="1 different tokens: give more text"):
        RecallTasks(tokenizer, np.full(9, 7, dtype=np.int32))
