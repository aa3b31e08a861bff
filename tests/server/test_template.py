"""What a chat template says: the prompt, where reasoning begins, whether tools can be read back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hrwkv.server.errors import ApiError
from hrwkv.server.schemas import ChatRequest, Message
from hrwkv.server.template import ChatFormat, call_grammar, chosen_tools, template_variables
from tests.server.fakes import CHAT, byte_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes" / "chat"
HERMES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}{{ '\\n' }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def chat_format(template: str | None) -> ChatFormat:
    return ChatFormat.of(byte_tokenizer(template))


def messages(*pairs: tuple[str, Any]) -> list[Message]:
    return [Message.model_validate({"role": role, "content": content}) for role, content in pairs]


def test_a_conversation_is_rendered() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = messages(("developer", "short"), ("user", parts))

    rendered = chat_format(CHAT).render(given, variables={})
    assert (rendered.text, rendered.tags) == ("system: short\nuser: ab\nassistant: ", None)


@pytest.mark.parametrize(
    ("template", "variables", "expected"),
    [
        ("qwen3.jinja", {}, True),
        ("qwen3.jinja", {"enable_thinking": False}, False),
        ("reka-flash-3.jinja", {}, True),
        ("reka-flash-3.jinja", {"enable_thinking": False}, False),
        ("chatml.jinja", {}, False),
    ],
)
def test_reasoning_of_the_templates(template: str, variables: dict[str, Any], expected: bool) -> None:
    chat = chat_format((RECIPES / template).read_text())
    # A question about the tag is no reasoning.
    rendered = chat.render(messages(("user", "what is <think>")), variables=variables)
    assert ((rendered.tags is not None), rendered.opened) == (expected, False)


def test_a_template_may_open_the_reasoning() -> None:
    chat = chat_format("{{ messages[0].content }}<think>\n{# </think> #}{{ '</think>' if false }}")
    assert chat.render(messages(("user", "a")), variables={}).opened


@pytest.mark.parametrize(
    "name",
    ["chat_template", "messages", "add_generation_prompt", "tools", "bos_token", "eos_token", "self", "odd"],
)
def test_a_client_cannot_replace_what_the_server_sets(name: str) -> None:
    """The special tokens could be replaced, those that a tokenizer lacks and those of its own kind too."""
    chat = replace(chat_format(CHAT), special_tokens={"eos_token": "<end>", "odd": "<odd>"})
    with pytest.raises(ApiError, match=f"has '{name}', which the server sets: leave it out") as caught:
        chat.render(messages(("user", "a")), variables={name: "{{ 1 }}"})
    assert (caught.value.status_code, caught.value.param) == (400, "chat_template_kwargs")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such thing') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x }}",
        "{{ 1 // 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.join.__globals__.x }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(template: str) -> None:
    with pytest.raises(ApiError, match="the chat template refuses: ") as caught:
        chat_format(template).render(messages(("user", "a")), variables={})
    assert caught.value.status_code == 400


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(ApiError, match="no chat template: use /v1/completions"):
        chat_format(None).render(messages(("user", "a")), variables={})


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"default": "A", "no_reasoning": "B"}
    assert ChatFormat.of(tokenizer).render(messages(("user", "a")), variables={}).text == "A"


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "a"}], **fields})


def test_a_call_goes_back_as_an_object() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [
        Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}),
        Message.model_validate({"role": "tool", "content": "2", "tool_call_id": "c"}),
    ]
    text = chat_format(HERMES).render(given, variables={}).text
    assert text == 'assistant: <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\ntool: 2\n'


def test_arguments_that_are_no_json_are_refused() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{x"}}
    given = [Message.model_validate({"role": "assistant", "tool_calls": [call]})]
    with pytest.raises(ApiError, match="arguments of a tool call are no JSON"):
        chat_format(HERMES).render(given, variables={})


@pytest.mark.parametrize("template", [CHAT, HERMES + "<function=x>"])
def test_tools_need_a_template_that_can_be_read_back(template: str) -> None:
    with pytest.raises(ApiError, match="no tools that this server can read back"):
        chosen_tools(request(tools=[TOOL]), chat_format(template))
    assert chosen_tools(request(tools=[TOOL], tool_choice="none"), chat_format(template)) == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tool_choice": "required"}, "'required' without tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "names 'g'"),
    ],
)
def test_choices_that_do_not_fit_the_tools(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiError, match=says):
        chosen_tools(request(**fields), chat_format(HERMES))


def test_a_demanded_call_is_a_form() -> None:
    other = {"type": "function", "function": {"name": "g"}}
    assert call_grammar(request(tools=[TOOL, other])) is None
    wanted = {"type": "function", "function": {"name": "g"}}
    grammars = [
        call_grammar(request(tools=[TOOL, other], tool_choice=choice)) for choice in ("required", wanted)
    ]
    names = [
        [form["properties"]["name"]["const"] for form in json.loads(grammar.text)["anyOf"]]
        for grammar in grammars
        if grammar is not None
    ]
    assert names == [["f", "g"], ["g"]]


def test_no_reasoning_effort_turns_thinking_off() -> None:
    assert template_variables(request(reasoning_effort="none"))["enable_thinking"] is False
    given = {"enable_thinking": True, "x": 1}
    assert template_variables(request(reasoning_effort="low", chat_template_kwargs=given)) == {
        **given,
        "reasoning_effort": "low",
    }
