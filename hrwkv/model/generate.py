"""Text from a model directory, ours or a teacher's: streamed for a reader, or greedy and batched for a grid.

One loop over ``HybridForCausalLM`` with its cache serves both. It is not ``model.generate()``: a loop that
yields needs no thread to stream from, stops where its reader stops, and draws from a generator of its own
instead of the process's. For many requests at once there is the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from hrwkv.model.checkpoint import load_model
from hrwkv.model.hf import HybridForCausalLM
from hrwkv.model.text import Detokenizer, StopTexts


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. Raises ValueError for a value outside its range.

    max_new_tokens: at least 1. temperature: 0 is greedy. top_p: in (0, 1], 1 is off. top_k: 0 is off.
    seed: of the draws. stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected more than 0 and at most 1 (off)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not all(self.stop):
            raise ValueError("a stop text is empty and would stop at once: leave it out")


def open_directory(
    path: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[HybridForCausalLM, PreTrainedTokenizerBase]:
    """Model, in evaluation mode, and tokenizer of one of our directories or of a teacher's.

    Raises CheckpointError or ValueError for a model that we cannot open, and for a missing tokenizer.
    """
    path = Path(path)
    model = HybridForCausalLM.from_core(load_model(path, dtype=dtype, device=device))
    if (path / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, open_tokenizer(path)


def open_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. Raises ValueError if it has none that opens."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:  # which of them depends on what is missing
        raise ValueError(f"{path} has no tokenizer that opens: copy the teacher's files there") from error


def stream_text(
    model: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
) -> Iterator[str]:
    """The answer to a prompt of token ids, in pieces of whole characters, as they come.

    Ends at an end-of-sequence token, at a stop text or after ``max_new_tokens``. Raises ValueError for an
    empty prompt.
    """
    tokens = stream_tokens(model, prompt, sampling=sampling)
    return read_text(tokenizer, prompt, tokens=tokens, stop=sampling.stop)


def read_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, tokens: Iterable[int], stop: Sequence[str]
) -> Iterator[str]:
    """The text of an answer's tokens as they come, in whole characters, up to the first stop text."""
    text, stops = Detokenizer(tokenizer, prompt), StopTexts(stop)
    for token in tokens:
        if piece := stops.add(text.add(token)):
            yield piece
        if stops.found is not None:
            return
    if piece := stops.add(text.rest()) + stops.rest():
        yield piece


def stream_tokens(model: HybridForCausalLM, prompt: Sequence[int], *, sampling: Sampling) -> Iterator[int]:
    """The answer's token ids without the end-of-sequence token; ``sampling.stop`` is for texts only."""
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    choose = partial(choose_tokens, sampling=sampling, generator=generator)
    steps = _steps(model, [prompt], choose=choose)
    ends = _end_tokens(model)
    for _, tokens in zip(range(sampling.max_new_tokens), steps, strict=False):
        token = int(tokens[0])
        if token in ends:
            return
        yield token


def greedy_tokens(
    model: HybridForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    batch_tokens: int = 16384,
) -> list[list[int]]:
    """Greedy answers of up to ``max_tokens`` tokens each, in the order of the prompts, without the end token.

    Prompts of similar length run together, up to ``batch_tokens`` columns at a time. Raises ValueError for an
    empty prompt.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    while order:
        rows = max(1, batch_tokens // (len(prompts[order[-1]]) + max_tokens))
        order, now = order[:-rows], order[-rows:]
        batch = _greedy_batch(model, [prompts[i] for i in now], max_tokens)
        for index, answer in zip(now, batch, strict=True):
            answers[index] = answer
    return answers


def choose_tokens(logits: Tensor, sampling: Sampling, *, generator: torch.Generator) -> Tensor:
    """logits [B, V] fp32 -> token ids [B]: temperature, then top_k, then top_p (arXiv 1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, ids = (logits / sampling.temperature).sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = float("-inf")
    weights = ordered.softmax(-1)
    before = weights.cumsum(-1) - weights  # the likeliest token always stays
    weights = weights.masked_fill(before >= sampling.top_p, 0.0)
    return ids.gather(-1, torch.multinomial(weights, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def _steps(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], *, choose: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Endless steps of one token per prompt, [B] int64."""
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens, expected at least one: begin with some text")
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    ids = torch.tensor(rows, device=model.device)
    mask = torch.arange(width, device=model.device) >= torch.tensor(padding, device=model.device).unsqueeze(1)
    cache = DynamicCache(config=model.config)
    while True:
        step = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        tokens = choose(step.logits[:, -1].float())
        yield tokens
        ids = tokens.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _greedy_batch(
    model: HybridForCausalLM, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[list[int]]:
    ends = _end_tokens(model)
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    steps = _steps(model, prompts, choose=lambda logits: logits.argmax(-1))
    for _, tokens in zip(range(max_tokens), steps, strict=False):
        for row, token in enumerate(tokens.tolist()):
            if token in ends:
                running.discard(row)
            elif row in running:
                answers[row].append(token)
        if not running:
            break
    return answers


def _end_tokens(model: HybridForCausalLM) -> set[int]:
    """The ids that end an answer, from the generation config."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])
