"""What ends a text, and that what was shown before it never has to be taken back."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.engine.request import SamplingParams
from hrwkv.engine.text import TextStream
from tests.tokenizers import byte_tokenizer, byte_tokens

END = 256
BYTE = byte_tokenizer()


def run(data: bytes, *, end: bool = False, **params: Any) -> tuple[str, TextStream, int]:
    """The text of bytes and maybe an end token, the stream, and how many tokens it took."""
    stream = TextStream(BYTE, [], params=SamplingParams(**params), end_ids=[END])
    shown, tokens = "", [*byte_tokens(data), *([END] if end else [])]
    for count, token in enumerate(tokens, start=1):
        shown += stream.add(token)
        if stream.is_stopped:
            return shown, stream, count
    return shown + stream.finish(), stream, len(tokens)


@settings(deadline=None, max_examples=150)
@given(
    text=st.text("ab \u20ac", max_size=20),
    stop=st.lists(st.text("ab \u20ac", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 12),
    include=st.booleans(),
)
def test_a_text_ends_with_the_first_stop_past_min_tokens(
    text: str, stop: list[str], min_tokens: int, include: bool
) -> None:
    data = text.encode()
    ends = [
        (end, -len(each), each)
        for each in stop
        for end in range(len(text) + 1)
        if text[:end].endswith(each) and len(text[:end].encode()) > min_tokens
    ]
    shown, stream, count = run(data, stop=tuple(stop), min_tokens=min_tokens, include_stop=include)
    if not ends:
        assert (shown, stream.is_stopped, count) == (text, False, len(data))
        return
    end, size, reason = min(ends)
    assert shown == text[: end if include else end + size]
    assert (stream.is_stopped, stream.stop_reason) == (True, reason)
    assert count == len(text[:end].encode())


A, B = byte_tokens(b"ab")


@pytest.mark.parametrize(
    ("params", "text", "reason", "count"),
    [
        ({}, "xay", None, 4),
        ({"ignore_eos": True}, "xay", None, None),
        ({"stop_token_ids": (A,)}, "x", A, 2),
        ({"stop_token_ids": (A,), "include_stop": True}, "xa", A, 2),
        ({"stop_token_ids": (A,), "min_tokens": 1}, "x", A, 2),
        ({"stop_token_ids": (A,), "min_tokens": 2}, "xay", None, 4),
        ({"stop_token_ids": (END,), "ignore_eos": True}, "xay", END, 4),
        ({"min_tokens": 4}, "xay", None, None),
        ({"stop": ("yz",)}, "xay", None, 4),
        ({"stop": ("y",), "stop_token_ids": (A,)}, "x", A, 2),
    ],
    ids=[
        "end",
        "ignored",
        "token",
        "token-kept",
        "at-min",
        "before-min",
        "end-as-token",
        "end-before-min",
        "begun",
        "first",
    ],
)
def test_end_and_stop_tokens_end_a_text(
    params: dict[str, Any], text: str, reason: int | None, count: int | None
) -> None:
    shown, stream, taken = run(b"xay", end=True, **params)
    assert shown == text
    assert (stream.stop_reason, stream.is_stopped) == (reason, count is not None)
    assert taken == (count or 4)


def test_an_incomplete_character_comes_at_the_end() -> None:
    assert run(b"a\xe2\x82")[0] == "a\ufffd"
    assert run(b"a\xe2\x82", end=True)[0] == "a\ufffd"
    shown, stream, _ = run(b"a\xe2\x82", stop=("\ufffd",))
    assert (shown, stream.stop_reason) == ("a", "\ufffd")


def test_a_stop_text_may_begin_in_the_last_token_before_the_first_that_counts() -> None:
    shown, stream, count = run(b"abab", stop=("ba",), min_tokens=2)
    assert (shown, stream.stop_reason, count) == ("a", "ba", 3)
