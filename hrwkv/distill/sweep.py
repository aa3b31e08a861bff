"""What one swapped layer does to a model: every other layer stays as it is, nothing trains.

Teacher and stage-1 student share everything but their mixers, so a mixed model is the teacher with some
mixers taken from the student. A sweep walks the layers once and keeps the residual stream of all probes: up
to layer i the model with layer i swapped is the model without, so a swap costs the layers from i on, half of
all on average. The residuals of the student's mixers lead to the value and key of its layer 0 on the
embeddings; they are computed from there also where the model's own layer 0 is attention, as stage 1 did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hrwkv.data.packing import IGNORED_LABEL
from hrwkv.data.recall import RecallSample
from hrwkv.distill.losses import measure
from hrwkv.layers.attention import Attention
from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.common import Rope
from hrwkv.layers.time_mix import FirstLayer, TimeMix
from hrwkv.model.checkpoint import load_model, open_weights
from hrwkv.model.config import HybridConfig
from hrwkv.model.modeling import Block, HybridModel, build_mixer
from hrwkv.model.shards import ShardReader

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Probe:
    """Packed tokens of one task, with labels where a model is scored.

    token_ids: [T] int64; batch: its sequences; labels: [T] int64, IGNORED_LABEL where nothing is scored.
    """

    task: str
    token_ids: Tensor
    batch: TokenBatch
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """Means over the labels of one task: nll and kl (to the teacher) in nats, top-1 agreement with it."""

    nll: float
    kl: float
    agreement: float

    @property
    def recall(self) -> float:
        """Geometric mean of the labels' probabilities, 0 to 1: an accuracy that moves smoothly."""
        return math.exp(-self.nll)


Scores = dict[str, Score]


def recall_probe(task: str, samples: Sequence[RecallSample]) -> Probe:
    """Whole samples, packed; only the tokens of their answers are scored."""
    token_ids = torch.tensor([token for sample in samples for token in sample.token_ids])
    labels = torch.full_like(token_ids, IGNORED_LABEL)
    start = 0
    for sample in samples:
        for place in sample.places:
            labels[start + place - 1] = sample.token_ids[place]
        start += len(sample.token_ids)
    return Probe(task, token_ids, TokenBatch.from_lengths([len(s.token_ids) for s in samples]), labels)


class MixedModel:
    """A teacher whose mixers can be swapped one by one for those of its stage-1 student.

    Raises ValueError for a student that is not all RWKV, or whose other weights are not the teacher's;
    CheckpointError for directories that cannot be read.
    """

    def __init__(
        self, student: Path, teacher: Path, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.config, reader, _ = open_weights(student)
        self.teacher = load_model(teacher, dtype=dtype, device=device).requires_grad_(False)
        check_shared(reader, self.teacher)
        self.mixers = [
            load_mixer(reader, self.config, layer, dtype=dtype, device=device)
            for layer in range(self.config.num_hidden_layers)
        ]
        self.blocks = cast("list[Block]", list(self.teacher.model.layers))

    def first(self, hidden: Tensor, batch: TokenBatch, rope: Rope) -> FirstLayer | None:
        """Value and key of the student's layer 0 for embeddings [T, D]; None where no residual reads them."""
        return self._student(0, self.blocks[0].input_layernorm(hidden), batch, rope, None)[1]

    def block(
        self,
        layer: int,
        hidden: Tensor,
        batch: TokenBatch,
        *,
        rope: Rope,
        first: FirstLayer | None,
        is_linear: bool,
    ) -> Tensor:
        """Block ``layer`` with the student's mixer or the teacher's: hidden [T, D] -> hidden [T, D]."""
        own = self.blocks[layer]
        x = own.input_layernorm(hidden)
        if is_linear:
            mixed, _ = self._student(layer, x, batch, rope, first if layer else None)
        else:
            mixed, _ = own.mix(x, batch, rope)
        return own.feed_forward(hidden, mixed)

    def _student(
        self, layer: int, x: Tensor, batch: TokenBatch, rope: Rope, first: FirstLayer | None
    ) -> tuple[Tensor, FirstLayer | None]:
        own_rope = rope if self.config.linear_rope else None
        found: tuple[Tensor, FirstLayer | None] = self.mixers[layer](x, batch, rope=own_rope, first=first)
        return found


def load_mixer(
    reader: ShardReader,
    config: HybridConfig,
    layer: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> TimeMix | Attention:
    """One mixer of a student directory whose names and shapes are checked already."""
    prefix = f"model.layers.{layer}.self_attn."
    with torch.device("meta"):
        mixer = build_mixer(config, layer)
    weights = {name: reader.read(prefix + name).to(device=device, dtype=dtype) for name in mixer.state_dict()}
    mixer.load_state_dict(weights, assign=True)
    return mixer.eval().requires_grad_(False)


def check_shared(reader: ShardReader, teacher: HybridModel) -> None:
    """Raise ValueError unless the student's norms are the teacher's: every stage after 1 changes them."""
    theirs = teacher.state_dict()
    for layer in range(teacher.config.num_hidden_layers):
        for norm in NORMS:
            name = f"model.layers.{layer}.{norm}"
            if not torch.equal(reader.read(name).to(theirs[name]), theirs[name]):
                raise ValueError(
                    f"{name} of {reader.path} is not the teacher's: give the directory of stage 1, and the "
                    "teacher that it was trained with"
                )


@dataclass
class _Walk:
    """A probe on its way through the layers; hidden: the residual stream [T, D] before the next one."""

    probe: Probe
    hidden: Tensor
    rope: Rope
    first: FirstLayer | None


class Sweep:
    """Probes and the teacher's own hidden states for them, to be walked as often as wanted."""

    def __init__(self, model: MixedModel, probes: Sequence[Probe], *, device: torch.device | str) -> None:
        self.model = model
        self.probes = [_moved(probe, device) for probe in probes]
        self._rows = [_scored_rows(probe) for probe in self.probes]
        with torch.no_grad():
            self._targets = [
                model.teacher(probe.token_ids, probe.batch)[rows]  # [A, D], where the probe is scored
                for probe, rows in zip(self.probes, self._rows, strict=True)
            ]

    @torch.no_grad()
    def walk(self, linear: Sequence[bool], swapped: Sequence[int]) -> Iterator[tuple[int | None, Scores]]:
        """Scores of the model with each of the ``swapped`` layers of the other kind, in rising order.

        linear: whether a layer has the student's mixer, for each layer. The last pair is (None, scores) of
        the model as it is.
        """
        walks = [self._start(probe) for probe in self.probes]
        for layer, is_linear in enumerate(linear):
            if layer in swapped:
                kinds = [*linear[:layer], not is_linear, *linear[layer + 1 :]]
                yield layer, self._scores(self._ends([self._finish(walk, layer, kinds) for walk in walks]))
            for walk in walks:
                walk.hidden = self._block(walk, layer, walk.hidden, is_linear)
        yield None, self._scores(self._ends([walk.hidden for walk in walks]))

    @torch.no_grad()
    def teacher_scores(self) -> Scores:
        """The teacher's own, without a walk."""
        return self._scores(self._targets)

    def _start(self, probe: Probe) -> _Walk:
        backbone = self.model.teacher.model
        hidden, rope = backbone.embed_tokens(probe.token_ids), backbone.rope(probe.batch)
        return _Walk(probe, hidden, rope, self.model.first(hidden, probe.batch, rope))

    def _block(self, walk: _Walk, layer: int, hidden: Tensor, is_linear: bool) -> Tensor:
        return self.model.block(
            layer, hidden, walk.probe.batch, rope=walk.rope, first=walk.first, is_linear=is_linear
        )

    def _finish(self, walk: _Walk, start: int, linear: Sequence[bool]) -> Tensor:
        """The stream [T, D] after the layers from ``start`` on."""
        hidden = walk.hidden
        for layer in range(start, len(linear)):
            hidden = self._block(walk, layer, hidden, linear[layer])
        return hidden

    def _ends(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """What meets the head where each probe is scored: [A, D]."""
        norm = self.model.teacher.model.norm
        return [norm(hidden[rows]) for hidden, rows in zip(streams, self._rows, strict=True)]

    def _scores(self, ends: Sequence[Tensor]) -> Scores:
        """Means by task."""
        head = self.model.teacher.lm_head.weight
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for probe, rows, own, target in zip(self.probes, self._rows, ends, self._targets, strict=True):
            # Under autocast a GPU multiplies the heads in bf16 and keeps fp32 sums.
            narrow = own.dtype == torch.bfloat16
            with torch.autocast(own.device.type, torch.bfloat16, enabled=narrow):
                found = measure(own, head, target, head, labels=probe.labels[rows])
            values = torch.stack([found.student_nll, found.kl, found.agreement])
            sums[probe.task] = sums[probe.task] + values if probe.task in sums else values
            counts[probe.task] = counts.get(probe.task, 0) + len(rows)
        return {task: Score(*(total / counts[task]).tolist()) for task, total in sums.items()}


def _scored_rows(probe: Probe) -> Tensor:
    return (probe.labels != IGNORED_LABEL).nonzero().flatten()


def _moved(probe: Probe, device: torch.device | str) -> Probe:
    batch = TokenBatch.from_lengths(probe.batch.lengths, device=device)
    return Probe(probe.task, probe.token_ids.to(device), batch, probe.labels.to(device))
