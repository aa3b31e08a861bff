"""A published model in, one of our directories out, tensor by tensor.

Everything is planned from names and shapes: what does not fit is told before the first byte is written. Then
every tensor is mapped, checked to be finite, given its shape, and handed to the writer, which holds one
shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrwkv.convert.adapters import check_parts, merge_weight, needs_scaling
from hrwkv.convert.facts import Facts, ask_presets, check_like, gather
from hrwkv.convert.formats import CONSTANTS, UNREAD, Layout, read_layout
from hrwkv.convert.presets import ChatFormat, Preset
from hrwkv.convert.shapes import sizes_of, variant_of
from hrwkv.convert.sources import TensorReader, open_reader
from hrwkv.convert.transfer import Report, largest_layer_bytes, versions
from hrwkv.model.checkpoint import carried_names, expected_shapes, load_config, write_config
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.shards import NO_REASONING, CheckpointError, ShardReader, ShardWriter, read_json, some
from hrwkv.settings import ImportSettings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Imported:
    """What an import wrote.

    form: of the source (formats.py). said_by: who said each fact that tensors do not tell. tensors: their
    number, of which ``from_teacher`` are the teacher's and ``merged`` had adapter parts. left: source tensors
    that carry nothing. parameters: a tied head counted once.
    """

    path: Path
    config: HybridConfig
    form: str
    said_by: Mapping[str, str]
    tensors: int
    from_teacher: int
    merged: int
    left: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class Piece:
    """Where one tensor of ours comes from; parts: adapter part -> its name in the source.

    source: its name there; empty for zeros in the place of what no forward reads and some files leave out.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    parts: Mapping[str, str]


class CompletedReader:
    """A training checkpoint with its teacher behind it, whose tensors are named ``teacher:...``."""

    PREFIX = "teacher:"

    def __init__(self, trained: TensorReader, teacher: TensorReader) -> None:
        self.path = trained.path
        self._readers = trained, teacher

    def names(self) -> list[str]:
        """The trained tensors, then the teacher's."""
        trained, teacher = self._readers
        return trained.names() + [self.PREFIX + name for name in teacher.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor."""
        return self._of(name).shape(name.removeprefix(self.PREFIX))

    def dtype(self, name: str) -> str:
        """The dtype as torch calls it, without reading the tensor."""
        return self._of(name).dtype(name.removeprefix(self.PREFIX))

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype."""
        return self._of(name).read(name.removeprefix(self.PREFIX))

    def _of(self, name: str) -> TensorReader:
        return self._readers[name.startswith(self.PREFIX)]


def import_model(
    source: Path,
    out: Path,
    settings: ImportSettings,
    *,
    like: Preset | None = None,
    presets: Sequence[Preset] = (),
    teacher: Path | None = None,
    tokenizer: Path | None = None,
    report: Report | None = None,
) -> Imported:
    """Write a published model as one of our directories; ``out`` must not exist.

    like: the preset that says what the source does not. presets: the shipped ones, asked if their sizes fit.
    teacher: directory that a training checkpoint's frozen weights come from. tokenizer: directory whose
    tokenizer and chat template come along; None takes the source's, else the teacher's. report: as in
    ``convert``. Raises CheckpointError for what cannot be read or does not fit; on any error ``out`` does not
    exist.
    """
    source = Path(source)
    reader, layout = _open(source, teacher)
    said = read_json(source / "config.json") if (source / "config.json").exists() else None
    teacher_config = load_config(teacher) if teacher is not None else None
    facts = gather(said, settings, like=like, teacher=teacher_config, where=source)
    config = _config(reader, layout, facts, like=like, presets=presets)
    pieces = _plan(reader, layout, config, settings)
    dtype = _dtype(reader, pieces, settings)
    check = None if settings.allow_nan else partial(_check_finite, reader, pieces)
    with ShardWriter(out, max_shard_bytes=_shard_bytes(pieces, settings, dtype), check=check) as writer:
        for number, piece in enumerate(pieces, start=1):
            if report is not None:
                report(piece.name, number, len(pieces))
            writer.add(piece.name, _tensor(reader, piece, settings, dtype))
        write_config(writer, config, dtype)
        writer.write_json("import.json", _record(layout, facts, settings, reader, like=like, teacher=teacher))
        folders = (tokenizer, source if source.is_dir() else None, teacher)
        writer.copy_companions(*(Path(folder) for folder in folders if folder is not None))
        if like is not None and like.chat is not None:
            write_chat(writer, like.chat)
    return Imported(
        path=writer.path,
        config=config,
        form=layout.form,
        said_by=facts.said_by,
        tensors=len(pieces),
        from_teacher=sum(piece.source.startswith(CompletedReader.PREFIX) for piece in pieces),
        merged=sum(bool(piece.parts) for piece in pieces),
        left=layout.left,
        parameters=sum(math.prod(piece.shape) for piece in pieces),
    )


def write_chat(writer: ShardWriter, chat: ChatFormat) -> None:
    """Add what a preset knows of talking and the files that came along do not: templates and ends."""
    own = writer.read_json("tokenizer_config.json").get("chat_template")
    if not writer.has("chat_template.jinja"):
        # Beside a named template Transformers reads the default from this file alone.
        writer.write_text("chat_template.jinja", own if isinstance(own, str) else chat.template)
    if chat.no_reasoning_template is not None and not writer.has(NO_REASONING):
        writer.write_text(NO_REASONING, chat.no_reasoning_template)
    said = {"eos_token_id": list(chat.eos_token_id), "stop_strings": list(chat.stop) or None}
    said = {name: value for name, value in said.items() if value is not None}
    writer.write_json("generation_config.json", {**said, **writer.read_json("generation_config.json")})


def _open(source: Path, teacher: Path | None) -> tuple[TensorReader, Layout]:
    """Open and sort the source; what it lacks is the teacher's, a layer without a mixer its attention."""
    reader = open_reader(source)
    layout = read_layout(reader.names(), source)
    if teacher is None:
        if None in layout.kinds:
            number = layout.kinds.index(None)
            raise CheckpointError(
                f"{source} has no mixer for layer {number}: its attention is the teacher's, give --teacher"
            )
        return reader, layout
    total = load_config(teacher).num_hidden_layers
    kinds = [kind or FULL for kind in layout.kinds] + [FULL] * (total - len(layout.kinds))
    if len(kinds) > total:
        raise CheckpointError(f"{source} has {len(kinds)} layers, but its teacher {teacher} has {total}")
    behind = ShardReader(teacher)
    linear = {f"model.layers.{number}.self_attn." for number, kind in enumerate(kinds) if kind == LINEAR}
    tensors = {
        name: CompletedReader.PREFIX + name
        for name in carried_names(teacher, behind.names())
        if not any(name.startswith(layer) for layer in linear)
    }
    completed = replace(layout, kinds=tuple(kinds), tensors={**tensors, **layout.tensors})
    return CompletedReader(reader, behind), completed


def _config(
    reader: TensorReader, layout: Layout, facts: Facts, *, like: Preset | None, presets: Sequence[Preset]
) -> HybridConfig:
    """The whole config: sizes from tensors, the rest from facts."""
    known = dict(facts.values)
    variant = variant_of(layout, known.pop("variant", None), reader)
    sizes = sizes_of(layout, reader, variant=variant, head_dim=known.pop("head_dim", None))
    if LINEAR not in sizes["layer_types"]:
        raise CheckpointError(f"{reader.path} has no RWKV layer: it is a teacher, use hrwkv convert")
    if like is not None:
        check_like(like, sizes, reader.path)
    ask_presets(facts, presets, sizes, reader.path)
    tied = _is_tied(reader, layout, known.pop("tie_word_embeddings", None))
    values = {"attention_rope": False, **facts.values, **known, **sizes, "tie_word_embeddings": tied}
    try:
        return HybridConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {error}") from error


def _is_tied(reader: TensorReader, layout: Layout, stated: bool | None) -> bool:
    """Tied if there is no head, or if the head is the embedding, bit for bit; ``.pth`` files hold both."""
    if HEAD not in layout.tensors:
        return True
    if stated is False:
        return False
    head, embedding = reader.read(layout.tensors[HEAD]), reader.read(layout.tensors[EMBEDDING])
    same = torch.equal(head[:1], embedding[:1]) and torch.equal(head, embedding)
    if stated and not same:
        raise CheckpointError(
            f"{reader.path}: {layout.tensors[HEAD]} differs from {layout.tensors[EMBEDDING]}, but "
            "config.json has tie_word_embeddings true: set it to false"
        )
    return same


def _plan(
    reader: TensorReader, layout: Layout, config: HybridConfig, settings: ImportSettings
) -> list[Piece]:
    """Every tensor of ours, in order. Raises CheckpointError for what is missing, left over or misshapen."""
    pieces = []
    for name, shape in expected_shapes(config).items():
        if name not in layout.tensors and name in config.unread_parameters:
            pieces.append(Piece(name, shape, "", {}))
            continue
        if name not in layout.tensors:
            hint = "copy or download it again"
            if layout.form == "rwkv-inside":
                hint = "a training checkpoint holds what was trained, give --teacher for the rest"
            raise CheckpointError(f"{reader.path} lacks {name}: {hint}")
        source = layout.tensors[name]
        found = reader.shape(source)
        if found not in (shape, (1, 1, *shape)):
            raise CheckpointError(f"{reader.path}: {source} has shape {list(found)}, expected {list(shape)}")
        parts = layout.adapters.get(name, {})
        if parts:
            _check_adapter(reader, name, shape, parts, settings)
        pieces.append(Piece(name, shape, source, parts))
    used = {piece.name for piece in pieces}
    spare = layout.tensors.keys() - used - ({HEAD} if config.tie_word_embeddings else set())
    if config.variant == "hxa07c":
        spare = {name for name in spare if not name.endswith(UNREAD)}
    if spare:
        raise CheckpointError(f"{reader.path} holds {some(sorted(spare))}, which this model has no place for")
    if orphans := sorted(layout.adapters.keys() - used):
        raise CheckpointError(f"{reader.path} has adapter parts for {some(orphans)}, which is no weight")
    return pieces


def _check_adapter(
    reader: TensorReader,
    name: str,
    shape: tuple[int, ...],
    parts: Mapping[str, str],
    settings: ImportSettings,
) -> None:
    """Raise CheckpointError for parts that do not fit their weight, or whose scaling nobody says."""
    try:
        check_parts(shape, {part: reader.shape(theirs) for part, theirs in parts.items()})
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: adapter of {name}: {error}") from error
    if needs_scaling(parts) and settings.lora_scaling is None:
        raise CheckpointError(
            f"{reader.path} has LoRA parts and no file says their scaling (0.5 and 2.0 are both in use): "
            "give --lora-scaling"
        )


def _dtype(reader: TensorReader, pieces: Sequence[Piece], settings: ImportSettings) -> torch.dtype:
    """The dtype that is asked for, else the one that all weights have."""
    found: dict[str, str] = {}
    for piece in filter(lambda piece: piece.source, pieces):
        found.setdefault(reader.dtype(piece.source), piece.source)
    if unknown := sorted(found.keys() - set(DTYPES)):
        raise CheckpointError(
            f"{reader.path}: {found[unknown[0]]} has dtype {unknown[0]}, expected {', '.join(DTYPES)}"
        )
    if settings.dtype is not None:
        return DTYPES[settings.dtype]
    if len(found) > 1:
        (a, first), (b, second), *_ = found.items()
        raise CheckpointError(
            f"{reader.path} mixes dtypes: {first} is {a}, {second} is {b}; "
            "give the one to convert all to, --dtype bfloat16"
        )
    return DTYPES[next(iter(found))]


def _shard_bytes(pieces: Sequence[Piece], settings: ImportSettings, dtype: torch.dtype) -> int:
    if settings.max_shard_gib is not None:
        return int(settings.max_shard_gib * 1024**3)
    return largest_layer_bytes({piece.name: math.prod(piece.shape) * dtype.itemsize for piece in pieces})


def _tensor(reader: TensorReader, piece: Piece, settings: ImportSettings, dtype: torch.dtype) -> Tensor:
    """A piece's tensor, adapter parts merged."""
    if not piece.source:
        return torch.zeros(piece.shape, dtype=dtype)
    tensor = reader.read(piece.source)
    if piece.parts:
        parts = {part: reader.read(name) for part, name in piece.parts.items()}
        tensor = merge_weight(tensor, parts, scaling=settings.lora_scaling)
    return tensor.to(dtype).view(piece.shape)


def _check_finite(reader: TensorReader, pieces: Sequence[Piece], name: str, tensor: Tensor) -> None:
    """Raise CheckpointError, by the source's name, for a tensor that holds NaN or infinity."""
    # aminmax is the one reduction that is vectorised for bf16, and it passes NaN and infinity on.
    if all(end.isfinite() for end in tensor.aminmax()):
        return
    source = next(piece.source for piece in pieces if piece.name == name)
    raise CheckpointError(
        f"{reader.path}: {source} holds NaN or infinity: copy or download it again, "
        "or take it as it is with --allow-nan"
    )


def _record(
    layout: Layout,
    facts: Facts,
    settings: ImportSettings,
    reader: TensorReader,
    *,
    like: Preset | None,
    teacher: Path | None,
) -> dict[str, Any]:
    """``import.json``: enough to repeat the import and to write the source's form again."""
    return {
        "source": reader.path.resolve().name,
        "form": layout.form,
        "constants": any(name.endswith(CONSTANTS) for name in layout.left),
        "like": like.name if like is not None else None,
        "teacher": Path(teacher).resolve().name if teacher is not None else None,
        "said_by": facts.said_by,
        "left": list(layout.left),
        "settings": asdict(settings),
        "versions": versions(),
    }
