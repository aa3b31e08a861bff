"""The published forms of these models as tables: how each spells a tensor, and what its names tell.

Ours are Hugging Face's names with RWKV-7's for the mixer; ``.pth`` files of RWKV-Infer, training checkpoints
of RWKVInside and RADLADS models differ by the tables below. Layer kinds, ranks and the variant are read from
names and shapes, never from ``layer_architecture`` (78 in every hxa079 file) nor from the number in a file's
name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hrwkv.model.config import FULL, LINEAR
from hrwkv.model.shards import CheckpointError, some

# RWKV-Infer's modules -> ours; in a layer the longest that fits counts.
PTH_TOP = {"emb": "model.embed_tokens", "head": "lm_head", "ln_out": "model.norm"}
PTH_LAYER = {
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "att.ln_r": "self_attn.r_norm",
    "att.ln_k": "self_attn.k_norm",
    "att": "self_attn",
}
# RADLADS keeps the teacher's names in its RWKV layers.
RADLADS_MIXER = {
    "q_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "q_norm": "r_norm",
    "k_norm": "k_norm",
}
CONSTANTS = ("layer_architecture", "head_size_record")
# Declared by some hxa07c checkpoints and read by no forward.
UNREAD = (".self_attn.k0", ".self_attn.k1", ".self_attn.k2", ".self_attn.v0")
# Vectors that published files store as [1, 1, C].
ROW_VECTORS = ("w0", "a0", "v0", "k0")
ADAPTER_PARTS = ("lora_A", "lora_B", "lora_M", "bone")
MIXER_MODULES = ("receptance", "key", "value", "output")
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
# Parameters of relatives that this mixer does not have, and what they mean.
FOREIGN = {
    "x_r": "token shift (x070, the RWKV-7 World models)",
    "time_maa_x": "token shift (RWKV-6)",
    "ln_x.weight": "a group norm behind the recurrence",
    "gate.weight": "a full-rank output gate",
}
LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


@dataclass
class LayerNames:
    """The tensors of one layer: ours without the layer's prefix -> theirs."""

    names: dict[str, str] = field(default_factory=dict)

    @property
    def mixer(self) -> set[str]:
        """Parameters of the mixer, ``key.weight`` or ``w0``."""
        return {name.removeprefix("self_attn.") for name in self.names if name.startswith("self_attn.")}


@dataclass(frozen=True)
class Layout:
    """What the names of a source say.

    form: "rwkv-infer-pth", "rwkv-infer-safetensors", "rwkv-inside" or "radlads". kinds: of the layers; None
    where the source has no mixer for a layer, which only a training checkpoint may. tensors: ours -> theirs.
    adapters: our name of a weight -> part -> their name. left: theirs that carry nothing of the model.
    """

    form: str
    kinds: tuple[str | None, ...]
    tensors: Mapping[str, str]
    adapters: Mapping[str, Mapping[str, str]]
    left: tuple[str, ...]

    def has(self, parameter: str) -> bool:
        """True if any RWKV layer has this parameter (``k0``)."""
        return any(name.endswith(f".self_attn.{parameter}") for name in self.tensors)


def spelled(name: str) -> str:
    """A published name in our spelling; ``ln_r`` is ``r_norm`` as long as its layer's kind is not known.

    Names that are ours already, or nobody's, come back as they are.
    """
    if name.startswith("blocks."):
        layer, _, rest = name.removeprefix("blocks.").partition(".")
        for theirs, ours in PTH_LAYER.items():
            if rest == theirs or rest.startswith(f"{theirs}."):
                return f"model.layers.{layer}.{ours}{rest.removeprefix(theirs)}"
        return name
    top, _, rest = name.partition(".")
    if top in PTH_TOP:
        return f"{PTH_TOP[top]}.{rest}"
    name = re.sub(r"^model\.(model|lm_head)\.", lambda found: f"{found[1]}.", name)
    return re.sub(r"\.self_attn\.(student_attn|time_mixer)\.", ".self_attn.", name)


def pth_name(name: str) -> str:
    """Our name of a tensor as RWKV-Infer's ``.pth`` spells it."""
    found = LAYER.match(name)
    if not found:
        module, _, kind = name.rpartition(".")
        return f"{next(theirs for theirs, ours in PTH_TOP.items() if ours == module)}.{kind}"
    layer, rest = found.groups()
    rest = rest.replace("self_attn.q_norm", "self_attn.r_norm")
    for theirs, ours in PTH_LAYER.items():
        if rest.startswith(f"{ours}."):
            return f"blocks.{layer}.{theirs}{rest.removeprefix(ours)}"
    raise AssertionError(f"{name} has no place in a .pth file")


def read_layout(names: Iterable[str], where: Path) -> Layout:
    """Sort a source's names. Raises CheckpointError for a layer with two mixers, with none, or another's."""
    names = list(names)
    top: dict[str, str] = {}
    layers: dict[int, LayerNames] = {}
    adapters: dict[str, dict[str, str]] = {}
    left = []
    for name in names:
        ours = spelled(name)
        module, _, last = ours.rpartition(".")
        found = LAYER.match(ours)
        if last in CONSTANTS or ".teacher_attn." in name or ours.endswith("rotary_emb.inv_freq"):
            left.append(name)
        elif last in ADAPTER_PARTS:
            adapters.setdefault(f"{module}.weight", {})[last] = name
        elif found is None:
            top[ours] = name
        else:
            layers.setdefault(int(found[1]), LayerNames()).names[found[2]] = name
    if not layers:
        raise CheckpointError(
            f"{where} holds {some(names) or 'nothing'}, expected a model's blocks.* or model.layers.* tensors"
        )
    form = _form(names, layers)
    kinds = []
    for number in range(1 + max(layers)):
        kinds.append(_kind(layers.get(number, LayerNames()), number, form, where))
    tensors = dict(top)
    for number, layer in sorted(layers.items()):
        kind, foreign = kinds[number], form == "radlads"
        for ours, theirs in layer.names.items():
            if foreign and kind == LINEAR and ours in ("self_attn.k_k", "self_attn.k_a", "self_attn.r_k"):
                left.append(theirs)  # the balanced form of RAD-RWKV7 declares these and reads none
            else:
                tensors[f"model.layers.{number}.{_by_kind(ours, kind, foreign)}"] = theirs
    return Layout(form, tuple(kinds), tensors, adapters, tuple(left))


def _form(names: list[str], layers: Mapping[int, LayerNames]) -> str:
    if any(name.startswith("blocks.") for name in names):
        return "rwkv-infer-pth"
    if any(".student_attn." in name or ".time_mixer." in name for name in names):
        return "rwkv-inside"
    if any({"w0", "q_proj.weight"} <= layer.mixer for layer in layers.values()):
        return "radlads"
    return "rwkv-infer-safetensors"


def _kind(layer: LayerNames, number: int, form: str, where: Path) -> str | None:
    """Linear or full attention, by which set of projections is complete."""
    mixer = layer.mixer
    for parameter, meaning in FOREIGN.items():
        if parameter in mixer:
            raise CheckpointError(
                f"{where}: layer {number} has {parameter}, that is {meaning}, which is not supported"
            )
    linear = {f"{module}.weight" for module in MIXER_MODULES} <= mixer
    full = {f"{module}.weight" for module in ATTENTION_MODULES} <= mixer
    if form == "radlads" and full and "w0" in mixer and not linear:
        return LINEAR
    if linear and full:
        raise CheckpointError(
            f"{where}: layer {number} has both an RWKV mixer (receptance) and attention (q_proj): "
            "remove the set that was not trained"
        )
    if linear or full:
        return LINEAR if linear else FULL
    if form == "rwkv-inside" and not mixer:
        return None
    raise CheckpointError(
        f"{where}: layer {number} has neither a complete RWKV mixer nor complete attention "
        f"(found {some(sorted(mixer)) or 'nothing'}): copy or download it again"
    )


def _by_kind(name: str, kind: str | None, foreign: bool) -> str:
    """A name inside a layer as a layer of this kind has it."""
    _, _, parameter = name.partition("self_attn.")
    module, dot, rest = parameter.partition(".")
    if kind == LINEAR and foreign and module in RADLADS_MIXER:
        return f"self_attn.{RADLADS_MIXER[module]}{dot}{rest}"
    if kind == LINEAR and module == "q_norm":
        module = "r_norm"
    if kind == FULL and module == "r_norm":
        module = "q_norm"
    return f"self_attn.{module}{dot}{rest}" if parameter else name
