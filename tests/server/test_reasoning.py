"""A reasoning budget, and forms of an answer after reasoning: two requests that look like one."""

from typing import Any

import pytest

from hrwkv.engine.request import SamplingParams
from tests.server.fakes import WRONG, FakeEngine, ask, byte_tokenizer, events, fake_app
from tests.server.test_chat import ASKED, CALL, PATH, folded
from tests.server.test_template import TOOL

OPENED = "user: a\nassistant: <think>\n"
THINKS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\n' }}{% endfor %}"
    "assistant: {{ '<think>\n\n</think>\n\n' if enable_thinking is false }}"
)


def thinker(thought: str, answer: str, **options: Any) -> FakeEngine:
    """Reasons where the prompt ends in an opened tag, at most as long as it may; answers elsewhere."""

    def script(prompt: str, params: SamplingParams) -> list[list[str]]:
        if not prompt.endswith("<think>\n"):
            return [[answer[:2], answer[2:]]] * params.n
        room = params.max_tokens if params.max_tokens is not None else len(thought)
        engine.finish = "length" if room < len(thought) else "stop"
        # What comes next is another request.
        return [[thought[:1], thought[1:room]]]

    engine = FakeEngine(script, byte_tokenizer(THINKS), **options)
    return engine


def prompts(engine: FakeEngine) -> list[str]:
    return [engine.tokenizer.decode(request.prompt) for request in engine.requests]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_cut_at_its_budget(stream: bool) -> None:
    engine = thinker("long thoughts", "so be it")
    response = ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 6, "stream": stream})
    assert prompts(engine) == [OPENED, OPENED + "long t\n</think>\n\n"]
    assert [request.params.max_tokens for request in engine.requests] == [6, None]
    body = response.json() if not stream else {}
    answer = folded(events(response)) if stream else body["choices"][0]["message"]
    assert (answer["reasoning_content"], answer["content"]) == ("long t", "so be it")
    if not stream:
        assert body["usage"]["prompt_tokens"] == len(OPENED)
        assert body["usage"]["completion_tokens"] == 6 + len("so be it")
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_reasoning_that_ends_in_time_is_left_as_it_is() -> None:
    engine = thinker("short ", "so", stops=("</think>",))
    body = ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 50, "max_tokens": 20}).json()
    assert prompts(engine)[1] == OPENED + "short\n</think>\n\n"
    assert [request.params.max_tokens for request in engine.requests] == [20, 20 - len("short ")]
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("short", "so")


def test_a_budget_of_nothing_closes_at_once() -> None:
    engine = thinker("never", "so")
    message = ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 0}).json()["choices"][0]["message"]
    assert prompts(engine) == ["user: a\nassistant: <think>\n\n</think>\n\n"]
    assert message == {"role": "assistant", "content": "so", "refusal": None}


def test_an_answer_that_is_no_longer_than_its_reasoning_has_no_second_request() -> None:
    engine = thinker("long thoughts", "so")
    body = ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 9, "max_tokens": 4}).json()
    assert len(engine.requests) == 1
    assert body["choices"][0]["finish_reason"] == "length"
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("", "long")


def test_the_models_own_end_ends_it() -> None:
    # "stop" without the closing tag as its reason: an end-of-sequence token, or the client's stop text.
    engine = thinker("done", "never")
    body = ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 50}).json()
    assert len(engine.requests) == 1
    assert body["choices"][0]["finish_reason"] == "stop"


def test_a_context_that_is_full_after_reasoning_ends_it() -> None:
    engine = thinker("long thoughts", "so", max_context=len(OPENED) + 7)
    body = ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 6}).json()
    assert len(engine.requests) == 1
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_form_holds_for_the_answer_only() -> None:
    engine = thinker("why ", "{}", stops=("</think>",))
    message = ask(fake_app(engine), PATH, ASKED | {"guided_regex": "[{}]+"}).json()["choices"][0]["message"]
    assert [request.params.grammar is not None for request in engine.requests] == [False, True]
    assert (message["reasoning_content"], message["content"]) == ("why", "{}")
    # Its reader is reading already, so it goes before requests that have not begun.
    assert [request.options["priority"] for request in engine.requests] == [0, -1]
    first, second = (request.options["deadline"] for request in engine.requests)
    assert 0 < second < first == 600


def test_the_closing_tag_is_none_of_a_clients_stop_texts() -> None:
    engine, stops = thinker("why", "so"), [str(number) for number in range(16)]
    assert ask(fake_app(engine), PATH, ASKED | {"reasoning_budget": 9, "stop": stops}).status_code == 200
    assert engine.requests[0].params.stop == (*stops, "</think>")


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_is_wrong_is_refused_before_any_reasoning(stream: bool) -> None:
    """It was an error behind the reasoning, minutes later."""
    engine = thinker("why ", "never", stops=("</think>",))
    response = ask(fake_app(engine), PATH, ASKED | {"guided_regex": WRONG, "stream": stream})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "grammar_failed")
    assert engine.requests == []


def test_without_thinking_a_form_needs_one_request() -> None:
    engine = thinker("never", "{}")
    off = {"guided_regex": "[{}]+", "chat_template_kwargs": {"enable_thinking": False}}
    message = ask(fake_app(engine), PATH, ASKED | off).json()["choices"][0]["message"]
    assert len(engine.requests) == 1
    assert message == {"role": "assistant", "content": "{}", "refusal": None}


def test_a_demanded_call_comes_after_reasoning() -> None:
    call = CALL.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    engine = thinker("why ", call, stops=("</think>",))
    engine.tokenizer.chat_template = THINKS + "{# tools <tool_call> #}"
    body = ASKED | {"tools": [TOOL], "tool_choice": "required"}
    choice = ask(fake_app(engine), PATH, body).json()["choices"][0]
    assert prompts(engine)[1].endswith("why\n</think>\n\n<tool_call>\n")
    assert choice["message"]["reasoning_content"] == "why"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"reasoning_budget": 5, "n": 2}, "n is 2, expected 1"),
        ({"reasoning_budget": 5, "stop": [str(number) for number in range(17)]}, "expected at most 16"),
    ],
)
def test_refusals(fields: dict[str, Any], says: str) -> None:
    response = ask(fake_app(thinker("a", "b")), PATH, ASKED | fields)
    assert (response.status_code, says in response.text) == (400, True)
