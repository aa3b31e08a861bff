"""What a request gets that says nothing."""

from typing import Any

import pytest
from transformers import GenerationConfig

from hrwkv.server.errors import ApiError
from hrwkv.server.params import Defaults, chat_params, completion_params
from hrwkv.server.schemas import ChatRequest, CompletionRequest

MAKER = GenerationConfig(
    temperature=0.6,
    top_p=0.95,
    top_k=1024,
    stop_strings=[" <sep>"],
    repetition_penalty=1.1,
)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


@pytest.mark.parametrize(
    ("sampling", "expected"), [(True, (0.6, 0.95, 100, 1.1)), (False, (1.0, 1.0, 0, 1.0))]
)
def test_the_makers_sampling_is_a_default(sampling: bool, expected: tuple[float, ...]) -> None:
    defaults = Defaults.from_config(MAKER, sampling=sampling)
    body = CompletionRequest(prompt="a")
    got = completion_params(body, defaults, vocab_size=100)
    # More tokens than there are is all of them.
    assert (got.temperature, got.top_p, min(got.top_k, 100), got.repetition_penalty) == expected
    assert (got.stop, got.stop_token_ids) == ((), ())
    given = CompletionRequest(prompt="a", temperature=0.0, top_p=0.5, top_k=-1, repetition_penalty=1.0)
    got = completion_params(given, defaults, vocab_size=100)
    assert (got.temperature, got.top_p, got.top_k, got.repetition_penalty) == (0.0, 0.5, 0, 1.0)


def test_a_chat_ends_where_the_model_ends_its_answers() -> None:
    defaults = Defaults.from_config(MAKER, sampling=False)
    got = chat_params(chat(stop="x", stop_token_ids=[3, 7]), defaults, vocab_size=100)
    assert (got.stop, got.stop_token_ids) == (("x", " <sep>"), (3, 7))


def test_a_single_stop_text_is_a_list_of_one() -> None:
    assert Defaults.from_config(GenerationConfig(stop_strings="x"), sampling=True).stop == ("x",)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
    ],
)
def test_lengths_of_a_chat(fields: dict[str, int], expected: int | None) -> None:
    assert chat_params(chat(**fields), Defaults(), vocab_size=100).max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": False}, None),
    ],
)
def test_logprobs_of_a_chat(fields: dict[str, Any], expected: int | None) -> None:
    assert chat_params(chat(**fields), Defaults(), vocab_size=100).logprobs == expected


def test_top_logprobs_alone_are_refused() -> None:
    with pytest.raises(ApiError, match="without logprobs true"):
        chat_params(chat(top_logprobs=3), Defaults(), vocab_size=100)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a", **fields})


OUT_OF_RANGE: dict[str, Any] = {
    "max_tokens": -1,
    "min_tokens": -1,
    "temperature": 101,
    "top_p": 0,
    "top_k": -2,
    "min_p": 1.5,
    "presence_penalty": 3,
    "frequency_penalty": -3,
    "repetition_penalty": 0,
    "n": 0,
    "stop": ["a", ""],
    "logit_bias": {"1": 101},
    "stop_token_ids": [100],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_its_field(name: str) -> None:
    """Only the message had the name, and ``param``, which clients read, was null."""
    for body, params in ((chat, chat_params), (completion, completion_params)):
        given: Any = body(**{name: OUT_OF_RANGE[name]})
        with pytest.raises(ApiError, match=f": {name} ") as caught:
            params(given, Defaults(), vocab_size=100)
        assert (caught.value.status_code, caught.value.param) == (400, name)


@pytest.mark.parametrize(
    ("body", "params", "name"),
    [
        (chat(logprobs=True, top_logprobs=21), chat_params, "top_logprobs"),
        (chat(max_tokens=5, max_completion_tokens=0), chat_params, "max_completion_tokens"),
        (completion(logprobs=21), completion_params, "logprobs"),
        (completion(logprobs=-1, echo=True, max_tokens=0), completion_params, "logprobs"),
    ],
)
def test_a_refusal_has_the_requests_own_name_of_the_field(body: Any, params: Any, name: str) -> None:
    with pytest.raises(ApiError, match=f": {name} is ") as caught:
        params(body, Defaults(), vocab_size=100)
    assert caught.value.param == name


@pytest.mark.parametrize(("own", "given", "fits"), [(16, 16, True), (16, 17, False), (0, 17, False)])
def test_the_models_own_stops_take_none_of_a_clients(own: int, given: int, fits: bool) -> None:
    """A client's limit was 16 less the model's own, which it cannot know."""
    defaults = Defaults(stop=tuple(f"own {number}" for number in range(own)))
    body = chat(stop=[str(number) for number in range(given)])
    if fits:
        assert len(chat_params(body, defaults, vocab_size=100).stop) == own + given
        return
    with pytest.raises(ApiError, match="stop has 17 texts, expected at most 16") as caught:
        chat_params(body, defaults, vocab_size=100)
    assert caught.value.param == "stop"


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        ({"json": {}, "regex": "a"}, "structured_outputs.json and structured_outputs.regex are both given"),
        ({"choice": []}, "structured_outputs.choice has no choice"),
        ({"regex": "a" * (2**17 + 1)}, "structured_outputs.regex has 131073 characters"),
    ],
)
def test_a_form_that_is_wrong_is_named_with_its_kind(forms: dict[str, Any], says: str) -> None:
    """Two of them were "structured_outputs and structured_outputs"."""
    with pytest.raises(ApiError, match=says) as caught:
        chat_params(chat(structured_outputs=forms), Defaults(), vocab_size=100)
    assert caught.value.param == "structured_outputs"
