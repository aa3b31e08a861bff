"""A conversation into a prompt by the model's own chat template, and what the template says about answers.

Templates run in Transformers' Jinja sandbox and come from the model's directory only, never from a client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from hrwkv.engine.request import Grammar
from hrwkv.server.errors import ApiError
from hrwkv.server.parse import CALL_TAGS, REASONING_TAGS
from hrwkv.server.schemas import ChatRequest, Message, Tool, ToolChoice

# What the rendering itself and its sandbox have set, the model's special tokens included; a client's
# chat_template_kwargs may be none of it.
RESERVED = {
    *("conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("return_assistant_tokens_mask", "continue_final_message", "self", "raise_exception", "strftime_now"),
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
}
# A file that has its calls as XML in the same tags; what it says could not be read back.
OTHER_CONVENTIONS = ("<function=", "<arg_key>")


def closing(tags: tuple[str, str]) -> str:
    """What ends reasoning, as templates write it."""
    return f"\n{tags[1]}\n\n"


@dataclass(frozen=True)
class Rendered:
    """A prompt as text, and how its answer is to be read.

    tags: those of the reasoning that the answer may have, None if it has none. opened: the prompt ends with
    the opening one.
    """

    text: str
    tags: tuple[str, str] | None = None
    opened: bool = False

    def open(self) -> Rendered:
        """The same with the reasoning opened."""
        assert self.tags is not None
        return self if self.opened else replace(self, text=f"{self.text}{self.tags[0]}\n", opened=True)

    def close(self) -> Rendered:
        """The same with reasoning that is over."""
        assert self.tags is not None
        return Rendered(self.open().text + closing(self.tags))


@dataclass(frozen=True)
class ChatFormat:
    """The chat template of a model; ``template`` is None for a model that has none."""

    template: str | None
    special_tokens: Mapping[str, str]
    reasoning_tags: tuple[str, str] | None
    has_tools: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """What the tokenizer brings along; of several templates the one named "default"."""
        own = tokenizer.chat_template
        template = own.get("default") if isinstance(own, dict) else own
        text = template or ""
        tags = next((tags for tags in REASONING_TAGS if tags[1] in text), None)
        known = (
            CALL_TAGS[0] in text and "tools" in text and not any(mark in text for mark in OTHER_CONVENTIONS)
        )
        special = {
            name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        return cls(template, special, tags, known)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), variables: Mapping[str, Any]
    ) -> Rendered:
        """The prompt. Raises ApiError 400 without a template, and for what the template refuses."""
        if self.template is None:
            message = "the model has no chat template: use /v1/completions"
            raise ApiError(400, message, code="no_chat_template")
        if taken := (RESERVED | self.special_tokens.keys()) & variables.keys():
            message = f"chat_template_kwargs has {min(taken)!r}, which the server sets: leave it out"
            raise ApiError(400, message, param="chat_template_kwargs")
        conversation = [_as_dict(message) for message in messages]
        try:
            texts = render_jinja_template(
                [conversation],
                tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
                chat_template=self.template,
                add_generation_prompt=True,
                **{**self.special_tokens, **variables},
            )[0]
        # What a template does with values of a wrong type is any of these.
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ApiError(400, f"the chat template refuses: {reason}", param="messages") from error
        text, tags = texts[0], self.reasoning_tags
        end = text.rstrip()
        if tags is None or end.endswith(tags[1]):
            return Rendered(text)
        return Rendered(text, tags, opened=end.endswith(tags[0]))


def template_variables(body: ChatRequest) -> dict[str, Any]:
    """``chat_template_kwargs``, and OpenAI's ``reasoning_effort`` for templates that know it."""
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    return variables


def chosen_tools(body: ChatRequest, chat: ChatFormat) -> list[Tool]:
    """The tools that the model is told of. Raises ApiError 400 if its template could not carry them."""
    if isinstance(body.tool_choice, ToolChoice):
        wanted = body.tool_choice.function.name
        if wanted not in [tool.function.name for tool in body.tools]:
            raise ApiError(400, f"tool_choice names {wanted!r}, which is not in tools", param="tool_choice")
    elif body.tool_choice == "required" and not body.tools:
        raise ApiError(400, "tool_choice is 'required' without tools: give some", param="tool_choice")
    if not body.tools or body.tool_choice == "none":
        return []
    if not chat.has_tools:
        message = "the model's chat template has no tools that this server can read back: leave tools out"
        raise ApiError(400, message, param="tools", code="tools_unsupported")
    return body.tools


def call_grammar(body: ChatRequest) -> Grammar | None:
    """The form of a call that ``tool_choice`` demands, None if the model may choose."""
    if isinstance(body.tool_choice, ToolChoice):
        wanted = [tool for tool in body.tools if tool.function.name == body.tool_choice.function.name]
    elif body.tool_choice == "required":
        wanted = body.tools
    else:
        return None
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in wanted
    ]
    return Grammar("json_schema", json.dumps({"anyOf": calls}))


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates know it: text in one piece, arguments of calls as an object."""
    content = message.content
    role = "system" if message.role == "developer" else message.role
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    found: dict[str, Any] = {"role": role, "content": text}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(given: str | dict[str, Any]) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given or "{}")
    except (ValueError, RecursionError) as error:
        message = f"the arguments of a tool call are no JSON: {given[:40]!r}"
        raise ApiError(400, message, param="messages") from error
