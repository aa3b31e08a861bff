"""Tokenizers small enough to see through: one token a byte, and words with bytes for the rest."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# GPT-2's alphabet: visible bytes stand for themselves and come first, the others behind them in order.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
TOKEN_OF_BYTE = {byte: i for i, byte in enumerate([*VISIBLE, *(b for b in range(256) if b not in VISIBLE)])}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 0 to 255, then an end token: characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def byte_tokens(data: Iterable[int]) -> list[int]:
    """Tokens of ``byte_tokenizer`` for any bytes, characters or not."""
    return [TOKEN_OF_BYTE[byte] for byte in data]


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece: a mark for the space before a word, bytes for characters that it has no piece for."""
    pieces = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "\u20ac"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("\u2581", "a")], byte_fallback=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
