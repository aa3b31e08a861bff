from typing import Any

import pytest

from hrwkv.settings import EngineSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu', expected one of auto, cpu, cuda"),
        ({"overlap": "maybe"}, "overlap is 'maybe', expected one of auto, on, off"),
        ({"max_sequences": 0}, "max_sequences is 0, expected at least 1"),
        ({"max_sequences": 9, "step_tokens": 8}, "step_tokens is 8, expected at least max_sequences 9"),
        ({"max_context": 1}, "max_context is 1, expected at least 2, or left out"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5, expected more than 0 and at most 1"),
        ({"cache_bytes": 0}, "cache_bytes is 0, expected more than 0, or left out"),
        ({"swap_bytes": -1}, "swap_bytes is -1, expected at least 0"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes is -1, expected at least 0, or left out"),
    ],
)
def test_a_setting_that_no_engine_can_have_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**changes)
