from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hrwkv.model.checkpoint import save_model
from hrwkv.model.generate import (
    Sampling,
    choose_tokens,
    greedy_tokens,
    open_directory,
    stream_text,
    stream_tokens,
)
from hrwkv.model.hf import HybridForCausalLM
from hrwkv.model.shards import CheckpointError
from tests.builders import hf_teacher, hybrid_model, random_ids
from tests.tokenizers import byte_tokenizer


def build(kept: tuple[int, ...] = (2,), **changes: Any) -> HybridForCausalLM:
    return HybridForCausalLM.from_core(hybrid_model(kept, vocab_size=257, eos_token_id=None, **changes))


def script(monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Make the sampled tokens those of ``text``, whatever the model says."""
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(text)
    answer = iter(tokens)
    monkeypatch.setattr(
        "hrwkv.model.generate.choose_tokens", lambda logits, sampling, generator: torch.tensor([next(answer)])
    )
    return tokenizer, tokens


def stream(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerFast, **sampling: Any) -> list[str]:
    return list(stream_text(model, tokenizer, tokenizer.encode("def "), sampling=Sampling(**sampling)))


@pytest.mark.parametrize("kept", [(2,), (), (0, 1, 2, 3)], ids=["hybrid", "all-linear", "all-attention"])
def test_greedy_stream_is_greedy_generate(kept: tuple[int, ...]) -> None:
    model, ids = build(kept), random_ids(7)
    expected = model.generate(ids[None], max_new_tokens=9, do_sample=False)[0, 7:].tolist()
    assert list(stream_tokens(model, ids.tolist(), sampling=Sampling(max_new_tokens=9))) == expected
    ends = build(kept)
    ends.generation_config.eos_token_id = [expected[4], 256]
    until = expected[: expected.index(expected[4])]
    assert list(stream_tokens(ends, ids.tolist(), sampling=Sampling(max_new_tokens=9))) == until


@pytest.mark.parametrize("batch_tokens", [1, 40, 16384], ids=["one-by-one", "some", "all-at-once"])
def test_greedy_tokens_are_each_prompts_own(batch_tokens: int) -> None:
    model = build()
    prompts = [random_ids(length, seed=length).tolist() for length in (5, 9, 1, 9, 6)]
    alone = [list(stream_tokens(model, prompt, sampling=Sampling(max_new_tokens=6))) for prompt in prompts]
    assert greedy_tokens(model, prompts, 6, batch_tokens=batch_tokens) == alone
    model.generation_config.eos_token_id = alone[1][2]
    cut = [answer[: answer.index(alone[1][2])] if alone[1][2] in answer else answer for answer in alone]
    assert greedy_tokens(model, prompts, 6, batch_tokens=batch_tokens) == cut
    assert cut != alone


def test_a_batch_ends_with_its_last_answer() -> None:
    model, prompt = build(), random_ids(7).tolist()
    model.generation_config.eos_token_id = greedy_tokens(model, [prompt], 1)[0][0]
    calls: list[object] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    assert greedy_tokens(model, [prompt, prompt], 1000) == [[], []]
    assert len(calls) == 1


def test_greedy_tokens_of_nothing_is_nothing() -> None:
    assert greedy_tokens(build(), [], 6) == []


def test_same_seed_same_draws_and_the_process_generator_is_left_alone() -> None:
    model, prompt = build(), random_ids(7).tolist()
    before = torch.get_rng_state()
    first, again, other = (
        list(stream_tokens(model, prompt, sampling=Sampling(max_new_tokens=20, temperature=1.0, seed=seed)))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"temperature": 1.0, "top_k": 2}, [0.5, 0.25, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0.5, 0.25, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.85}, [0.5, 0.25, 0.15, 0.0]),
        ({"temperature": 1.0, "top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
    ],
    ids=["plain", "cold", "top-k", "top-p", "top-p-tiny", "both", "top-k-over-vocabulary", "greedy"],
)
def test_draws_follow_the_kept_probabilities(sampling: dict[str, Any], kept: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])  # token of the largest probability first
    logits = torch.zeros(4).index_copy(0, order, torch.tensor([0.5, 0.25, 0.15, 0.1]).log()).repeat(20000, 1)
    drawn = choose_tokens(logits, Sampling(**sampling), generator=torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4)[order] / len(drawn)
    expected = torch.tensor(kept) / sum(kept)
    assert torch.equal(shares == 0, expected == 0)
    # Four standard deviations of a share among 20000 draws.
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_pieces_are_whole_characters_and_together_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "na\u00efve \u20ac5 \U0001f600 end"
    tokenizer, tokens = script(monkeypatch, text)
    pieces = stream(build(), tokenizer, max_new_tokens=len(tokens))
    assert "".join(pieces) == text
    assert pieces[:3] == ["n", "a", "\u00ef"]


def test_a_character_that_stays_incomplete_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, tokens = script(monkeypatch, "a\u20ac")
    pieces = stream(build(), tokenizer, max_new_tokens=len(tokens) - 1)
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("\n\n",), "x = 1\ny = 2"),
        (("nothing like it",), "x = 1\ny = 2\n\nz"),
        (("y = 3", "= 2"), "x = 1\ny "),
        (("\nz", "\n\nz"), "x = 1\ny = 2"),
        (("zz", "z\n"), "x = 1\ny = 2\n\nz"),
    ],
    ids=["in-the-middle", "never", "second-of-two", "earliest-begin", "begun-at-the-end"],
)
def test_stop_texts_end_the_answer(
    stop: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, tokens = script(monkeypatch, "x = 1\ny = 2\n\nz")
    assert "".join(stream(build(), tokenizer, max_new_tokens=len(tokens), stop=stop)) == expected


def test_an_abandoned_stream_leaves_gradients_as_they_were() -> None:
    pieces = stream_tokens(build(), random_ids(7).tolist(), sampling=Sampling())
    next(pieces)
    assert torch.is_grad_enabled()
    pieces.close()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", ["hybrid", "teacher"])
def test_a_directory_opens_with_its_tokenizer_and_its_end_tokens(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    if kind == "teacher":
        hf_teacher(directory, "qwen2", changes={"vocab_size": 257})
    else:
        save_model(hybrid_model(vocab_size=257), directory, companions=tmp_path)
    byte_tokenizer().save_pretrained(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 256]}')
    model, tokenizer = open_directory(directory, dtype=torch.bfloat16)
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert model.generation_config.eos_token_id == [5, 256]
    assert tokenizer.decode(tokenizer.encode("x = \u20ac")) == "x = \u20ac"


def test_directories_that_do_not_open_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing is not a directory"):
        open_directory(tmp_path / "missing")
    save_model(hybrid_model(), tmp_path / "bare", companions=tmp_path)
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        open_directory(tmp_path / "bare")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("stop", ("",)),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field.removesuffix("_tokens")):
        Sampling(**{field: value})


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        next(stream_tokens(build(), [], sampling=Sampling()))
    with pytest.raises(ValueError, match="no tokens"):
        greedy_tokens(build(), [[1], []], 3)
