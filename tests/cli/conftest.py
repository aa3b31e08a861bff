"""A tiny random Llama with a byte-level tokenizer, a student of it, and texts; made once, read only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hrwkv.cli import main

RANKS = [flag for name in ("decay", "iclr", "value", "key", "gate") for flag in (f"--{name}-rank", "4")]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Files:
    """Directories and files that tests read."""

    teacher: Path
    student: Path
    text: Path


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, and the lines of its output."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*letters, "<end>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", chat_template=CHAT_TEMPLATE)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``run("convert", ...)``: the command line in this process."""

    def call(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=256,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs"]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 12)) for i in range(1, 120)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["convert", str(folder / "teacher"), str(folder / "student"), "--attention-layers", "2", *RANKS]
    assert main(words) == 0
    return Files(folder / "teacher", folder / "student", folder / "text.txt")
