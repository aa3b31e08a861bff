"""What a file or directory of weights is, told from names, shapes and its config.json; no weights are loaded.

What a conversion would refuse is a sentence in ``missing`` here. Only files that cannot be read at all, and
tensors that belong to no model, raise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrwkv.convert.facts import CARRIED, Facts, ask_presets, published_facts
from hrwkv.convert.facts import SIZES as SIZES_OF_PRESETS
from hrwkv.convert.formats import LAYER, UNREAD, Layout, read_layout, spelled
from hrwkv.convert.importing import HEAD
from hrwkv.convert.presets import Preset
from hrwkv.convert.shapes import sizes_of, variant_of
from hrwkv.convert.sources import TensorReader, TorchReader, open_reader, torch_files
from hrwkv.model.cache import kv_bytes_per_token, state_bytes
from hrwkv.model.checkpoint import expected_shapes, load_config
from hrwkv.model.config import FULL, LINEAR, RANKS, HybridConfig
from hrwkv.model.shards import CHECKSUMS, CheckpointError, read_json, some

OURS, TEACHER, ADAPTER, PEFT_ADAPTER, UNKNOWN = "hrwkv", "teacher", "adapter", "peft-adapter", "unknown"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
FEATURES = (
    "tie_word_embeddings",
    "attention_bias",
    "attention_output_bias",
    "mlp_bias",
    "qk_norm",
    "linear_rope",
    "attention_rope",
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# A weight and a part of its adapter, as RWKV's trainers and as PEFT name them.
ADAPTER_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_M|bone|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
# Part -> kind of the adapter, the one that tells most first, and the axis of its shape that is the rank.
ADAPTER_KINDS = {"lora_M": "dora", "lora_magnitude_vector": "dora", "bone": "bone", "lora_A": "lora"}
RANK_AXES = {"lora_A": 0, "bone": -1}

Parts = Mapping[str, Mapping[str, str]]  # weight -> part of its adapter -> name in the source


@dataclass(frozen=True)
class Fact:
    """A value that no tensor shows; said_by: "config.json" or "preset NAME", None where nobody says it."""

    value: Any
    said_by: str | None


@dataclass(frozen=True)
class Memory:
    """Bytes of one sequence: its state in fp32, whatever its length; keys and values in bf16, per token.

    full_kv_bytes_per_token: if all layers were attention. kv_ratio: that over ``kv_bytes_per_token``, None
    for a model without attention.
    """

    state_bytes: int
    kv_bytes_per_token: int
    full_kv_bytes_per_token: int
    kv_ratio: float | None


@dataclass(frozen=True)
class Inspection:
    """What was found; None, or an empty container, where nothing tells it.

    form: "hrwkv", "teacher", a ``Layout``'s, "adapter", "peft-adapter", or "unknown" for layers of no form.
    model_type: of the config.json. linear_layers, attention_layers: their numbers. sizes, ranks, features:
    fields of ``HybridConfig``. facts: rope_theta, rope_type, rms_norm_eps, max_position_embeddings. dtypes:
    number of tensors by dtype. parameters, weight_bytes: of the tensors that carry the model, or the adapter.
    adapters: number of adapted weights by kind (lora, dora, bone); adapter_ranks: theirs. files: of weights.
    checksums: whether any are recorded; verified_files: those that were compared, None if nobody asked.
    missing: a sentence for all that is absent or does not fit. left: tensors that carry nothing.
    """

    path: str
    form: str
    model_type: str | None
    variant: str | None
    linear_layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    sizes: dict[str, int | None]
    ranks: dict[str, int]
    features: dict[str, bool | None]
    facts: dict[str, Fact]
    dtypes: dict[str, int]
    parameters: int
    weight_bytes: int
    memory: Memory | None
    adapters: dict[str, int]
    adapter_ranks: tuple[int, ...]
    files: int
    checksums: bool
    verified_files: int | None
    missing: tuple[str, ...]
    left: tuple[str, ...]


def inspect_path(path: Path, *, presets: Sequence[Preset]) -> Inspection:
    """Look at a file or a directory. presets: asked for what the weights do not tell.

    Raises CheckpointError for what cannot be read, and for tensors that are no model's and no adapter's.
    """
    return inspect_weights(open_reader(path), presets=presets)


def inspect_weights(reader: TensorReader, *, presets: Sequence[Preset]) -> Inspection:
    """``inspect_path`` of an opened source; reads no tensor but the constant ``head_size_record``."""
    return _Inspector(reader).inspect(presets)


def memory_of(kinds: Sequence[str | None], sizes: Mapping[str, Any]) -> Memory:
    """What a model's caches take. kinds: of its layers; sizes: of its heads, named as in its config."""
    linear = sum(kind == LINEAR for kind in kinds)
    own, full = (
        kv_bytes_per_token(layers, num_kv_heads=sizes["num_key_value_heads"], head_dim=sizes["head_dim"])
        for layers in (len(kinds) - linear, len(kinds))
    )
    state = state_bytes(linear, num_heads=sizes["num_attention_heads"], head_dim=sizes["head_dim"])
    return Memory(state, own, full, full / own if own else None)


class _Inspector:
    """One source, and what was found in it so far."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader, self.path = reader, reader.path
        self.missing: list[str] = []
        self.left: list[str] = []
        self.facts = Facts()
        self.fields: dict[str, Any] = {}  # of HybridConfig, as far as config or tensors show them
        self.variant: str | None = None
        self.hybrid: HybridConfig | None = None  # what the tensors have to fit
        self.config = self._json("config.json")

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """What a conversion would refuse becomes a sentence."""
        try:
            yield
        except ValueError as error:
            self.missing.append(" ".join(str(error).split()))

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON file beside the weights; empty if there is none that can be read."""
        if (self.path / name).exists():
            with self._noting():
                return read_json(self.path / name)
        return {}

    def inspect(self, presets: Sequence[Preset]) -> Inspection:
        """Look at everything, in the order in which one thing tells the next."""
        names = self.reader.names()
        parts = _adapter_parts(names)
        # An adapter may hold whole tensors too, attention among them, but never a whole RWKV mixer.
        if parts and not any(name.endswith(".receptance.weight") for name in names):
            return self._adapter(parts)
        layout = self._layout(names)
        form = self._form(layout)
        if form in (OURS, TEACHER) and self.config:
            self._learn_from_config()
        if layout is not None and not self.fields:
            self._learn_from_tensors(layout, presets)
        tensors = dict(layout.tensors) if layout is not None else {spelled(name): name for name in names}
        self._check_fit(tensors, form)
        if _kinds_of(parts).keys() & {"lora", "dora"}:
            self.missing.append("scaling: in no file, 0.5 and 2.0 are both in use; give --lora-scaling")
        self._check_companions()
        kinds = self.fields.get("layer_types") or (layout.kinds if layout is not None else ())
        return self._inspection(form, list(tensors.values()), parts, kinds=kinds)

    def _layout(self, names: list[str]) -> Layout | None:
        """None for a model with a layer that fits no form; raises for what is no model."""
        try:
            layout = read_layout(names, self.path)
        except CheckpointError as error:
            if not any(LAYER.match(spelled(name)) for name in names):
                raise
            self.missing.append(str(error))
            return None
        self.left.extend(layout.left)
        return layout

    def _form(self, layout: Layout | None) -> str:
        if self.config.get("model_type") == HybridConfig.model_type:
            return OURS
        if layout is None:
            return UNKNOWN
        # Published hybrids have the names of any Transformer; without an RWKV layer it is one.
        plain = layout.form == "rwkv-infer-safetensors" and LINEAR not in layout.kinds
        return TEACHER if plain and "rwkv_architecture" not in self.config else layout.form

    def _learn_from_config(self) -> None:
        with self._noting():
            self.hybrid = config = load_config(self.path)
            self.variant = config.variant
            self.fields = {name: getattr(config, name) for name in ("layer_types", *SIZES, *RANKS)}
            said = {name: getattr(config, name) for name in (*CARRIED, *FEATURES)}
            self.facts.learn(said, "config.json")

    def _learn_from_tensors(self, layout: Layout, presets: Sequence[Preset]) -> None:
        known, is_hybrid = self.facts.values, LINEAR in layout.kinds
        with self._noting():
            self.facts.learn(published_facts(self.config, self.path), "config.json")
        if is_hybrid:
            with self._noting():
                self.variant = variant_of(layout, known.get("variant"), self.reader)
        with self._noting():
            self.fields = _sizes(layout, self.reader, variant=self.variant, head_dim=known.get("head_dim"))
        with self._noting():
            sizes = self.fields or dict.fromkeys(SIZES_OF_PRESETS)
            ask_presets(self.facts, presets if self.fields else (), sizes, self.path)
        if self.fields and HEAD not in layout.tensors:
            self.facts.learn({"tie_word_embeddings": True}, "tensors")
        if self.fields and (self.variant or not is_hybrid):
            with self._noting():
                self.hybrid = HybridConfig(**{"attention_rope": False, **known, **self.fields})

    def _check_fit(self, tensors: dict[str, str], form: str) -> None:
        """Compare with what the config expects. tensors: ours -> theirs; takes out what nobody reads."""
        if self.hybrid is None:
            return
        expected = expected_shapes(self.hybrid)
        unread = UNREAD if self.hybrid.variant == "hxa07c" else ()
        if self.hybrid.tie_word_embeddings:
            unread = (*unread, HEAD)
        for name in sorted(tensors.keys() - expected.keys()):
            if name.endswith(unread):
                self.left.append(tensors.pop(name))
        hint = "give --teacher" if form == "rwkv-inside" else "copy or download it again"
        if lacking := sorted(expected.keys() - tensors.keys()):
            self.missing.append(f"{self.path} lacks {some(lacking)}: {hint}")
        if spare := sorted(tensors.keys() - expected.keys()):
            self.missing.append(f"{self.path} holds {some(spare)}, which this model has no place for")
        found = {name: self.reader.shape(tensors[name]) for name in expected if name in tensors}
        # Published vectors are rows.
        misshapen = [name for name in found if found[name] not in (expected[name], (1, 1, *expected[name]))]
        for name in misshapen[:1]:
            more = f", and {len(misshapen) - 1} more do not fit" if misshapen[1:] else ""
            shapes = f"{list(found[name])}, expected {list(expected[name])}"
            self.missing.append(f"{self.path}: {tensors[name]} has shape {shapes}{more}")

    def _check_companions(self) -> None:
        """What a model needs beside its weights before one can talk to it."""
        if not self.path.is_dir():
            self.missing.append("tokenizer: not in a file of weights; give --tokenizer")
            return
        if not (self.path / "config.json").exists():
            self.missing.append("config.json: not beside the weights")
        if not any((self.path / name).exists() for name in TOKENIZERS):
            self.missing.append(f"tokenizer: none of {', '.join(TOKENIZERS)} beside the weights")
        has_file = any((self.path / name).exists() for name in CHAT_TEMPLATES)
        if not (has_file or "chat_template" in self._json("tokenizer_config.json")):
            self.missing.append("chat template: neither a file nor in tokenizer_config.json")

    def _adapter(self, parts: Parts) -> Inspection:
        base, peft = "a model that it does not name", self._json("adapter_config.json")
        if peft:
            base = f"{peft.get('base_model_name_or_path') or base}, made by PEFT ({peft.get('peft_type')})"
        elif _kinds_of(parts).keys() & {"lora", "dora"}:
            self.missing.append("scaling: in no file, 0.5 and 2.0 are both in use; give --scaling")
        self.missing.append(f"model: this is an adapter of {base}; hrwkv adapter merge puts both together")
        return self._inspection(PEFT_ADAPTER if peft else ADAPTER, self.reader.names(), parts, kinds=())

    def _inspection(
        self, form: str, carried: list[str], parts: Parts, *, kinds: Sequence[str | None]
    ) -> Inspection:
        fields, numel = self.fields, {name: math.prod(self.reader.shape(name)) for name in carried}
        ranks = {
            self.reader.shape(group[part])[RANK_AXES[part]]
            for group in parts.values()
            for part in RANK_AXES & group.keys()
        }
        return Inspection(
            path=str(self.path),
            form=form,
            model_type=self.config.get("model_type"),
            variant=self.variant if LINEAR in kinds else None,
            linear_layers=tuple(number for number, kind in enumerate(kinds) if kind == LINEAR),
            attention_layers=tuple(number for number, kind in enumerate(kinds) if kind != LINEAR),
            sizes={name: fields.get(name) for name in SIZES},
            ranks={name: fields[name] for name in RANKS if fields.get(name) is not None},
            features={name: fields.get(name, self.facts.values.get(name)) for name in FEATURES},
            facts=self._told(),
            dtypes=dict(sorted(Counter(map(self.reader.dtype, carried)).items())),
            parameters=sum(numel.values()),
            weight_bytes=sum(numel[name] * _bits(self.reader.dtype(name)) // 8 for name in carried),
            memory=memory_of(kinds, fields) if fields else None,
            adapters=_kinds_of(parts),
            adapter_ranks=tuple(sorted(ranks)),
            files=_count_files(self.reader),
            checksums=_has_checksums(self.path),
            verified_files=None,
            missing=tuple(self.missing),
            left=tuple(self.left),
        )

    def _told(self) -> dict[str, Fact]:
        values, said_by = self.facts.values, self.facts.said_by
        rope = values.get("rope_parameters", {})
        told = {
            name: Fact(rope.get(name), said_by.get("rope_parameters")) for name in ("rope_theta", "rope_type")
        }
        for name in ("rms_norm_eps", "max_position_embeddings"):
            told[name] = Fact(values.get(name), said_by.get(name))
        return told


def _sizes(
    layout: Layout, reader: TensorReader, *, variant: str | None, head_dim: int | None
) -> dict[str, Any]:
    """``sizes_of`` for sources, too, that do not tell their variant or leave out what they did not train."""
    if layout.kinds[0] is None:
        raise CheckpointError(f"{reader.path} has no mixer in layer 0: give --teacher")
    # A layer without a mixer is attention, as in the teacher.
    whole = replace(layout, kinds=tuple(kind or FULL for kind in layout.kinds))
    # Variants whose tensors are the same differ in arithmetic only, so the sizes are those of any of them.
    by_shape = {"k0": "hxa079", "v0": "radlads", "v1": "hxa07c"}
    similar = next((name for parameter, name in by_shape.items() if layout.has(parameter)), "hxa07a")
    return sizes_of(whole, reader, variant=variant or similar, head_dim=head_dim)


def _adapter_parts(names: Sequence[str]) -> dict[str, dict[str, str]]:
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        if found := ADAPTER_PART.fullmatch(name):
            parts.setdefault(found[1], {})[found[2]] = name
    return parts


def _kinds_of(parts: Parts) -> dict[str, int]:
    """Number of adapted weights by kind."""
    kinds = (
        next((kind for part, kind in ADAPTER_KINDS.items() if part in group), "lora")
        for group in parts.values()
    )
    return dict(sorted(Counter(kinds).items()))


def _bits(dtype: str) -> int:
    """Bits of an element by the name of its dtype, which torch need not know; a bool takes 8."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _count_files(reader: TensorReader) -> int:
    if not reader.path.is_dir():
        return 1
    if isinstance(reader, TorchReader):
        return len(torch_files(reader.path))
    return len(list(reader.path.glob("*.safetensors")))


def _has_checksums(path: Path) -> bool:
    record = path / CHECKSUMS if path.is_dir() else path.with_name(f"{path.name}.sha256")
    return record.exists()
