"""/v1/completions: every form of a prompt, echo, and the lists that lm-eval reads."""

from typing import Any

import pytest

from hrwkv.engine.request import SamplingParams
from tests.server.fakes import FakeEngine, ask, events, fake_app

PATH = "/v1/completions"


def shout(prompt: str, params: SamplingParams) -> list[list[str]]:
    """The prompt in capitals, in two pieces; later choices have more of them."""
    return [[prompt.upper() * (index + 1), "!"] for index in range(params.n)]


def texts(body: dict[str, Any]) -> list[str]:
    response = ask(fake_app(FakeEngine(shout)), PATH, body)
    assert response.status_code == 200
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["AB!"]),
        (["ab", "c"], ["AB!", "C!"]),
        ([64, 65], ["AB!"]),
        ([[64, 65], [66]], ["AB!", "C!"]),
    ],
)
def test_prompts_of_every_form(prompt: Any, expected: list[str]) -> None:
    # 64 and 65 are the ids of "a" and "b".
    assert texts({"prompt": prompt}) == expected


def test_choices_are_numbered_by_prompt_then_choice() -> None:
    assert texts({"prompt": ["a", "b"], "n": 2}) == ["A!", "AA!", "B!", "BB!"]


def test_usage_counts_all_prompts_and_choices() -> None:
    body = ask(fake_app(FakeEngine(shout)), PATH, {"prompt": ["ab", "c"], "n": 2}).json()
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == len("AB!ABAB!" + "C!CC!")
    assert body["usage"]["total_tokens"] == 3 + 13
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 + 2}
    assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "fake", "cmpl-")


def test_lm_eval_reads_its_scores() -> None:
    """It takes ``[context:-1]`` of both lists, and calls a token greedy where its value is the largest."""
    engine = FakeEngine(lambda prompt, params: [["Z"]])
    body = {
        "prompt": [[64, 65, 66], [67, 68]],
        "max_tokens": 1,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
    }
    choices = ask(fake_app(engine), PATH, body | {"seed": 1234, "temperature": 0}).json()["choices"]
    assert [request.params.prompt_logprobs for request in engine.requests] == [1, 1]
    for choice, context, expected in zip(choices, (1, 1), ([-0.65, -0.66], [-0.68]), strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][context:-1] == expected
        tops = logprobs["top_logprobs"][context:-1]
        assert [max(top.values()) for top in tops] == [-0.001] * len(expected)
        for value, top in zip(expected, tops, strict=True):
            assert value in top.values()
    assert [choice["text"] for choice in choices] == ["abcZ", "deZ"]
    assert choices[0]["logprobs"]["tokens"] == ["a", "b", "c", "Z"]
    assert choices[0]["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_echo_without_new_tokens() -> None:
    body = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = ask(fake_app(FakeEngine(lambda prompt, params: [["Z"]])), PATH, body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", ["a", "b"])
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "echo": True, "logprobs": 2}
    app = fake_app(FakeEngine(shout))
    whole = ask(app, PATH, body).json()["choices"]
    chunks = events(ask(app, PATH, body | {"stream": True}))
    for choice in whole:
        own = [piece for chunk in chunks for piece in chunk["choices"] if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in own for value in piece["logprobs"][name]] == values
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + ["stop"]


def test_parameters_reach_the_engine() -> None:
    engine = FakeEngine(shout)
    body = {
        **{"prompt": "a", "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 3},
        **{"min_p": 0.125, "n": 2, "seed": 9, "stop": ["x", "y"], "stop_token_ids": [4]},
        **{
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "logit_bias": {"3": -5},
        },
        **{
            "logprobs": 2,
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "user": "me",
            "metadata": {"a": "b"},
        },
    }
    assert ask(fake_app(engine), PATH, body).status_code == 200
    (request,) = engine.requests
    assert request.params == SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        n=2,
        seed=9,
        stop=("x", "y"),
        stop_token_ids=(4,),
        ignore_eos=True,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logit_bias={3: -5.0},
        logprobs=2,
        include_stop=True,
    )
    assert request.options == {"priority": 0, "deadline": 600.0}


def test_null_is_the_same_as_leaving_out() -> None:
    engine = FakeEngine(shout)
    names = ["temperature", "stop", "n", "logit_bias", "max_tokens", "suffix", "best_of", "stream_options"]
    response = ask(fake_app(engine), PATH, {"prompt": "a", **dict.fromkeys(names)})
    assert response.status_code == 200
    assert engine.requests[0].params == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "no tokens"),
        ({"prompt": [257]}, "token id 257, expected 0 to 256"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": ["a"] * 65, "n": 2}, "65 prompts with n 2, expected at most 128"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0 without echo"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is 21, expected a whole number, 0 to 20"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has the key 'x'"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias has the key '9999'"),
        ({"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids has 999"),
        ({"prompt": "a", "best_of": 3}, "'best_of' is not supported"),
        ({"prompt": "a", "suffix": "b"}, "'suffix' is not supported"),
        ({"prompt": "a", "temprature": 1}, "did you mean temperature?"),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "given without stream",
        ),
        ({"prompt": "a", "priority": 1}, "priority is not open to clients"),
        ({"prompt": "a" * 200}, "the prompt has 200 tokens"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "a", "guided_regex": "a", "response_format": {"type": "json_object"}}, "both given"),
        ({"prompt": "a", "guided_regex": "a" * (2**17 + 1)}, "guided_regex has 131073 characters"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "without a json_schema"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(body: dict[str, Any], says: str) -> None:
    engine = FakeEngine(shout)
    response = ask(fake_app(engine), PATH, body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]
    assert engine.requests == []


def test_several_prompts_are_taken_all_or_none() -> None:
    engine = FakeEngine(shout, queue=2, is_held=True)
    response = ask(fake_app(engine), PATH, {"prompt": ["a", "b", "c"]})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert response.headers["Retry-After"] == "1"
    assert [request.is_cancelled for request in engine.requests] == [True, True]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}},
            "json_schema",
            '{"a": 1}',
        ),
        ({"guided_json": {"a": 1}}, "json_schema", '{"a": 1}'),
        ({"guided_json": '{"a": 2}'}, "json_schema", '{"a": 2}'),
        ({"guided_regex": "[ab]+"}, "regex", "[ab]+"),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"guided_choice": ["yes", 'n"o']}, "lark", r'start: "yes" | "n\"o"'),
        ({"structured_outputs": {"regex": "x"}}, "regex", "x"),
        ({"structured_outputs": {"json": {"b": 1}}}, "json_schema", '{"b": 1}'),
        ({"structured_outputs": {"choice": ["a"]}}, "lark", 'start: "a"'),
    ],
)
def test_forms_of_an_answer(fields: dict[str, Any], kind: str, text: str) -> None:
    engine = FakeEngine(shout)
    assert ask(fake_app(engine), PATH, {"prompt": "a", **fields}).status_code == 200
    grammar = engine.requests[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == (kind, text)


def test_a_request_that_had_no_time_to_begin_is_503() -> None:
    engine = FakeEngine(lambda prompt, params: [[""]], finish="abort")
    for stream in (False, True):
        response = ask(fake_app(engine), PATH, {"prompt": "a", "stream": stream})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
