"""An answer's text, as it comes, into reasoning, content and tool calls.

What may still become a tag is held back, so that no part of a tag is ever shown. Tags are those of known chat
templates: ``<reasoning>`` (Reka), ``<think>`` (Qwen, DeepSeek), and for calls ``<tool_call>`` around JSON
(Hermes, Qwen).
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

REASONING_TAGS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"))
CALL_TAGS = ("<tool_call>", "</tool_call>")


def begun(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


class ReasoningSplitter:
    """Reasoning before an answer: ``OPEN reasoning CLOSE answer``.

    inside: the prompt ends with the opening tag. A text that does not begin with one is all answer. White
    space around both parts is left out, as it belongs to the tags.
    """

    def __init__(self, tags: tuple[str, str] | None, *, inside: bool) -> None:
        self._open, self._close = tags or ("", "")
        self._place = "inside" if inside else "before" if tags else "after"
        self._held, self._blank = "", inside

    def add(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """(reasoning, content) that this text completes; ``last`` gives out what is held back."""
        self._held += text
        reasoning = content = ""
        if self._place == "before":
            self._enter(last)
        if self._place == "inside":
            reasoning = self._reason(last)
        if self._place == "after":
            content, self._held = self._trimmed(self._held), ""
        return reasoning, content

    def _enter(self, last: bool) -> None:
        """Look for the opening tag in front of everything."""
        start = self._held.lstrip()
        if start.startswith(self._open):
            self._place, self._blank, self._held = "inside", True, start[len(self._open) :]
        elif last or not self._open.startswith(start):
            self._place = "after"

    def _reason(self, last: bool) -> str:
        """What is reasoning for certain; white space at its end may belong to the closing tag."""
        before, tag, after = self._held.partition(self._close)
        if tag:
            reasoning = self._trimmed(before.rstrip())
            self._place, self._blank, self._held = "after", True, after
            return reasoning
        keep = 0 if last else begun(self._held, self._close)
        safe = self._held[: len(self._held) - keep]
        safe = safe.rstrip() if not last else safe
        self._held = self._held[len(safe) :]
        return self._trimmed(safe)

    def _trimmed(self, text: str) -> str:
        """Without white space as long as nothing else has come."""
        text = text.lstrip() if self._blank else text
        self._blank = self._blank and not text
        return text


@dataclass(frozen=True)
class ToolCallPart:
    """A whole call; arguments is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolParser:
    """Calls in an answer: ``content <tool_call>{"name": ..., "arguments": {...}}</tool_call>``.

    inside: the prompt ends with the opening tag. limit: calls after so many are left out. A call that is no
    such JSON comes back as content, as the model wrote it.
    """

    def __init__(self, *, inside: bool = False, limit: int | None = None) -> None:
        self._inside, self._limit = inside, limit
        self._held, self._num_calls, self._blank = "", 0, False

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[ToolCallPart]]:
        """(content, calls) that this text completes; ``last`` gives out what is held back."""
        self._held += text
        content: list[str] = []
        calls: list[ToolCallPart] = []
        while CALL_TAGS[self._inside] in self._held:
            before, tag, self._held = self._held.partition(CALL_TAGS[self._inside])
            self._take(before, tag, content, calls)
            self._inside = not self._inside
        if not self._inside or last:
            keep = 0 if last else begun(self._held, CALL_TAGS[0])
            safe = self._held[: len(self._held) - keep]
            self._held = self._held[len(safe) :]
            self._take(safe, "", content, calls)
        return "".join(content), calls

    def _take(self, text: str, tag: str, content: list[str], calls: list[ToolCallPart]) -> None:
        """Put a text that ends at ``tag`` where it belongs."""
        if not self._inside:
            # White space behind a call is the format's.
            text = text.lstrip() if self._blank else text
            self._blank = self._blank and not text
            content.append(text)
            return
        call = _read_call(text)
        self._blank = call is not None
        if call is None:
            content.append(CALL_TAGS[0] + text + tag)
        elif self._limit is None or self._num_calls < self._limit:
            self._num_calls += 1
            calls.append(call)


def _read_call(text: str) -> ToolCallPart | None:
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return ToolCallPart(
        call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
