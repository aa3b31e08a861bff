"""Which layers stay attention: measured with the stage-1 mixers, before stage 2; nothing trains.

``recall`` is HALO's sweep (arXiv 2601.22156): the teacher with one layer replaced by its stage-1 mixer loses
recall and ability, and a layer is worth its attention where recall falls more than ability does. ``greedy``
starts from the student and adds, one after another, the attention layer that lowers its KL to the teacher
most. Attention keeps the teacher's RoPE while it is measured; the student has none there, which stage 2
heals. Left out: selection by short trainings (GA-S2), constraints between neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hrwkv.data.documents import read_documents
from hrwkv.data.mixing import MixedRows, Schedule
from hrwkv.data.packing import PackedStream, next_token_labels
from hrwkv.data.recall import RecallSample, RecallTasks
from hrwkv.data.tokens import chat_renderer, tokenize_documents
from hrwkv.distill.checkpointing import model_fingerprint, write_json
from hrwkv.distill.corpus import open_tokenizer
from hrwkv.distill.selection import LayerResult, Selection, write_selection
from hrwkv.distill.stages import check_pair
from hrwkv.distill.sweep import MixedModel, Probe, Score, Scores, Sweep, recall_probe
from hrwkv.model.checkpoint import load_config
from hrwkv.model.config import HybridConfig, spread_layers
from hrwkv.model.shards import CheckpointError, read_json
from hrwkv.settings import SelectSettings
from hrwkv.settings.data import mixture_of

TEXT = "text"
# What may differ when an interrupted selection goes on: it decides no score.
FREE = ("keep", "layers", "epsilon", "min_recall", "device")


@dataclass(frozen=True)
class SelectProgress:
    """Blocks computed of all; layer: the last one that was scored, None for the model without a swap."""

    layer: int | None
    done: int
    total: int
    seconds_left: float


Observer = Callable[[SelectProgress], None]


def select(
    student: Path,
    teacher: Path,
    out: Path,
    settings: SelectSettings,
    *,
    device: torch.device | str,
    observer: Observer,
) -> Selection:
    """Choose the layers and write the student that has the teacher's attention there to ``out``.

    Scores are kept in a file beside ``out`` as they come; the same call again goes on from there.

    Args:
        student: the directory of stage 1, every layer RWKV.
        teacher: the teacher that it was trained with.
        out: a directory that must not exist; receives the model, selection.json and selection.png.
        settings: number and method, or the layers themselves.
        device: where the models run.
        observer: called after each layer.

    Raises:
        ValueError: models, layers or text that do not fit, or scores beside ``out`` of another selection.
        CheckpointError: a directory that cannot be read or written.
    """
    config = load_config(student)
    check_pair(config, load_config(teacher))
    check_student(config, student)
    num_layers = config.num_hidden_layers
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another output or remove it first")
    if settings.layers is not None or settings.method == "even":
        method = "given" if settings.layers is not None else "even"
        layers = settings.layers or spread_layers(_keep(settings, num_layers), num_layers)
        selection = Selection(method, _checked(layers, num_layers))
    else:
        keep = _keep(settings, num_layers)
        ledger = Ledger(ledger_path(out), _identity(settings, student, teacher))
        model = MixedModel(student, teacher, dtype=getattr(torch, settings.dtype), device=device)
        sweep = Sweep(model, read_probes(teacher, settings), device=device)
        if settings.method == "greedy":
            selection = by_greedy(sweep, ledger, keep=keep, clock=_Clock(observer, num_layers, rounds=keep))
        else:
            clock = _Clock(observer, num_layers, rounds=1)
            selection = by_recall(
                sweep,
                ledger,
                keep=keep,
                epsilon=settings.epsilon,
                min_recall=settings.min_recall,
                clock=clock,
            )
    write_selection(selection, out, student=student, teacher=teacher, settings=settings)
    ledger_path(out).unlink(missing_ok=True)
    return selection


def check_student(config: HybridConfig, path: Path) -> None:
    """Raise ValueError unless every layer is RWKV: a layer without a mixer could only stay attention."""
    if config.full_layers:
        raise ValueError(
            f"{path} has attention in layer {config.full_layers[0]}, expected RWKV everywhere: convert with "
            "--keep-attention 0, train stage 1, and select then"
        )


def _keep(settings: SelectSettings, num_layers: int) -> int:
    keep = settings.keep or 0
    if not 1 <= keep < num_layers:
        raise ValueError(
            f"keep is {keep}, expected 1 to {num_layers - 1} of the {num_layers} layers: 0 stays RWKV"
        )
    return keep


def _checked(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    if outside := [layer for layer in layers if not 1 <= layer < num_layers]:
        raise ValueError(f"layers names {outside[0]}, expected 1 to {num_layers - 1}: name those")
    return tuple(sorted(layers))


def by_recall(
    sweep: Sweep, ledger: Ledger, *, keep: int, epsilon: float, min_recall: float, clock: _Clock
) -> Selection:
    """The ``keep`` layers whose replacement costs recall most for what it costs ability."""
    num_layers = len(sweep.model.blocks)
    tasks = counted_tasks(sweep.teacher_scores(), min_recall=min_recall)
    found = _walk(sweep, ledger, [False] * num_layers, range(1, num_layers), number=0, clock=clock)
    scores = recall_scores(found, tasks=tasks, epsilon=epsilon)
    best = sorted(scores, key=lambda layer: (-scores[layer], layer))[:keep]
    rows = tuple(LayerResult(layer, scores[layer], found[layer]) for layer in sorted(scores))
    return Selection("recall", tuple(sorted(best)), rows, found[None], tasks)


def counted_tasks(teacher: Scores, *, min_recall: float) -> tuple[str, ...]:
    """The recall tasks that the teacher solves; in the others a swap moves nothing but noise.

    Raises ValueError if it solves none.
    """
    recall = {task: score.recall for task, score in teacher.items() if task != TEXT}
    tasks = tuple(task for task, value in recall.items() if value >= min_recall)
    if not tasks:
        best = max(recall, key=lambda task: recall[task])
        raise ValueError(
            f"the teacher recalls too little to choose layers by it (best: {recall[best]:.2g} in {best}, "
            f"expected {min_recall:g}): use --method greedy, or lower min_recall"
        )
    return tasks


def recall_scores(
    found: dict[int | None, Scores], *, tasks: Sequence[str], epsilon: float
) -> dict[int, float]:
    """``(max R - R_i) / (max C - C_i + epsilon)`` per layer (HALO, arXiv 2601.22156), higher: keep it.

    R: ``Score.recall``, the mean over ``tasks``. C: mean log-likelihood of held-out text, nats per token.
    found: scores with each layer replaced, and at None of the teacher, which counts for both maxima: over
    the replaced models alone, the one of least harm would be divided by epsilon only.
    """
    recall = {
        layer: sum(scores[task].recall for task in tasks) / len(tasks) for layer, scores in found.items()
    }
    ability = {layer: -scores[TEXT].nll for layer, scores in found.items()}
    most_recall, most_ability = max(recall.values()), max(ability.values())
    return {
        layer: (most_recall - recall[layer]) / (most_ability - ability[layer] + epsilon)
        for layer in found
        if layer is not None
    }


def by_greedy(sweep: Sweep, ledger: Ledger, *, keep: int, clock: _Clock) -> Selection:
    """The student with one attention layer after another, each the one that leaves the least KL.

    A layer's score is what it took off the KL in the last round that tried it, in nats per token.
    """
    linear = [True] * len(sweep.model.blocks)
    rows: dict[int, LayerResult] = {}
    for number in range(keep):
        candidates = [layer for layer, is_linear in enumerate(linear) if is_linear and layer]
        found = _walk(sweep, ledger, linear, candidates, number=number, clock=clock)
        before = found[None][TEXT].kl
        rows |= {
            layer: LayerResult(layer, before - found[layer][TEXT].kl, found[layer]) for layer in candidates
        }
        linear[max(candidates, key=lambda layer: (rows[layer].score, -layer))] = False
    layers = tuple(layer for layer, is_linear in enumerate(linear) if not is_linear)
    return Selection("greedy", layers, tuple(rows[layer] for layer in sorted(rows)), ledger.round(0)[None])


def _walk(
    sweep: Sweep,
    ledger: Ledger,
    linear: Sequence[bool],
    candidates: Sequence[int],
    *,
    number: int,
    clock: _Clock,
) -> dict[int | None, Scores]:
    """Scores of round ``number``: those of the ledger, and the rest measured and written there."""
    found = ledger.round(number)
    missing = [layer for layer in candidates if layer not in found]
    clock.skip(layer for layer in candidates if layer in found)
    if missing or None not in found:
        for layer, scores in sweep.walk(linear, missing):
            ledger.add(number, layer, scores)
            clock.tick(layer)
    return ledger.round(number)


def read_probes(teacher: Path, settings: SelectSettings) -> list[Probe]:
    """Text of the dev split for the ability, and every recall task, in batches of ``batch_tokens``.

    Raises ValueError for text that cannot be read or is too short, and for a length without room for a task.
    """
    tokenizer = open_tokenizer(teacher)
    render, length = chat_renderer(tokenizer), settings.context_length
    parts = mixture_of(settings.sources)
    stores = [
        tokenize_documents(read_documents(sources, split="dev", render=render), tokenizer)
        for sources, _ in parts
    ]
    weights = [weight for _, weight in parts]
    rows = [
        PackedStream(store, context_length=length, batch_tokens=length, seed=settings.seed)
        for store in stores
    ]
    mixed = MixedRows(rows, Schedule(weights), rows_per_batch=settings.batch_tokens // length)
    available = [len(store.tokens) // length for store in stores]
    count = mixed.batches_within(available, most=settings.tokens // settings.batch_tokens)
    probes = []
    for index in range(max(count, 1)):
        token_ids, batch = mixed.batch(index)
        probes.append(Probe(TEXT, token_ids, batch, next_token_labels(token_ids, batch)))
    tasks = RecallTasks(tokenizer, stores[weights.index(max(weights))].tokens)
    for kind in tasks.kinds:
        samples = tasks.samples(
            kind, lengths=settings.recall_lengths, count=settings.recall_samples, seed=settings.seed
        )
        probes += [recall_probe(kind, part) for part in _packs(samples, settings.batch_tokens)]
    return probes


def _packs(samples: Sequence[RecallSample], batch_tokens: int) -> list[list[RecallSample]]:
    packs: list[list[RecallSample]] = [[]]
    size = 0
    for sample in samples:
        if packs[-1] and size + len(sample.token_ids) > batch_tokens:
            packs.append([])
            size = 0
        packs[-1].append(sample)
        size += len(sample.token_ids)
    return packs


class Ledger:
    """Scores of an unfinished selection in a JSON file, one entry a layer and round.

    Raises ValueError if the file is of another selection.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self._rounds: list[dict[str, Any]] = []
        if path.exists():
            earlier = read_json(path)
            if earlier.get("identity") != identity:
                raise ValueError(
                    f"{path} holds scores of another selection (other models or settings): remove it to "
                    "start anew, or choose another output"
                )
            self._rounds = earlier["rounds"]

    def round(self, number: int) -> dict[int | None, Scores]:
        """What is known of a round, by layer; None is the model without a swap."""
        rows = self._rounds[number] if number < len(self._rounds) else {}
        return {
            None if layer == "none" else int(layer): {
                task: Score(**values) for task, values in scores.items()
            }
            for layer, scores in rows.items()
        }

    def add(self, number: int, layer: int | None, scores: Scores) -> None:
        """Keep the scores of one layer, on disk at once."""
        if number == len(self._rounds):
            self._rounds.append({})
        key = "none" if layer is None else str(layer)
        self._rounds[number][key] = {task: asdict(score) for task, score in scores.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"identity": self.identity, "rounds": self._rounds})


def ledger_path(out: Path) -> Path:
    """The file of an unfinished selection, beside its output."""
    return out.with_name(f".{out.name}.select.json")


def _identity(settings: SelectSettings, student: Path, teacher: Path) -> dict[str, Any]:
    values = {name: value for name, value in asdict(settings).items() if name not in FREE}
    values["sources"], values["recall_lengths"] = list(settings.sources), list(settings.recall_lengths)
    return {
        "settings": values,
        "student": model_fingerprint(student),
        "teacher": model_fingerprint(teacher),
    }


class _Clock:
    """Time left, by blocks: a swap at layer i computes the layers from i on, and each walk all of them."""

    def __init__(self, observer: Observer, num_layers: int, *, rounds: int) -> None:
        self._observer, self._num_layers = observer, num_layers
        # Later rounds have one candidate less each; which one is not known yet, so all are counted.
        self._total = rounds * sum(range(1, num_layers + 1))
        self._done, self._began, self._skipped = 0, time.perf_counter(), 0

    def _cost(self, layer: int | None) -> int:
        return self._num_layers - (layer or 0)

    def skip(self, layers: Iterable[int]) -> None:
        """Count layers that an earlier run has measured."""
        blocks = sum(map(self._cost, layers))
        self._done, self._skipped = self._done + blocks, self._skipped + blocks

    def tick(self, layer: int | None) -> None:
        """Count a layer and report it."""
        self._done += self._cost(layer)
        rate = (self._done - self._skipped) / (time.perf_counter() - self._began)
        left = max(self._total - self._done, 0) / rate
        self._observer(SelectProgress(layer, self._done, self._total, left))
