"""An answer's parts do not depend on how its text was cut; no part of a tag is ever shown."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hrwkv.server.parse import REASONING_TAGS, ReasoningSplitter, ToolParser, begun

TAGS = REASONING_TAGS[0]


def cut(text: str, places: Sequence[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def split(text: str, places: Sequence[int] = (), *, inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(TAGS, inside=inside)
    parts = [splitter.add(piece) for piece in cut(text, places)]
    parts.append(splitter.add("", last=True))
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nso", False, ("why", "so")),
        ("  <think>a<b </think>c</think>", False, ("a<b", "c</think>")),
        ("why\n</think>so", True, ("why", "so")),
        ("never closed \n", True, ("never closed \n", "")),
        ("no tags <think> here", False, ("", "no tags <think> here")),
        (" \n plain", False, ("", " \n plain")),
        ("<thi", False, ("", "<thi")),
        ("<think></think>x", False, ("", "x")),
        ("<think>a</thin", False, ("a</thin", "")),
    ],
)
def test_reasoning_is_split_off(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert split(text, range(len(text)), inside=inside) == expected


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "a", " ", "\n", "think>"]), max_size=9),
    st.lists(st.integers(0, 80), max_size=8),
    st.booleans(),
)
def test_cuts_change_no_reasoning(words: list[str], places: list[int], inside: bool) -> None:
    text = "".join(words)
    assert split(text, places, inside=inside) == split(text, inside=inside)


def parse(text: str, places: Sequence[int] = (), **options: object) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolParser(**options)  # type: ignore[arg-type]
    parts = [parser.add(piece) for piece in cut(text, places)]
    parts.append(parser.add("", last=True))
    calls = [(call.name, json.loads(call.arguments)) for part in parts for call in part[1]]
    return "".join(part[0] for part in parts), calls


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
OTHER = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (f"Let me see.\n{CALL}\n{OTHER}\n", {}, ("Let me see.\n", [("f", {"x": 1}), ("g", {})])),
        (f"{CALL}{OTHER}", {"limit": 1}, ("", [("f", {"x": 1})])),
        ('{"name": "f", "arguments": {"x": 1}}', {"inside": True}, ("", [("f", {"x": 1})])),
        ("<tool_call>{not json}</tool_call> so", {}, ("<tool_call>{not json}</tool_call> so", [])),
        ('<tool_call>{"name": 3}', {}, ('<tool_call>{"name": 3}', [])),
        ("a <tool_cal", {}, ("a <tool_cal", [])),
        (f"<tool_call>{'[' * 5000}</tool_call>", {}, (f"<tool_call>{'[' * 5000}</tool_call>", [])),
    ],
)
def test_calls_are_read(text: str, options: dict[str, object], expected: object) -> None:
    assert parse(text, range(0, len(text), 3), **options) == expected


@given(
    st.lists(st.sampled_from([CALL, OTHER, "<tool_call>", "</tool_call>", "<tool", "a", "\n"]), max_size=6),
    st.lists(st.integers(0, 300), max_size=8),
)
@example([CALL, "a", "\n"], [62])
def test_cuts_change_no_call(words: list[str], places: list[int]) -> None:
    """The example: after a call and a text, a line end that came by itself was left out of the content."""
    text = "".join(words)
    assert parse(text, places) == parse(text)


@given(st.text("<ab", max_size=6), st.text("<ab", min_size=1, max_size=5))
def test_begun_is_the_longest_beginning_of_the_tag(text: str, tag: str) -> None:
    sizes = [size for size in range(1, len(tag)) if text.endswith(tag[:size])]
    assert begun(text, tag) == max(sizes, default=0)
