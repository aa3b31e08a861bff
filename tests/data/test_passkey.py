import itertools
import random

import numpy as np
import pytest
import torch

from hrwkv.data.passkey import NEEDLE, QUESTION, PasskeyTask, leading_special_ids, random_key

FILLER = list(range(3, 203))
LENGTHS = (100, 101, 137, 256)


@pytest.fixture(params=["split-digits", "merged-digits-with-begin"])
def any_tokenizer(request: pytest.FixtureRequest):
    name = "tokenizer" if request.param == "split-digits" else "merging_tokenizer"
    return request.getfixturevalue(name)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("key", ["48137", "20242", "00070"])
def test_prompt_is_filler_with_the_needle_spliced_in_and_the_question_last(any_tokenizer, length, depth, key):
    task = PasskeyTask(any_tokenizer)
    prompt, answer = task.make(FILLER, length=length, depth=depth, key=key, generator=random.Random(1))
    assert len(prompt) == length
    start = leading_special_ids(any_tokenizer)
    assert prompt[: len(start)] == start
    question, _ = task.question_and_answer_ids(key)
    needle = task.needle_ids(key)
    body = prompt[len(start) : length - len(question)]
    assert prompt[length - len(question) :] == question
    at = round(depth * (len(body) - len(needle)))
    assert body[at : at + len(needle)] == needle
    window = body[:at] + body[at + len(needle) :]
    assert window == list(range(window[0], window[0] + len(window))) or len(window) > len(FILLER)
    assert any_tokenizer.decode(question + answer) == QUESTION + key


def test_needle_tells_the_key_twice(any_tokenizer):
    assert any_tokenizer.decode(PasskeyTask(any_tokenizer).needle_ids("48137")) == NEEDLE.format(key="48137")


def test_question_and_answer_are_the_tokens_of_the_whole_text(any_tokenizer):
    task = PasskeyTask(any_tokenizer)
    for key in ("48137", "20242", "00000", "98765"):
        question, answer = task.question_and_answer_ids(key)
        assert question + answer == any_tokenizer.encode(QUESTION + key, add_special_tokens=False)
        assert answer


def test_split_digits_give_five_answer_tokens(tokenizer):
    _, answer = PasskeyTask(tokenizer).question_and_answer_ids("04813")
    assert [tokenizer.decode([token]) for token in answer] == list("04813")


def test_a_space_that_merges_with_the_digits_belongs_to_the_answer(merging_tokenizer):
    question, answer = PasskeyTask(merging_tokenizer).question_and_answer_ids("20242")
    assert merging_tokenizer.decode(question) == QUESTION.removesuffix(" ")
    assert merging_tokenizer.decode(answer) == " 20242"
    assert len(answer) < 5


def test_short_filler_is_repeated(tokenizer):
    prompt, _ = PasskeyTask(tokenizer).make(
        [7, 8, 9], length=120, depth=0.0, key="12345", generator=random.Random(0)
    )
    needle = len(PasskeyTask(tokenizer).needle_ids("12345"))
    assert prompt[needle : needle + 7] == [7, 8, 9, 7, 8, 9, 7]


def test_filler_forms_are_equal(tokenizer):
    task = PasskeyTask(tokenizer)
    prompts = [
        task.make(filler, length=150, depth=0.5, key="12345", generator=random.Random(4))
        for filler in (FILLER, torch.tensor(FILLER), np.array(FILLER, dtype=np.int32))
    ]
    assert prompts[0] == prompts[1] == prompts[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 20}, "a passkey prompt of 20 tokens is too short: needle and question take"),
        ({"depth": 1.5}, "passkey depth is 1.5, expected 0 to 1"),
        ({"key": "1234"}, "passkey '1234' is not a string of 5 digits"),
        ({"key": "12a45"}, "passkey '12a45' is not a string of 5 digits"),
        ({"filler_ids": []}, "passkey filler is empty"),
    ],
    ids=["short", "depth", "four-digits", "letter", "no-filler"],
)
def test_bad_arguments_are_refused(tokenizer, change, message):
    arguments = {"filler_ids": FILLER, "length": 150, "depth": 0.5, "key": "12345"} | change
    with pytest.raises(ValueError, match=message):
        PasskeyTask(tokenizer).make(generator=random.Random(0), **arguments)


def test_documents_have_the_lengths_and_ask_for_the_key_that_they_tell(any_tokenizer):
    task = PasskeyTask(any_tokenizer)
    shortest, counts = task.shortest_document, set()
    stream = task.documents([5] * 50, min_length=shortest, max_length=3 * shortest, seed=3)
    for ids in itertools.islice(stream, 60):
        assert shortest <= len(ids) <= 3 * shortest
        text = any_tokenizer.decode(ids)
        key = text.split("The pass key is ")[1][:5]
        told, *asked = text.split(QUESTION)
        assert NEEDLE.format(key=key) in told
        assert all(piece.startswith(key + "\n") for piece in asked)
        counts.add(len(asked))
    assert counts == {1, 2, 3}


def test_documents_repeat_with_the_seed_only(tokenizer):
    def first(seed: int) -> list[list[int]]:
        stream = PasskeyTask(tokenizer).documents(FILLER, min_length=120, max_length=200, seed=seed)
        return list(itertools.islice(stream, 5))

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert len({tuple(ids) for ids in first(1)}) == 5


def test_too_short_documents_are_refused(tokenizer):
    task = PasskeyTask(tokenizer)
    with pytest.raises(ValueError, match="passkey documents of 30 tokens are too short: give at least"):
        task.document(FILLER, length=30, seed=0)
    with pytest.raises(ValueError, match="give the shorter first"):
        next(task.documents(FILLER, min_length=200, max_length=150, seed=0))


def test_template_filled_with_a_key_is_the_tokenised_text(tokenizer):
    task = PasskeyTask(tokenizer)
    template = task.template()
    for key in ("04813", "99999"):
        digits = template.digits[torch.tensor([int(digit) for digit in key])]
        needle, question = template.needle.clone(), template.question.clone()
        needle[template.needle_slots] = digits
        question[template.question_slots] = digits
        assert needle.tolist() == task.needle_ids(key)
        assert question.tolist() == tokenizer.encode(QUESTION + key + "\n", add_special_tokens=False)


def test_template_needs_single_digits(merging_tokenizer):
    with pytest.raises(ValueError, match="does not split digits into one token each"):
        PasskeyTask(merging_tokenizer).template()


def test_random_keys_are_five_digits_with_leading_zeros():
    generator = random.Random(0)
    keys = [random_key(generator) for _ in range(200)]
    assert all(len(key) == 5 and key.isdigit() for key in keys)
    assert any(key.startswith("0") for key in keys)
    assert len(set(keys)) > 190
