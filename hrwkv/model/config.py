"""``HybridConfig``: everything that decides what a model computes, checked whole before weights load.

It is a Transformers config, so ``config.json`` reads and writes as any other, and ``layer_types`` speaks
the library's terms. A teacher is the same config with every layer ``"full_attention"`` and RoPE on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig

from hrwkv.layers.time_mix import VARIANTS

LINEAR, FULL = "linear_attention", "full_attention"
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
RANKS = ("decay_rank", "iclr_rank", "value_rank", "key_rank", "gate_rank")


def spread_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """``count`` attention layers spread evenly over ``num_layers``, in order.

    Layers 1 .. L-1 are cut into groups as equal as can be and the last of each is taken,
    ``ceil(j (L - 1) / count)`` for j = 1 .. count: so the last layer is one of them and the first never is.
    """
    return tuple(-(-j * (num_layers - 1) // count) for j in range(1, count + 1))


class HybridConfig(PreTrainedConfig):
    """Sizes of the teacher, the kind of every layer, and the low-rank sizes of the RWKV-7 mixer.

    layer_types: ``"linear_attention"`` or ``"full_attention"`` per layer. Layer 0 of a hybrid is linear if
    the variant has a residual to it.
    attention_rope: RoPE in the full-attention layers; a teacher has it, a finished hybrid does not.
    linear_rope: RoPE in the linear layers. variant: the mixer's arithmetic, a key of ``VARIANTS``
    (docs/hxa079.md, section 7).
    decay_rank .. gate_rank: inner sizes of the low-rank products; None where no layer is linear, and for a
    product that the variant lacks.

    Raises ValueError, naming the field, for a value that no model can have.
    """

    model_type = "hrwkv_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

    # Where None is ignored as a type: filled below, or (a rank) read only where a layer is linear.
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_types: list[str] = None  # type: ignore[assignment]
    attention_rope: bool = True
    linear_rope: bool = True
    variant: str = "hxa079"
    decay_rank: int = None  # type: ignore[assignment]
    iclr_rank: int = None  # type: ignore[assignment]
    value_rank: int = None  # type: ignore[assignment]
    key_rank: int = None  # type: ignore[assignment]
    gate_rank: int = None  # type: ignore[assignment]
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill derived fields, then check the whole config."""
        self._check_sizes(SIZES)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = [FULL] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self._check()

    @property
    def linear_layers(self) -> list[int]:
        """Indices of the RWKV-7 layers."""
        return [i for i, kind in enumerate(self.layer_types or []) if kind == LINEAR]

    @property
    def full_layers(self) -> list[int]:
        """Indices of the attention layers."""
        return [i for i, kind in enumerate(self.layer_types or []) if kind == FULL]

    @property
    def rank_names(self) -> tuple[str, ...]:
        """Those of ``RANKS`` that the variant has a product for."""
        return tuple(f"{name}_rank" for name in VARIANTS[self.variant].ranks)

    @property
    def unread_parameters(self) -> frozenset[str]:
        """The residuals' parameters in layer 0 itself: the format has them, no forward reads them."""
        if LINEAR not in (self.layer_types or []):
            return frozenset()
        variant = VARIANTS[self.variant]
        letters = "v" * variant.gates_value + "k" * variant.key_residual
        return frozenset(f"model.layers.0.self_attn.{letter}{i}" for letter in letters for i in range(3))

    def _check_sizes(self, names: Iterable[str]) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")

    def _check(self) -> None:
        self._check_sizes(("num_key_value_heads", "head_dim"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number: RoPE rotates halves")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}, only 'silu' is supported")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}, expected one of {', '.join(VARIANTS)}")
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}")
        self._check_layers()

    def _check_layers(self) -> None:
        unknown = sorted(set(self.layer_types) - {LINEAR, FULL})
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries of kinds {sorted(set(self.layer_types))}, "
                f"expected {self.num_hidden_layers} of {LINEAR!r} or {FULL!r}"
            )
        if not self.linear_layers:
            return
        if VARIANTS[self.variant].reads_layer_0 and self.layer_types[0] != LINEAR:
            raise ValueError(
                f"layer 0 is full attention, expected linear attention: {self.variant}'s residuals of all "
                "other RWKV layers lead to layer 0, so keep another layer as attention"
            )
        if missing := [name for name in self.rank_names if getattr(self, name) is None]:
            raise ValueError(
                f"a hybrid of variant {self.variant} needs {', '.join(missing)}: give a size of at least 1"
            )
        unknown = [name for name in RANKS if name not in self.rank_names and getattr(self, name) is not None]
        if unknown:
            raise ValueError(
                f"variant {self.variant} has no place for {', '.join(unknown)}: leave it out, or choose "
                "another variant"
            )
        self._check_sizes(self.rank_names)
