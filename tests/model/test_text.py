import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hrwkv.model.text import WINDOW, Detokenizer, StopTexts
from tests.tokenizers import byte_tokenizer, byte_tokens, fallback_tokenizer

MARK = "\N{REPLACEMENT CHARACTER}"
TEACHER = Path(__file__).parents[2] / "examples" / "tiny_teacher" / "model"
REAL: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)
BYTE, FALLBACK = byte_tokenizer(), fallback_tokenizer()
EURO = "\u20ac".encode()


def streamed(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    text = Detokenizer(tokenizer, prompt)
    return [*map(text.add, tokens), text.rest()]


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@settings(deadline=None, max_examples=100)
@given(prompt=st.lists(st.integers(0, 2047), max_size=6), tokens=st.lists(st.integers(0, 2047), max_size=80))
def test_pieces_of_any_tokens_are_the_decoded_text(prompt: list[int], tokens: list[int]) -> None:
    shown = decoded(REAL, prompt).rstrip(MARK)
    assert "".join(streamed(REAL, prompt, tokens)) == decoded(REAL, prompt + tokens)[len(shown) :]


@settings(deadline=None, max_examples=100)
@given(data=st.lists(st.integers(0, 255) | st.sampled_from([*EURO, 0xF0, 0x9F]), max_size=200))
@example(data=[0xFF] * (3 * WINDOW))
@example(data=[*EURO[:2]] * (2 * WINDOW))
@example(data=[0x41, 0xF0, 0x9F, 0x98] * WINDOW)
def test_pieces_of_any_bytes_are_the_decoded_bytes(data: list[int]) -> None:
    assert "".join(streamed(BYTE, [], byte_tokens(data))) == bytes(data).decode("utf-8", "replace")


@settings(deadline=None, max_examples=100)
@given(
    text=st.text(st.sampled_from("ab \u20ac\u00e9\U0001f600\u4e2d"), min_size=1, max_size=40),
    cut=st.integers(0, 9),
)
@example(text="\U0001f600\U0001f600\u20ac" * WINDOW, cut=0)
@example(text="\u00e9\u4e2d", cut=6)
def test_pieces_of_words_and_fallen_back_bytes_are_the_text(text: str, cut: int) -> None:
    tokens = FALLBACK.encode(text)
    prompt, answer = tokens[:cut], tokens[cut:]
    assume(not prompt or not decoded(FALLBACK, prompt).endswith(MARK))
    pieces = streamed(FALLBACK, prompt, answer)
    assert decoded(FALLBACK, prompt) + "".join(pieces) == decoded(FALLBACK, tokens)
    assert MARK not in "".join(pieces)


def test_a_token_without_text_does_not_take_the_next_ones_space() -> None:
    word, end = FALLBACK.encode("a")[0], FALLBACK.eos_token_id
    assert "".join(streamed(FALLBACK, [], [word, end, word])) == "a a"


def test_a_piece_comes_as_soon_as_its_character_is_whole() -> None:
    tokens = byte_tokens("a\u20acb".encode())
    assert streamed(BYTE, [], tokens) == ["a", "", "", "\u20ac", "b", ""]
    # Each token ends inside a character; what is whole comes all the same.
    assert streamed(BYTE, tokens[:2], tokens[2:]) == ["", "\u20ac", "b", ""]


def test_tokens_that_never_end_a_character_are_read_in_a_bounded_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[int] = []
    whole = BYTE.decode

    def decode(tokens: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        lengths.append(len(tokens))
        return str(whole(tokens, skip_special_tokens=skip_special_tokens))

    monkeypatch.setattr(BYTE, "decode", decode)
    for data in ([0xFF] * 999, [0x41, 0xC3] * 500, [256] * 999):
        streamed(BYTE, [], data if data[0] == 256 else byte_tokens(data))
    assert max(lengths) <= WINDOW + 1


STOPS = st.lists(st.text("ab\u20ac", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("ab\u20ac", max_size=4), max_size=12)


def first_stop(text: str, stops: Sequence[str], *, after: int = 0) -> tuple[int, int] | None:
    """(begin, end) of the stop text that is complete first, beyond ``after``; of those the longest."""
    ends = [
        (match.end(1), match.start(1))
        for stop in stops
        for match in re.finditer(f"(?=({re.escape(stop)}))", text)
        if match.end(1) > after
    ]
    return min(((begin, end) for end, begin in [min(ends)]), default=None) if ends else None


@settings(deadline=None, max_examples=200)
@given(pieces=PIECES, stops=STOPS, passive=st.integers(0, 4), include=st.booleans())
def test_text_ends_exactly_at_the_first_stop_and_none_of_it_is_shown(
    pieces: list[str], stops: list[str], passive: int, include: bool
) -> None:
    scanner, shown, seen = StopTexts(stops), "", ""
    text, unchecked = "".join(pieces), len("".join(pieces[:passive]))
    expected = first_stop(text, stops, after=unchecked)
    for index, piece in enumerate(pieces):
        shown += scanner.add(piece, active=index >= passive, include=include)
        seen += piece
        if scanner.found is not None:
            break
        # As much is shown as can be: what is held back is the beginning of some stop text.
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    shown += scanner.rest()
    if expected is None:
        assert (scanner.found, shown) == (None, text)
    else:
        begin, end = expected
        assert (scanner.found, shown) == (text[begin:end], text[: end if include else begin])


def test_a_long_stop_text_is_scanned_in_linear_time() -> None:
    """A stop text that almost repeats itself: a naive search would make 10^9 comparisons."""
    stop = "a" * 20_000 + "b"
    scanner = StopTexts([stop])
    shown = "".join(scanner.add("a" * 20) for _ in range(2000))
    assert shown == "a" * 20_000
    assert scanner.add("b") == ""
    assert scanner.found == stop
