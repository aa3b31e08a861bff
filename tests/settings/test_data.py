"""Sources and their weights as a recipe writes them, and values that no run can have."""

from typing import Any

import pytest

from hrwkv.settings import DataSettings
from hrwkv.settings.data import split_weight


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stdlib", ("stdlib", None)),
        ("a.jsonl=0.25", ("a.jsonl", 0.25)),
        ("hf:org/name:config@train=3", ("hf:org/name:config@train", 3.0)),
        ("key=value/a.jsonl", ("key=value/a.jsonl", None)),
        ("key=value/a.jsonl=.5", ("key=value/a.jsonl", 0.5)),
        ("https://host/a.jsonl?part=1", ("https://host/a.jsonl?part=1", None)),
    ],
)
def test_a_weight_is_the_number_after_the_last_sign(source: str, expected: tuple) -> None:
    assert split_weight(source) == expected


def test_sources_without_weights_are_one_text_and_streams_stand_alone() -> None:
    assert DataSettings(sources=("a", "b")).mixture() == [(("a", "b"), 1.0)]
    assert DataSettings(sources=("a", "b"), tokenise="stream").mixture() == [(("a",), 1.0), (("b",), 1.0)]
    assert DataSettings(sources=("a=2", "b=1")).mixture() == [(("a",), 2.0), (("b",), 1.0)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ()}, r"data.sources is \(\), expected at least one"),
        ({"sources": ("a=1", "b")}, r"data.sources is .*no weight or a weight above 0 for every source"),
        ({"sources": ("a=0", "b=1")}, r"data.sources is .*no weight or a weight above 0 for every source"),
        ({"max_corrupt_share": 1.0}, r"data.max_corrupt_share is 1.0, expected 0 to below 1"),
        ({"tokenise": "later"}, r"data.tokenise is 'later', expected ahead or stream"),
        ({"tokenise": "stream", "max_bytes": 5}, r"data.max_bytes is 5, expected 0 with data.tokenise"),
        ({"tokenise": "stream", "cache": "c"}, r"data.cache is 'c', expected no cache with data.tokenise"),
        ({"workers": 0}, r"data.workers is 0, expected at least 1"),
        ({"prefetch": -1}, r"data.prefetch is -1, expected at least 0"),
        ({"shuffle_rows": 0}, r"data.shuffle_rows is 0, expected at least 1"),
    ],
)
def test_a_value_that_no_run_can_have_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**values)
