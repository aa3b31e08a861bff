from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from hrwkv.engine.build import build_core, fit_memory, longest_context, prefix_bytes
from hrwkv.settings import EngineSettings
from tests.engine.driver import model_of, sizes_of

SETTINGS = EngineSettings(device="cpu", max_sequences=3, block_size=4)


@pytest.mark.parametrize(
    ("blocks", "max_context", "expected"), [(100, None, 64), (100, 20, 20), (4, None, 17), (100, 200, 200)]
)
def test_the_longest_context_is_the_settings_or_what_fits(
    blocks: int, max_context: int | None, expected: int
) -> None:
    """Rotary angles are computed for any position, so a setting may go past the model's own maximum."""
    settings = EngineSettings(device="cpu", max_context=max_context)
    sizes = sizes_of("hybrid", slots=1, blocks=blocks)
    assert longest_context(model_of("hybrid"), settings, sizes=sizes) == expected


def test_without_attention_only_the_setting_counts() -> None:
    sizes = sizes_of("all-linear", slots=1, blocks=0)
    assert longest_context(model_of("all-linear"), SETTINGS, sizes=sizes) == 64


@pytest.mark.parametrize("kind", ["hybrid", "all-linear", "all-attention"])
def test_the_bytes_that_were_counted_are_those_that_are_taken(kind: str) -> None:
    model = model_of(kind)
    sizes = fit_memory(model, SETTINGS)
    cache = build_core(model, SETTINGS, sizes=sizes)._runner._cache
    assert sum(state.nbytes for state in cache.state) == sizes.slots * sizes.slot_bytes
    blocks = (*cache.k_cache, *cache.v_cache)
    assert sum(block.nbytes for block in blocks) == sizes.blocks * sizes.block_bytes


def test_kept_prefixes_take_a_quarter_of_the_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("hybrid")
    free = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", free.get)
    assert prefix_bytes(model, SETTINGS) == 1_024_000
    free["SC_AVPHYS_PAGES"] = 10**9
    assert prefix_bytes(model, SETTINGS) == 2**30
    assert prefix_bytes(model, replace(SETTINGS, prefix_cache_bytes=5)) == 5
    monkeypatch.setattr("os.sysconf_names", {})
    assert prefix_bytes(model, SETTINGS) == 2**30


def test_host_memory_that_is_not_there_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr("hrwkv.engine.build.HostPages", refuse)
    settings = replace(SETTINGS, prefix_cache_bytes=2048)
    with pytest.raises(ValueError, match=r"give 2048 bytes .*of memory\): lower prefix_cache_bytes$"):
        build_core(model_of("hybrid"), settings, sizes=sizes_of("hybrid", slots=1, blocks=1))


def test_a_state_in_bf16_needs_a_gpu() -> None:
    settings = EngineSettings(device="cpu", state_dtype="bfloat16")
    with pytest.raises(ValueError, match="state_dtype is bfloat16, expected float32 without a GPU"):
        build_core(model_of("hybrid"), settings, sizes=sizes_of("hybrid", slots=1, blocks=1))


def test_the_log_says_what_fits_and_warns_of_contexts_longer_than_the_models(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    half = replace(SETTINGS, prefix_cache_bytes=2**29)
    build_core(model_of("hybrid"), half, sizes=sizes_of("hybrid", slots=3, blocks=100))
    assert "3 sequences at once (states: 0 MiB), 400 tokens in all" in caplog.text
    assert "at most 64 a sequence" in caplog.text
    assert "the model's config says" not in caplog.text
    assert "host memory: 0.5 GiB for kept prefixes" in caplog.text
    longer = replace(SETTINGS, max_context=200)
    build_core(model_of("all-linear"), longer, sizes=sizes_of("all-linear", slots=1, blocks=0))
    assert "any number of tokens in all" in caplog.text
    assert "contexts of up to 200 tokens; the model's config says 64" in caplog.text
