"""Perplexity of a student and its teacher, KL(teacher || student) and top-1 agreement, also by position.

Every mean is over tokens, not over batches, so the packing of the text does not weigh. Logits are made chunk
by chunk in fp32 and dropped: the largest tensor is one chunk of positions times the vocabulary, for each
model.

Left out: temperature, top-k overlap, per-document numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hrwkv.layers.batch import TokenBatch
from hrwkv.model.modeling import HybridModel

# Elements of one [positions, vocabulary] chunk. On a CPU it should stay in the cache (2.7 times faster than
# 64 MiB at a vocabulary of 2048), a GPU wants large ones.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
MIN_CHUNK_TOKENS = 128
# Positions below this share the first bucket: single positions have too few tokens for a mean.
FIRST_BUCKET = 16


@dataclass(frozen=True)
class Scores:
    """Means over the predicted tokens whose context is ``first`` to ``last`` tokens long (both included).

    tokens: how many. *_nll: mean negative log-likelihood in nats. kl: KL(teacher || student) in nats per
    token. agreement: share of positions where both models' most probable token is the same, 0 to 1.
    The teacher's fields, ``kl`` and ``agreement`` are None when there was no teacher.
    """

    first: int
    last: int
    tokens: int
    student_nll: float
    teacher_nll: float | None
    kl: float | None
    agreement: float | None

    @property
    def student_perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.student_nll)

    @property
    def teacher_perplexity(self) -> float | None:
        """exp of the teacher's mean negative log-likelihood."""
        return None if self.teacher_nll is None else math.exp(self.teacher_nll)

    @property
    def ratio(self) -> float | None:
        """The student's perplexity over the teacher's."""
        return None if self.teacher_nll is None else math.exp(self.student_nll - self.teacher_nll)


@dataclass(frozen=True)
class Comparison:
    """``overall`` and the same by position, in buckets [1, 15], [16, 31], [32, 63], ... of context length.

    *_bits_per_byte: None unless the number of bytes was given (and, for the teacher's, a teacher).
    """

    overall: Scores
    by_position: tuple[Scores, ...]
    student_bits_per_byte: float | None = None
    teacher_bits_per_byte: float | None = None

    def of_teacher(self) -> Comparison:
        """The teacher's own line, compared with itself. Raises ValueError if there was no teacher."""
        bits = self.teacher_bits_per_byte
        return Comparison(
            overall=_of_teacher(self.overall),
            by_position=tuple(_of_teacher(scores) for scores in self.by_position),
            student_bits_per_byte=bits,
            teacher_bits_per_byte=bits,
        )


def _of_teacher(scores: Scores) -> Scores:
    if scores.teacher_nll is None:
        raise ValueError("this comparison had no teacher: give one to compare()")
    return replace(scores, student_nll=scores.teacher_nll, kl=0.0, agreement=1.0)


@torch.no_grad()
def compare(
    student: HybridModel,
    teacher: HybridModel | None,
    batches: Iterable[tuple[Tensor, TokenBatch]],
    *,
    num_bytes: int | None = None,
    chunk_tokens: int | None = None,
) -> Comparison:
    """Score both models on packed batches; with ``teacher`` None, the student's perplexity alone.

    batches: (token_ids [T] int64, TokenBatch) without a cache; the last token of each sequence predicts
    nothing. Both models and all batches lie on one device.
    num_bytes: length of the predicted text, for bits per byte. chunk_tokens: positions whose logits are made
    at once; None bounds them by memory.

    Raises ValueError when there is no token to predict, the two vocabularies differ, or logits are not
    finite.
    """
    models = [student] if teacher is None else [student, teacher]
    vocabulary = student.config.vocab_size
    if teacher is not None and teacher.config.vocab_size != vocabulary:
        raise ValueError(
            f"the student has {vocabulary} tokens, the teacher {teacher.config.vocab_size}: "
            "give the teacher that the student was converted from"
        )
    # One fp32 copy for the whole run where the weights are bf16: their rounding would be a floor under the
    # KL.
    heads = [model.lm_head.weight.float() for model in models]
    chunk_tokens = chunk_tokens or _chunk_tokens(heads[0])
    sums: dict[int, Tensor] = {}
    for token_ids, batch in batches:
        predicting, targets = next_tokens(token_ids, batch)
        if not len(targets):
            continue
        hidden = [model(token_ids, batch)[predicting] for model in models]
        buckets = _bucket_of(batch.positions[predicting] + 1)
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            log_probs = [_log_probs(h[part], head) for h, head in zip(hidden, heads, strict=True)]
            _add(sums, buckets[part], token_scores(log_probs, targets[part]))
    if not sums:
        raise ValueError("no token to predict: every sequence has fewer than 2 tokens, give longer text")
    return _comparison(sums, num_bytes)


def _chunk_tokens(head: Tensor) -> int:
    """Positions per chunk for a head [V, D]; a large vocabulary gets enough rows for a matrix product too."""
    return max(CHUNK_ELEMENTS.get(head.device.type, 2**20) // head.shape[0], MIN_CHUNK_TOKENS)


def next_tokens(token_ids: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Indices of the tokens that have a successor in their sequence, and those successors, both [P] int64."""
    last = torch.zeros(token_ids.shape[0] + 1, dtype=torch.bool, device=token_ids.device)
    last[batch.cu_seqlens[1:].long()] = True  # [T+1], one past each sequence's end
    predicting = (~last[1:]).nonzero().squeeze(1)
    return predicting, token_ids[predicting + 1]


def token_scores(log_probs: list[Tensor], targets: Tensor) -> Tensor:
    """Per-token scores, fp64 [P, 2 or 5]: count, student nll, and with a teacher its nll, KL, agreement.

    log_probs: the student's [P, V] fp32, then the teacher's if there is one. targets: [P] int64.
    """
    student = log_probs[0]
    columns = [torch.ones_like(targets, dtype=torch.float64), _nll(student, targets)]
    if len(log_probs) == 2:
        teacher = log_probs[1]
        columns.append(_nll(teacher, targets))
        columns.append((teacher.exp() * (teacher - student)).sum(1).double())
        columns.append((student.argmax(1) == teacher.argmax(1)).double())
    return torch.stack(columns, dim=1)


def _nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).double()


def _log_probs(hidden: Tensor, head: Tensor) -> Tensor:
    """Hidden [P, D] and the head's weight [V, D] fp32 -> log-probabilities [P, V] fp32."""
    return F.linear(hidden.float(), head).log_softmax(dim=-1)


def _bucket_of(context: Tensor) -> Tensor:
    """0 for contexts of 1 to 15 tokens, 1 for 16 to 31, 2 for 32 to 63, ...; context is [P] int64."""
    edges = FIRST_BUCKET * 2 ** torch.arange(40, device=context.device)
    return torch.bucketize(context, edges, right=True)


def _add(sums: dict[int, Tensor], buckets: Tensor, scores: Tensor) -> None:
    """Add the scores [P, n] of each bucket to its running sum [n]."""
    for bucket in buckets.unique().tolist():
        total = scores[buckets == bucket].sum(0)
        sums[bucket] = sums[bucket] + total if bucket in sums else total


def _scores(total: list[float], *, first: int, last: int) -> Scores:
    tokens = total[0]
    means: list[float | None] = [value / tokens for value in total[2:]]
    teacher_nll, kl, agreement = means or (None, None, None)
    return Scores(
        first=first,
        last=last,
        tokens=round(tokens),
        student_nll=total[1] / tokens,
        teacher_nll=teacher_nll,
        # Rounding alone can put a KL of zero a little below it.
        kl=None if kl is None else max(kl, 0.0),
        agreement=agreement,
    )


def _comparison(sums: dict[int, Tensor], num_bytes: int | None) -> Comparison:
    overall = torch.stack(list(sums.values())).sum(0).tolist()
    if not all(map(math.isfinite, overall)):
        raise ValueError(
            "the models' logits are not finite: training diverged or the weights are damaged, use others"
        )
    by_position = []
    for bucket in sorted(sums):
        first = FIRST_BUCKET * 2 ** (bucket - 1) if bucket else 1
        last = FIRST_BUCKET * 2**bucket - 1
        by_position.append(_scores(sums[bucket].tolist(), first=first, last=last))
    bits = [None if num_bytes is None else nll / math.log(2) / num_bytes for nll in overall[1:3]]
    return Comparison(
        overall=_scores(overall, first=by_position[0].first, last=by_position[-1].last),
        by_position=tuple(by_position),
        student_bits_per_byte=bits[0],
        teacher_bits_per_byte=bits[1] if len(bits) == 2 else None,
    )
