"""The RWKV-7 recurrence as it is defined: one token after the other, plain autograd.

This is the reference that every other form is tested against, so it favours being read over being fast. It
walks each packed sequence on its own. It computes in fp32, or in fp64 when the inputs are fp64. It leaves
out every check of its arguments: ``hrwkv.kernels.wkv7`` holds those.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def step(
    state: Tensor, r: Tensor, *, log_decay: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token, hxa079.md (11): the new state and its output ``S^T r``.

    Args:
        state: ``[..., K, V]``, the state before the token.
        r: ``[..., K]``; so are ``log_decay``, ``k``, ``a`` and ``b``.
        log_decay: natural logarithm of the decay per key channel, <= 0.
        k: the key.
        v: ``[..., V]``, the value.
        a: minus the normalised key; it reads the state before the decay.
        b: the normalised key times the in-context learning rate.
    """
    removed = a.unsqueeze(-2) @ state  # [..., 1, V]
    state = (
        log_decay.exp().unsqueeze(-1) * state + b.unsqueeze(-1) * removed + k.unsqueeze(-1) * v.unsqueeze(-2)
    )
    return state, (r.unsqueeze(-2) @ state).squeeze(-2)


def wkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over packed sequences; the contract is ``hrwkv.kernels.wkv7.wkv7``'s."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    inputs = [x.to(dtype) for x in (r, log_decay, k, v, a, b)]
    shape = (len(lengths), *k.shape[1:], v.shape[-1])
    states = v.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs, final_states, start = [], [], 0
    for state, length in zip(states.unbind(), lengths, strict=True):
        for t in range(start, start + length):
            r_t, log_decay_t, k_t, v_t, a_t, b_t = (x[t] for x in inputs)
            state, o_t = step(state, r_t, log_decay=log_decay_t, k=k_t, v=v_t, a=a_t, b=b_t)
            outputs.append(o_t)
        final_states.append(state)
        start += length
    o = torch.stack(outputs) if outputs else torch.zeros_like(v)
    return o.to(v.dtype), torch.stack(final_states) if final_states else states


def wkv7_decode(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor,
    state_slots: Tensor,
) -> Tensor:
    """Advance each sequence by one token; the contract is ``hrwkv.kernels.wkv7.wkv7_decode``'s."""
    r_t, log_decay_t, k_t, v_t, a_t, b_t = (x.to(state.dtype) for x in (r, log_decay, k, v, a, b))
    before = state.index_select(0, state_slots)
    after, o = step(before, r_t, log_decay=log_decay_t, k=k_t, v=v_t, a=a_t, b=b_t)
    state.index_copy_(0, state_slots, after)
    return o.to(v.dtype)
