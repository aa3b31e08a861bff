"""/v1/chat/completions: the parts of an answer, whole and streamed."""

from typing import Any

import pytest

from hrwkv.engine.request import EngineError, GrammarError, SamplingParams
from tests.server.fakes import FakeEngine, ask, byte_tokenizer, events, fake_app
from tests.server.test_template import HERMES, RECIPES, TOOL

PATH = "/v1/chat/completions"
ASKED = {"messages": [{"role": "user", "content": "a"}]}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def saying(*pieces: str, template: str | None = None, **options: Any) -> FakeEngine:
    tokenizer = byte_tokenizer(template) if template else byte_tokenizer()
    return FakeEngine(lambda prompt, params: [list(pieces)] * params.n, tokenizer, **options)


def qwen(*pieces: str) -> FakeEngine:
    return saying(*pieces, template=(RECIPES / "qwen3.jinja").read_text())


def folded(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """A client's view of a stream's choice."""
    found: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                for name, value in choice["delta"].items():
                    found[name] = found[name] + value if name in found else value
                found["finish_reason"] = choice["finish_reason"]
    return found


def test_an_answer() -> None:
    body = ask(fake_app(saying("Hel", "lo")), PATH, ASKED).json()
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert (body["object"], body["usage"]["prompt_tokens"]) == (
        "chat.completion",
        len("user: a\nassistant: "),
    )


def test_a_stream_has_role_text_finish_and_usage_in_this_order() -> None:
    body = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(fake_app(saying("Hel", "lo")), PATH, body))
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 5)
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_without_usage_has_no_such_field() -> None:
    chunks = events(ask(fake_app(saying("a")), PATH, ASKED | {"stream": True}))
    assert not [chunk for chunk in chunks if "usage" in chunk]


def test_each_choice_has_its_role_and_end() -> None:
    chunks = events(ask(fake_app(saying("a", "b")), PATH, ASKED | {"stream": True, "n": 2}))
    for index in (0, 1):
        expected = {"role": "assistant", "content": "ab", "finish_reason": "stop"}
        assert folded(chunks, index) == expected


def test_logprobs_are_of_every_token() -> None:
    body = ASKED | {"logprobs": True, "top_logprobs": 2}
    logprobs = ask(fake_app(saying("ab")), PATH, body).json()["choices"][0]["logprobs"]
    content = logprobs["content"]
    assert logprobs == {"content": content, "refusal": None}
    assert [(entry["token"], entry["logprob"], entry["bytes"]) for entry in content] == [
        ("a", -0.64, [97]),
        ("b", -0.65, [98]),
    ]
    assert [rival["token"] for rival in content[0]["top_logprobs"]] == ["&", "a"]
    chunks = events(ask(fake_app(saying("a", "b")), PATH, body | {"stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart(stream: bool) -> None:
    app = fake_app(qwen("<thi", "nk>\nwhy", "\n</thi", "nk>\n\nso"))
    response = ask(app, PATH, ASKED | {"stream": stream})

    answer = folded(events(response)) if stream else response.json()["choices"][0]["message"]
    assert (answer["reasoning_content"], answer["content"]) == ("why", "so")


def test_calls_are_read() -> None:
    app = fake_app(saying("Well.", CALL[:20], CALL[20:], template=HERMES))
    body = ASKED | {"tools": [TOOL]}
    choice = ask(app, PATH, body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Well.", "tool_calls")
    streamed = folded(events(ask(app, PATH, body | {"stream": True})))
    assert [(call["index"], call["function"]) for call in streamed["tool_calls"]] == [(0, call["function"])]
    assert streamed["finish_reason"] == "tool_calls"


def test_content_is_null_beside_a_call_alone() -> None:
    body = ask(fake_app(saying(CALL, template=HERMES)), PATH, ASKED | {"tools": [TOOL]}).json()
    assert body["choices"][0]["message"]["content"] is None


def test_without_tools_a_call_is_text() -> None:
    message = ask(fake_app(saying(CALL, template=HERMES)), PATH, ASKED).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": CALL, "refusal": None}


def test_one_call_at_a_time() -> None:
    body = ASKED | {"tools": [TOOL], "parallel_tool_calls": False}
    message = ask(fake_app(saying(CALL + CALL, template=HERMES)), PATH, body).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


def test_an_answer_may_go_back_as_openais_client_has_it() -> None:
    """What its parse() gives was refused for the fields that it adds, where it is to be appended as it is."""
    engine = saying("so", template=HERMES)
    call = {"name": "f", "arguments": '{"x": 1}', "parsed_arguments": {"x": 1}}
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "parsed": {"y": 2}}
    answer |= {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": call}]}
    result = {"role": "tool", "tool_call_id": "c", "content": "2"}
    body = {"messages": [*ASKED["messages"], answer, result], "tools": [TOOL]}
    assert ask(fake_app(engine), PATH, body).status_code == 200
    assert engine.tokenizer.decode(engine.requests[0].prompt).endswith(
        'assistant: <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\ntool: 2\n'
    )


def test_a_demanded_call_is_opened_and_has_its_form() -> None:
    engine = saying('{"name": "f", ', '"arguments": {}}', template=HERMES)
    body = ASKED | {"tools": [TOOL], "tool_choice": "required"}
    choice = ask(fake_app(engine), PATH, body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert choice["finish_reason"] == "tool_calls"
    (request,) = engine.requests
    assert engine.tokenizer.decode(request.prompt).endswith("a\n<tool_call>\n")
    assert request.params.grammar is not None


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"messages": []}, 200, ""),
        ({"messages": [{"role": "robot", "content": "a"}]}, 422, "'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, 422, "messages"),
        ({"tools": [TOOL]}, 400, "leave tools out"),
        ({"reasoning_budget": 5}, 400, "has no reasoning"),
        ({"reasoning_budget": 0}, 200, ""),
        ({"functions": []}, 400, "'functions' is not supported"),
        ({"chat_template": "{{ 1 }}"}, 400, "'chat_template' is not supported"),
        ({"model": "gpt-4"}, 404, "there is no model 'gpt-4' here, expected 'fake'"),
        ({"max_tokens": 0}, 400, "max_tokens is 0"),
        ({"n": 129}, 400, "n is 129, expected at most 128 answers"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, 400, "tokens"),
    ],
)
def test_refusals(fields: dict[str, Any], status: int, says: str) -> None:
    response = ask(fake_app(saying("a")), PATH, ASKED | fields)
    assert response.status_code == status
    assert says in response.text


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"{x}": 1}, "{x}", "field '{x}' is not supported"),
        ({"messages": [{"role": "user", "contents": "a"}]}, "messages", "messages.0: field 'contents'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
            "messages",
            "messages.0.content.0: field 'b' is not supported",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"nam": "f"}}},
            "tool_choice",
            "tool_choice.function: field 'nam' is not supported: did you mean name?",
        ),
        ({"stream_options": {"usage": True}}, "stream_options", "stream_options: field 'usage'"),
    ],
)
def test_a_field_that_is_not_supported_is_named_with_its_place(
    fields: dict[str, Any], param: str, says: str
) -> None:
    """One inside a message or a tool was named as if it stood at the top."""
    response = ask(fake_app(saying("a")), PATH, ASKED | fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_field", param)
    assert says in error["message"]


@pytest.mark.parametrize("fields", [{}, {"reasoning_budget": 5}])
@pytest.mark.parametrize("limit", ["server", "engine"])
def test_a_conversation_that_is_too_long_is_refused_by_its_field(limit: str, fields: dict[str, Any]) -> None:
    """Clients read ``param``, which was null or another route's."""
    engine = qwen("a")
    engine.max_context = 50
    app = fake_app(engine, **({"max_prompt_tokens": 20} if limit == "server" else {}))
    error = ask(app, PATH, {"messages": [{"role": "user", "content": "a" * 50}], **fields}).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("failure", "status", "kind", "code"),
    [
        (EngineError("out of memory"), 503, "service_unavailable_error", "engine_unavailable"),
        (GrammarError("too complex"), 400, "invalid_request_error", "grammar_failed"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_failure_before_the_first_token_is_a_status_and_later_an_event(
    place: int, failure: Exception, status: int, kind: str, code: str
) -> None:
    engine = saying("a", "b", failure=failure, fail_at=place)
    response = ask(fake_app(engine), PATH, ASKED | {"stream": True})
    assert response.status_code == (200 if place else status)
    error = events(response)[-1] if place else response.json()
    assert error["error"] == {"message": str(failure), "type": kind, "param": None, "code": code}
    assert ask(fake_app(engine), PATH, ASKED).status_code == status


def test_parameters_reach_the_engine() -> None:
    engine = saying("a")
    assert ask(fake_app(engine), PATH, ASKED | {"max_completion_tokens": 9, "seed": 3}).status_code == 200
    assert engine.requests[0].params == SamplingParams(max_tokens=9, seed=3)
