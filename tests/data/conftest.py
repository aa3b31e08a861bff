"""Tiny tokenizers that the data tests share, trained here on a few lines."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "def place(self, index: int) -> int:\n    return self.places[index] + 1\n",
    "What is the pass key? The pass key is 48137. Remember it.\n",
    "The year 2024 came after 2023, and 1024 is 32 times 32. The pass key is 20242.\n",
]


def _tokenizer(*, split_digits: bool, with_bos: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>", "<begin>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer=trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", tokenizer.token_to_id("<begin>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Digits are single tokens; nothing is put before a text."""
    return _tokenizer(split_digits=True, with_bos=False)


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Digits merge with one another and with the space before them; a text starts with <begin>."""
    return _tokenizer(split_digits=False, with_bos=True)
