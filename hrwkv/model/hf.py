"""``HybridForCausalLM``: the border to Transformers; generate(), PEFT, from_pretrained, and the Auto classes.

A padded call becomes packed tokens and a ``TokenBatch``, runs through the one ``Backbone``, and is padded
again. The memory is Transformers' own cache, seen as a ``HybridCache`` for the length of a call: a linear
layer's recurrent state is the state pool with one slot per row, an attention layer's keys are a paged cache
with one block per row. Cached calls are padded on the left only, and carry no gradient. Left out: attention
maps, quantised and offloaded caches, models split over devices, and assisted decoding (a recurrent state
cannot be taken back).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.time_mix import TimeMix
from hrwkv.model.cache import HybridCache
from hrwkv.model.config import LINEAR, HybridConfig
from hrwkv.model.modeling import Backbone, HybridModel


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A hybrid, or a teacher opened as an all-attention model, as Transformers expects a causal LM."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_core(cls, core: HybridModel) -> HybridForCausalLM:
        """The same modules under this class; no weight is copied, and a change to one is a change to both."""
        with torch.device("meta"):
            model = cls(core.config)
        model.model, model.lm_head = core.model, core.lm_head
        return model.train(core.training)

    @torch.compiler.disable  # sequence lengths are host integers; generate() would compile once per length
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        input_ids: [B, T] int64, or inputs_embeds [B, T, D]. attention_mask: [B, T], with a cache
        [B, past + T], 1 where a column holds a token. position_ids: [B, T] or [1, T]; None counts the tokens
        of each row. Without a cache a token at position 0 starts a sequence of its own, so packed documents
        stay apart. labels: [B, T], -100 is not counted. use_cache: None caches as the config says, unless
        gradients are on. logits_to_keep: the last so many columns, or the indices of columns; 0 is all.
        loss_arguments: what a trainer hands to the loss.

        Returns logits [B, T', V]. Raises ValueError for a mask or a cache that this model cannot use.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        if output_attentions:
            raise ValueError("output_attentions is set, but no attention map is ever formed: leave it out")
        padded = input_ids if input_ids is not None else inputs_embeds
        assert padded is not None
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        carries_gradient = torch.is_grad_enabled() and past_key_values is None
        if labels is not None and torch.is_grad_enabled() and not carries_gradient:
            raise ValueError("a cache carries no gradient: train without past_key_values and use_cache")

        memory = None
        if past_key_values is None:
            call = _PaddedCall.of(_token_columns(attention_mask, padded, past=0))
            batch = _uncached_batch(call, position_ids)
        else:
            call, batch, memory = _cached_batch(padded, attention_mask, position_ids, past_key_values, self)
        collect = _inputs_of(self.model.layers, bool(output_hidden_states))
        with torch.set_grad_enabled(carries_gradient), collect as seen:
            hidden = call.pad(self.model(call.pack(padded), batch, memory))  # [B, T, D]

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_arguments)
        states = (*(call.pad(x) for x in seen), hidden) if output_hidden_states else None
        return CausalLMOutputWithPast(loss, logits, past_key_values, hidden_states=states)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **unused: Any) -> Tensor | None:
        """The mask as it is: generate() builds 4-D masks for a static cache, unpadding wants the columns."""
        return attention_mask

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, for PEFT and for resizing."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        """False without attention: generate() then asks no cache for a length; forward() makes the cache."""
        return bool(self.config.full_layers)

    def _init_weights(self, module: nn.Module) -> None:
        """Plain random weights; those of a conversion are hxa079.md (26) and (27)."""
        super()._init_weights(module)
        if isinstance(module, TimeMix):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("2"):  # with both factors at zero neither would ever get a gradient
                    init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
                else:
                    init.zeros_(parameter)


@dataclass(frozen=True)
class _PaddedCall:
    """Which of a call's [B, T] columns hold tokens, and how many each row has."""

    real: Tensor  # [B, T] bool
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, real: Tensor) -> _PaddedCall:
        return cls(real, tuple(real.sum(1).tolist()))

    @property
    def is_full(self) -> bool:
        return sum(self.lengths) == self.real.numel()

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] -> [tokens, ...]."""
        return padded.flatten(0, 1) if self.is_full else padded[self.real]

    def pad(self, packed: Tensor) -> Tensor:
        """[tokens, D] -> [B, T, D], zeros where there is no token."""
        if self.is_full:
            return packed.view(*self.real.shape, -1)
        padded = packed.new_zeros(*self.real.shape, packed.shape[-1])
        padded[self.real] = packed
        return padded

    def positions(self, seen: Tensor | int, position_ids: Tensor | None) -> Tensor:
        """[tokens] int64: as given, or counted on from the tokens that each row had before."""
        if position_ids is None:
            return self.pack(self.real.long().cumsum(1) - 1 + seen)
        return self.pack(position_ids.expand(self.real.shape))


def _token_columns(attention_mask: Tensor | None, padded: Tensor, *, past: int | None) -> Tensor:
    """[B, T] bool, true for a token of this call. past: earlier columns, None if nothing counts them."""
    rows, columns = padded.shape[:2]
    if attention_mask is None:
        return torch.ones(rows, columns, dtype=torch.bool, device=padded.device)
    width = attention_mask.shape[-1]
    fits = attention_mask.dim() == 2 and len(attention_mask) == rows
    if not fits or width < columns or (past is not None and width != past + columns):
        expected = [rows, columns if past is None else past + columns]
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected {expected}: one column for "
            "each cached and each new token, 1 for a token and 0 for padding"
        )
    return attention_mask[:, width - columns :].bool()


def _uncached_batch(call: _PaddedCall, position_ids: Tensor | None) -> TokenBatch:
    """One sequence per row, or with positions given one per token at position 0."""
    positions, lengths = call.positions(0, position_ids), call.lengths
    if position_ids is not None:
        ends = torch.tensor(lengths, device=positions.device).cumsum(0)
        starts = positions == 0
        starts[ends[ends < len(positions)]] = True
        starts[:1] = True
        bounds = [*starts.nonzero().flatten().tolist(), len(positions)]
        lengths = tuple(end - start for start, end in pairwise(bounds))
    return TokenBatch(positions=positions, cu_seqlens=_bounds(lengths, positions.device), lengths=lengths)


def _cached_batch(
    padded: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache,
    model: HybridForCausalLM,
) -> tuple[_PaddedCall, TokenBatch, HybridCache]:
    """The new tokens of every row, where each goes, and the cache's tensors to put it in."""
    config, (rows, columns) = model.config, padded.shape[:2]
    _check_cache(cache, config, rows=rows)
    past = int(cache.get_seq_length()) if config.full_layers else None
    real = _token_columns(attention_mask, padded, past=past)
    seen = _seen_tokens(cache, config, attention_mask, real=real, past=past)
    gap = (real[:, :-1] & ~real[:, 1:]).any(1) | ((seen > 0) & ~real[:, 0])
    if bool(gap.any()):
        raise ValueError("attention_mask has padding behind a token, a cache cannot hold it: pad on the left")
    call = _PaddedCall.of(real)
    counts = real.sum(1)
    width = (past or 0) + columns  # columns cached after this call
    if 0 <= (limit := cache.get_max_length()) < width:
        raise ValueError(f"the cache holds {limit} tokens, the call needs {width}: make a longer one")
    slots = torch.arange(rows, device=real.device)
    place = slots.unsqueeze(1) * width + torch.arange(width - columns, width, device=real.device)
    batch = TokenBatch(
        positions=call.positions(seen.unsqueeze(1), position_ids),
        cu_seqlens=_bounds(call.lengths, real.device),
        lengths=call.lengths,
        state_slots=slots,
        block_tables=slots.unsqueeze(1),
        slot_mapping=call.pack(place),
        context_lens=torch.full_like(slots, width),
        context_starts=width - seen - counts,
    )
    return call, batch, _open_memory(cache, model, seen=seen + counts, columns=columns, width=width)


def _seen_tokens(
    cache: Cache, config: HybridConfig, attention_mask: Tensor | None, *, real: Tensor, past: int | None
) -> Tensor:
    """[B] int64, the tokens that each row had before this call."""
    if config.linear_layers:
        counts = cache.layers[config.linear_layers[0]].conv_states[0]  # type: ignore[union-attr]
        return torch.zeros_like(real[:, 0], dtype=torch.int64) if counts is None else counts[:, 0, 0]
    if attention_mask is None:
        return torch.full_like(real[:, 0], past or 0, dtype=torch.int64)
    return attention_mask[:, :past].bool().sum(1)


def _open_memory(
    cache: Cache, model: HybridForCausalLM, *, seen: Tensor, columns: int, width: int
) -> HybridCache:
    """Make room in the cache for ``columns`` more columns, and see its tensors as ours."""
    config, rows, size = model.config, len(seen), model.config.head_dim
    states, keys, values = [], [], []
    for index, kind in enumerate(config.layer_types or []):
        layer: Any = cache.layers[index]
        if kind == LINEAR:
            if not layer.is_recurrent_states_initialized[0]:
                shape = (rows, config.num_attention_heads, size, size)
                cache.update_recurrent_state(torch.zeros(shape, device=seen.device), index)
            layer.has_previous_state[0] = True
            states.append(layer.recurrent_states[0])
        else:
            empty = torch.zeros(1, dtype=model.dtype, device=seen.device)
            empty = empty.expand(rows, config.num_key_value_heads, columns, size)
            cache.update(empty, empty, index)
            keys.append(layer.keys[:, :, :width].transpose(1, 2))  # [B, width, H_kv, K]
            values.append(layer.values[:, :, :width].transpose(1, 2))
    if config.linear_layers:
        # No layer here convolves: the first one's convolution state counts the tokens of every row, so that
        # the library's beams, resets and row selections carry the count along with the memory.
        cache.update_conv_state(seen.view(-1, 1, 1), config.linear_layers[0], conv_kernel_size=1)
    return HybridCache(state=states, k_cache=keys, v_cache=values)


def _check_cache(cache: Cache, config: HybridConfig, *, rows: int) -> None:
    """Refuse a cache whose tensors are not the memory itself, or that belongs to another batch."""
    layers, kinds = getattr(cache, "layers", []), config.layer_types or []
    fits = len(layers) == config.num_hidden_layers and not getattr(cache, "offloading", False)
    for layer, kind in zip(layers, kinds, strict=False):
        fits &= type(layer) in ((LinearAttentionLayer,) if kind == LINEAR else (DynamicLayer, StaticLayer))
    if not fits:
        raise ValueError(
            f"the cache is a {type(cache).__name__} that does not hold this model's layers in place: "
            "use DynamicCache(config=model.config) or StaticCache(config=model.config, ...)"
        )
    for layer, kind in zip(layers, kinds, strict=True):
        held = layer.recurrent_states[0] if kind == LINEAR else layer.keys
        if held is not None and held.dim() == 4 and len(held) != rows:
            raise ValueError(f"the cache holds {len(held)} rows, the call brings {rows}: make a new cache")


def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[N + 1] int32, where packed sequences start and end."""
    return torch.tensor((0, *lengths), device=device).cumsum(0).to(torch.int32)


@contextmanager
def _inputs_of(layers: nn.ModuleList, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect what enters each layer, [tokens, D], while the block runs."""
    seen: list[Tensor] = []
    observed: Iterable[nn.Module] = layers if wanted else []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in observed]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
