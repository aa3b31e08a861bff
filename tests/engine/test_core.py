"""Equality 5: whatever else the engine does, an answer is the one that its request would get alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.engine.request import SamplingParams
from tests.builders import random_ids
from tests.engine.driver import KINDS, Driver, Reader, greedy, greedy_alone, sizes_of

kinds = pytest.mark.parametrize("kind", KINDS)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, seed=100 * length + seed).tolist()


@kinds
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_batched_and_chunked_is_alone(kind: str, overlap: str) -> None:
    """More requests than slots, prompts longer than a step."""
    driver = Driver(kind, max_sequences=3, step_tokens=5, overlap=overlap)
    prompts = [prompt_of(length) for length in (1, 4, 11, 23, 2)]
    readers = [driver.add(prompt, greedy(6))[1] for prompt in prompts]
    driver.run()
    for prompt, reader in zip(prompts, readers, strict=True):
        assert reader.tokens() == greedy_alone(kind, tuple(prompt), 6)
        assert reader.reason() == "length"
        assert reader.events[0].usage.completion_tokens == 6
    driver.assert_nothing_held()


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    requests = st.fixed_dictionaries(
        {
            "length": st.integers(1, 20),
            "seed": st.integers(0, 1),
            "count": st.integers(1, 8),
            "n": st.sampled_from([1, 1, 3]),
            "priority": st.integers(0, 1),
            "arrival": st.integers(0, 12),
            "cancel_after": st.none() | st.integers(0, 8),
        }
    )
    sequences = draw(st.integers(1, 4))
    return {
        "requests": draw(st.lists(requests, min_size=1, max_size=5)),
        "max_sequences": sequences,
        "step_tokens": draw(st.integers(sequences, 12)),
        "block_size": draw(st.sampled_from([1, 3, 4])),
        "overlap": draw(st.sampled_from(["on", "off"])),
        "swap_bytes": draw(st.sampled_from([0, 9000, 10**9])),
        "spare_blocks": draw(st.integers(0, 10)),
    }


@kinds
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_schedule_is_alone(kind: str, data: st.DataObject) -> None:
    """Random arrivals, cancels, priorities, forks, and a memory that only just holds the longest alone."""
    case = data.draw(schedules())
    requests, size = case["requests"], case["block_size"]
    longest = max(each["length"] + each["count"] for each in requests) - 1
    driver = Driver(
        kind,
        max_sequences=case["max_sequences"],
        step_tokens=case["step_tokens"],
        block_size=size,
        overlap=case["overlap"],
        swap_bytes=case["swap_bytes"],
        sizes=sizes_of(
            kind,
            slots=case["max_sequences"],
            blocks=-(-longest // size) + case["spare_blocks"],
            block_size=size,
        ),
    )
    readers: list[tuple[dict[str, Any], int, Reader]] = []
    step = 0
    while step < 13 or driver.core.has_work:
        for each in requests:
            if each["arrival"] == step:
                prompt = prompt_of(each["length"], each["seed"])
                params = greedy(each["count"], n=each["n"])
                number, reader = driver.add(prompt, params, priority=each["priority"])
                readers.append((each, number, reader))
        for each, number, _ in readers:
            if each["cancel_after"] is not None and each["arrival"] + each["cancel_after"] == step:
                driver.core.abort(number)
        if driver.core.has_work:
            driver.core.step()
        step += 1
        assert step < 1000
    for each, _, reader in readers:
        expected = greedy_alone(kind, tuple(prompt_of(each["length"], each["seed"])), each["count"])
        assert reader.error is None
        assert len(reader.events) == each["n"]
        for event in reader.events.values():
            if event.finish_reason == "abort":
                assert each["cancel_after"] is not None
                assert event.tokens == expected[: len(event.tokens)]
            else:
                assert (event.finish_reason, event.tokens) == ("length", expected)
    driver.assert_nothing_held()
