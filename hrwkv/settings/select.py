"""How the layers that stay attention are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hrwkv.settings.checks import check_batch, require
from hrwkv.settings.data import check_sources


@dataclass(frozen=True)
class SelectSettings:
    """How the layers that stay attention are chosen; exactly one of ``keep`` and ``layers`` is given.

    Raises ValueError, naming the field, for a value that no selection can have.
    """

    keep: int | None = None
    """How many layers stay attention, chosen by ``method``; layer 0 never is one of them."""
    layers: tuple[int, ...] | None = None
    """The layers themselves, counted from 0; nothing is measured then."""
    method: Literal["recall", "greedy", "even"] = "recall"
    """``recall`` replaces one layer of the teacher at a time and compares what recall and ability lose
    (HALO); ``greedy`` adds the attention layer that lowers the student's KL most, one by one, at about as
    many times the cost; ``even`` spreads the layers."""
    sources: tuple[str, ...] = ("stdlib",)
    """Text whose dev split tells the ability, and fills the recall tasks; named and mixed as data.sources
    are."""
    tokens: int = 65536
    """Tokens of text that are scored, at most all of the dev split."""
    context_length: int = 1024
    """Tokens of a row of text; no context is longer."""
    batch_tokens: int = 8192
    """Tokens of one forward, a multiple of context_length."""
    recall_lengths: tuple[int, ...] = (256, 512, 1024)
    """Lengths of the recall samples in tokens; what must be recalled lies up to so far back."""
    recall_samples: int = 16
    """Samples of each recall task and length."""
    epsilon: float = 0.01
    """Added to the ability's drop, in nats per token: smaller drops are noise and decide nothing."""
    min_recall: float = 0.5
    """A recall task counts if the teacher's answers in it have at least this probability (geometric mean of
    their tokens'): what it cannot do itself tells nothing of a layer."""
    seed: int = 0
    """Choice of rows and recall samples."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the weights are held in; the scores are always computed in fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU where there is one."""

    def __post_init__(self) -> None:
        """Check what can be told without the models."""
        if (self.layers is None) == (self.keep is None):
            came = "neither" if self.layers is None else "both"
            raise ValueError(f"{came} of keep and layers given, expected exactly one")
        require(self.keep is None or self.keep >= 1, "keep", self.keep, "1 or more layers")
        layers = self.layers or ()
        good = self.layers is None or (
            len(layers) > 0 and len(set(layers)) == len(layers) and min(layers) > 0
        )
        require(good, "layers", self.layers, "different layers from 1 on: layer 0 stays RWKV")
        require(self.method in ("recall", "greedy", "even"), "method", self.method, "recall, greedy or even")
        check_sources(self.sources, name="sources")
        check_batch(self.context_length, self.batch_tokens, where="select")
        require(self.tokens >= 2, "tokens", self.tokens, "at least 2")
        lengths = self.recall_lengths
        require(len(lengths) > 0 and min(lengths) > 0, "recall_lengths", lengths, "lengths in tokens")
        require(self.recall_samples >= 1, "recall_samples", self.recall_samples, "at least 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "more than 0 nats per token")
        require(0 <= self.min_recall <= 1, "min_recall", self.min_recall, "0 to 1")
        require(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
