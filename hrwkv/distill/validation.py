"""What a student is worth while it trains: fixed batches of the dev split, and passkeys, teacher-forced.

A passkey counts when the likeliest token is right at every place of its answer, given the answer's tokens
before it; for greedy generation that is the same as an exact match, at the price of one forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hrwkv.data.passkey import PasskeyTask
from hrwkv.data.recall import RecallSample, RecallTasks
from hrwkv.distill.corpus import Corpus
from hrwkv.distill.logs import Validation
from hrwkv.distill.parallel import Ranks, gathered, release, total
from hrwkv.distill.stages import StepInput, StepOptions, validation_sums
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.modeling import HybridModel
from hrwkv.settings import DistillSettings


class Validator:
    """Measures a student against its teacher, always on the same text and prompts.

    batches: of the dev split, each as this process's micro-batches. samples: its passkeys, as many on each
    process.
    """

    def __init__(
        self,
        teacher: HybridModel,
        options: StepOptions,
        batches: Sequence[Sequence[StepInput]],
        samples: Sequence[RecallSample],
    ) -> None:
        self.teacher, self.options, self.batches, self.samples = teacher, options, batches, samples
        self._teacher_passkey: float | None = None

    def measure(self, student: HybridModel) -> Validation:
        """All numbers of a validation; every process must ask for it."""
        student.eval()
        parts = [part for batch in self.batches for part in batch]
        sums = [validation_sums(self.teacher, student, part, self.options) for part in parts]
        passkey = self._passkeys(student)
        student.train()
        if self._teacher_passkey is None:
            self._teacher_passkey = self._passkeys(self.teacher)
        tokens = sum(batch[0].num_tokens for batch in self.batches)
        labels = sum(batch[0].num_labels for batch in self.batches)
        return Validation(
            kl=sum(float(part.kl) for part in sums) / tokens,
            agreement=sum(float(part.agreement) for part in sums) / tokens,
            student_perplexity=_perplexity(sum(float(part.student_nll) for part in sums) / labels),
            teacher_perplexity=_perplexity(sum(float(part.teacher_nll) for part in sums) / labels),
            passkey=passkey,
            teacher_passkey=self._teacher_passkey,
        )

    def _passkeys(self, model: HybridModel) -> float | None:
        """Share of the passkeys that the model of all processes finds; None where there are none."""
        if not self.samples:
            return None
        right = torch.stack([_is_right(model, sample, self.options) for sample in self.samples]).float()
        release(model)
        return float(total(right.mean(), self.options.ranks)) / self.options.ranks.world


@torch.no_grad()
def _is_right(model: HybridModel, sample: RecallSample, options: StepOptions) -> Tensor:
    device = options.ranks.device
    token_ids = torch.tensor(sample.token_ids, device=device)
    places = torch.tensor(sample.places, device=device)
    with options.autocast(), gathered(model.lm_head):
        hidden = model(token_ids, TokenBatch.from_lengths([len(token_ids)], device=device))
        likeliest = model.compute_logits(hidden[places - 1]).argmax(-1)
    return (likeliest == token_ids[places]).all()


def passkey_samples(
    tokenizer: Any, corpus: Corpus, settings: DistillSettings, *, stage: int, ranks: Ranks
) -> list[RecallSample]:
    """This process's passkey prompts of the stage's context length; as many on each process."""
    length, count = settings.context_length(stage), -(-settings.validation_passkeys // ranks.world)
    if length < PasskeyTask(tokenizer).shortest_document:
        return []
    tasks = RecallTasks(tokenizer, corpus.dev.tokens)
    samples = tasks.samples("passkey", lengths=[length], count=count * ranks.world, seed=settings.data.seed)
    return samples[ranks.rank :: ranks.world]


def _perplexity(nll: float) -> float:
    # exp of more is an OverflowError, and a run may be that bad.
    return math.exp(nll) if nll < 700 else math.inf
