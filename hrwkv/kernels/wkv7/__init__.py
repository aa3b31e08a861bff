"""The RWKV-7 recurrence over packed sequences: arguments are checked here, then a form is chosen.

``naive`` is the definition, ``chunk_torch`` the same function in matrix products for every device,
``chunk_triton`` and ``decode`` its GPU forms. The choice depends on the device, dtypes and sizes only, never
on the environment, so a run can be repeated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hrwkv.kernels.mix import FirstLayer, Form, Rope, Rows, Weights, check, finish, mix
from hrwkv.kernels.mix.naive import repeat_heads
from hrwkv.kernels.wkv7 import chunk_torch, naive

TRITON_SIZES = (32, 64, 96, 128)


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
    """Run ``S = diag(exp(log_decay)) S + b (a^T S) + k v^T``, ``o = S^T r`` over packed sequences.

    Source: RWKV-7 (arXiv:2503.14456), equations 15 to 17; hxa079.md (11). Differentiable in every input.

    Args:
        r: ``[T, H, K]`` receptance; any floating dtype, as for every input. The sequences follow one another.
        log_decay: ``[T, H, K]`` logarithm of the decay, in (-exp(-0.5), 0) for hxa079. The chunked form
            scales by exp(-sum of log_decay) inside a chunk: values under about -2.5 overflow fp32 there.
        k: ``[T, H, K]`` key.
        v: ``[T, H_v, V]`` value; head h reads ``h // (H / H_v)``, so shared values are not repeated.
        a: ``[T, H_a, K]`` minus the normalised key, shared alike; reads the state before the decay.
        b: ``[T, H, K]`` normalised key times the in-context learning rate.
        cu_seqlens: ``[N + 1]`` int32 or int64, where each sequence starts and the last one ends.
        lengths: the N sequence lengths on the host (>= 0, their sum is T), so that nothing waits for a
            device.
        initial_state: ``[N, H, K, V]``, or None for zeros.

    Returns:
        ``o [T, H, V]`` in the dtype of ``v``, and the state after each sequence ``[N, H, K, V]`` in fp32
        (fp64 for fp64 values); a sequence of length zero returns its initial state.

    Raises:
        ValueError: if shapes, dtypes, devices or lengths do not fit one another.
    """
    _check_tokens(r, log_decay, k=k, v=v, a=a, b=b)
    num_sequences = len(lengths)
    if min(lengths, default=0) < 0 or sum(lengths) != len(r):
        raise ValueError(
            f"lengths are {_shorten(lengths)} with sum {sum(lengths)}, but r holds {len(r)} tokens: give one "
            "length >= 0 per sequence, together the number of packed tokens"
        )
    if cu_seqlens.shape != (num_sequences + 1,):
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [{num_sequences + 1}]: one more than "
            f"the {num_sequences} lengths"
        )
    if initial_state is not None:
        expected = (num_sequences, *k.shape[1:], v.shape[-1])
        _check_state("initial_state", initial_state, shape=expected, like=v)
    if _fits_triton(r, v):
        from hrwkv.kernels.wkv7 import chunk_triton  # Triton is looked for only where a tensor is on a GPU

        return chunk_triton.wkv7(
            r, log_decay, k, v, a, b, cu_seqlens=cu_seqlens, lengths=lengths, initial_state=initial_state
        )
    v, a = (repeat_heads(x, r.shape[1]) for x in (v, a))
    return chunk_torch.wkv7(
        r, log_decay, k, v, a, b, cu_seqlens=cu_seqlens, lengths=lengths, initial_state=initial_state
    )


@torch.no_grad()
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
    """Advance N sequences by one token each and update their states in place; not differentiable.

    Args:
        r: ``[N, H, K]``; so are ``log_decay``, ``k``, ``a`` and ``b`` (as for ``wkv7``, one token per
            sequence).
        log_decay: logarithm of the decay.
        k: key.
        v: ``[N, H_v, V]`` value, shared by heads as in ``wkv7``.
        a: ``[N, H_a, K]`` minus the normalised key, alike.
        b: normalised key times the in-context learning rate.
        state: ``[slots, H, K, V]`` pool, read and written at ``state_slots``; fp32, or on a GPU bf16 too.
        state_slots: ``[N]`` int32 or int64, all different: with a slot named twice the result is undefined.
            For the Triton kernels a negative one names no state, and its output is zeros.

    Returns:
        ``o [N, H, V]`` in the dtype of ``v``.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another.
    """
    _check_tokens(r, log_decay, k=k, v=v, a=a, b=b)
    _check_pool(state, state_slots, r=r, v=v)
    if _fits_triton(r, v):
        from hrwkv.kernels.wkv7 import decode

        return decode.wkv7_decode(r, log_decay, k, v, a, b, state=state, state_slots=state_slots)
    v, a = (repeat_heads(x, r.shape[1]) for x in (v, a))
    return naive.wkv7_decode(r, log_decay, k, v, a, b, state=state, state_slots=state_slots.long())


@torch.no_grad()
def mixer_decode(
    rows: Rows,
    weights: Weights,
    *,
    form: Form,
    rope: Rope | None,
    first: FirstLayer | None,
    state: Tensor,
    state_slots: Tensor,
) -> tuple[Tensor, FirstLayer | None]:
    """``mix``, ``wkv7_decode`` and ``finish`` for one token a sequence, in one launch on a GPU.

    Args:
        rows: as for ``hrwkv.kernels.mix.mix``, and so are weights, form, rope and first; T is N.
        weights: the mixer's vectors, r_k included.
        form: the variant's choices.
        rope: cos and sin, or None.
        first: the first layer's value and key, or None in that layer.
        state: ``[slots, H, K, K]`` pool, as for ``wkv7_decode``.
        state_slots: ``[N]``, as for ``wkv7_decode``.

    Returns:
        y ``[N, H, K]``, the input of the output projection, and ``first`` as ``mix`` returns it.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another.
    """
    if not _fits_triton(rows.r, rows.v):
        mixed, bonus, first = mix(rows, weights, form=form, rope=rope, first=first)
        o = wkv7_decode(*mixed, state=state, state_slots=state_slots)
        return finish(o, mixed.v, rows.gate, bonus=bonus), first
    check(rows, weights, form=form, rope=rope, first=first)
    _check_pool(state, state_slots, r=rows.r, v=rows.v)
    from hrwkv.kernels.wkv7 import decode

    return decode.mixer_decode(
        rows, weights, form=form, rope=rope, first=first, state=state, state_slots=state_slots
    )


def _fits_triton(r: Tensor, v: Tensor) -> bool:
    """True where the Triton kernels serve: on a GPU, up to fp32, at their head sizes."""
    sizes = r.shape[-1] in TRITON_SIZES and v.shape[-1] in TRITON_SIZES
    return r.is_cuda and sizes and torch.float64 not in (r.dtype, v.dtype)


def _check_tokens(r: Tensor, log_decay: Tensor, *, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> None:
    """Refuse inputs whose shapes, dtypes or devices do not fit ``r``."""
    if r.dim() != 3:
        raise ValueError(
            f"r has shape {list(r.shape)}, expected [tokens, heads, key size]: pack the sequences"
        )
    for name, x in (("r", r), ("log_decay", log_decay), ("k", k), ("v", v), ("a", a), ("b", b)):
        shared = name in ("v", "a")  # their heads may be fewer, and v has a size of its own
        fits = x.shape == r.shape
        if shared and x.dim() == 3:
            fits = len(x) == len(r) and x.shape[1] > 0 and r.shape[1] % x.shape[1] == 0
            fits = fits and (name == "v" or x.shape[2] == r.shape[2])
        if not fits:
            expected = [len(r), f"a divisor of {r.shape[1]}", "V" if name == "v" else r.shape[2]]
            expected = expected if shared else list(r.shape)
            raise ValueError(f"{name} has shape {list(x.shape)}, expected {expected} to fit r")
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}, expected a floating dtype: convert it first")
        if x.device != r.device:
            raise ValueError(f"{name} lies on {x.device}, expected {r.device} where r lies: move it there")


def _check_pool(state: Tensor, state_slots: Tensor, *, r: Tensor, v: Tensor) -> None:
    """Refuse a pool or slots that do not fit one token r [N, H, K] and v [N, H_v, V] a sequence."""
    _check_state("state", state, shape=(len(state), *r.shape[1:], v.shape[-1]), like=v)
    if state_slots.shape != (len(r),):
        raise ValueError(
            f"state_slots has shape {list(state_slots.shape)}, expected [{len(r)}]: one slot per sequence"
        )


def _check_state(name: str, state: Tensor, *, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse a state of another shape, kind or device than ``[.., H, K, V]`` beside ``like``."""
    if state.shape != shape:
        raise ValueError(
            f"{name} has shape {list(state.shape)}, expected {list(shape)}: [N or slots, H, K, V]"
        )
    if not state.is_floating_point():
        raise ValueError(f"{name} has dtype {state.dtype}, expected a floating dtype such as float32")
    if state.device != like.device:
        raise ValueError(f"{name} lies on {state.device}, expected {like.device} where v lies: move it there")


def _shorten(lengths: Sequence[int]) -> str:
    """Name at most eight lengths, for a message of one line."""
    shown = ", ".join(map(str, lengths[:8]))
    return f"[{shown}, ...]" if len(lengths) > 8 else f"[{shown}]"
