"""A tiny teacher and student with a byte-level tokenizer, as directories and in memory; random weights."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hrwkv.model.checkpoint import save_model
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.modeling import HybridModel

RANKS = {"decay_rank": 8, "iclr_rank": 8, "value_rank": 8, "key_rank": 8, "gate_rank": 8}
Pair = Callable[..., tuple[HybridModel, HybridModel]]
KINDS = [LINEAR, LINEAR, FULL, LINEAR]


def tiny_config(kinds: list[str], *, rope: bool, tied: bool = True) -> HybridConfig:
    return HybridConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=tied,
        layer_types=kinds,
        attention_rope=rope,
        **RANKS,
    )


def randomise(model: HybridModel, *, seed: int, scale: float = 0.3) -> HybridModel:
    """Every parameter away from zero, so that no gradient is missed because a factor happens to be zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 2 * scale * noise / width)
    return model


@pytest.fixture(scope="session")
def make_pair() -> Pair:
    """``make_pair(tied=...)``: teacher and student that share everything but their mixers."""

    def make(*, tied: bool = True) -> tuple[HybridModel, HybridModel]:
        teacher = randomise(
            HybridModel(tiny_config([FULL] * len(KINDS), rope=True, tied=tied)), seed=1, scale=0.8
        )
        student = randomise(HybridModel(tiny_config(KINDS, rope=False, tied=tied)), seed=2)
        theirs = teacher.state_dict()
        shared = {name: theirs[name] for name in student.state_dict() if name in theirs}
        student.load_state_dict(shared, strict=False)
        return teacher.eval().requires_grad_(False), student

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def directories(
    tmp_path_factory: pytest.TempPathFactory, make_pair: Pair, tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, Path, Path]:
    """Directories of student and teacher, and a folder of text; read only."""
    folder = tmp_path_factory.mktemp("distill")
    teacher, student = make_pair()
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, model in (("teacher", teacher), ("student", student)):
        save_model(model, folder / name, companions=folder / "tokenizer")
    words = ["red", "green", "blue", "one", "two", "three", "=", "(", ")", "\n"]
    generator = random.Random(0)
    text = folder / "text"
    text.mkdir()
    for number in range(60):
        words_in_file = generator.choices(words, k=generator.randint(5, 60))
        (text / f"{number}.txt").write_text(" ".join(words_in_file))
    return folder / "student", folder / "teacher", text


@pytest.fixture(scope="session")
def aligned(
    tmp_path_factory: pytest.TempPathFactory, make_pair: Pair, tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, Path]:
    """Directories of a student as stage 1 leaves it, every layer RWKV, and of its teacher; read only."""
    folder = tmp_path_factory.mktemp("aligned")
    teacher, _ = make_pair()
    student = randomise(HybridModel(tiny_config([LINEAR] * len(KINDS), rope=False)), seed=2)
    theirs = teacher.state_dict()
    shared = {name: theirs[name] for name in student.state_dict() if name in theirs}
    student.load_state_dict(shared, strict=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, model in (("teacher", teacher), ("student", student)):
        save_model(model, folder / name, companions=folder / "tokenizer")
    return folder / "student", folder / "teacher"
