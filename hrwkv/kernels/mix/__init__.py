"""The mixer's work by elements around the recurrence: arguments are checked here, then a form is chosen.

``mix`` makes what the recurrence takes from the rows that the matrix products give, ``finish`` makes the
input of the output projection from what it returns. ``naive`` is the definition; on a GPU ``fused_mix`` and
``fused_finish`` do the same in one Triton launch each. fp64 is computed by ``naive`` everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hrwkv.kernels.mix import naive
from hrwkv.kernels.mix.naive import FirstLayer, Form, Mixed, Rope, Rows, Weights

__all__ = ["FirstLayer", "Form", "Mixed", "Rope", "Rows", "Weights", "check", "finish", "mix"]


def mix(
    rows: Rows, weights: Weights, *, form: Form, rope: Rope | None, first: FirstLayer | None
) -> tuple[Mixed, Tensor | None, FirstLayer | None]:
    """Norms, RoPE, residuals to the first layer, rates, decay, kk and the key's scale: hxa079.md (3) to (10).

    And the bonus's factor of v (13), which needs r and k once more but no state.

    Computed in fp32 (fp64 for fp64 rows) and rounded once, where a result is stored. Differentiable in every
    row, every weight and ``first``.

    Args:
        rows: what the matrix products give; ``rows.gate`` is not read here.
        weights: the mixer's vectors.
        form: the variant's choices, hxa079.md, section 7.
        rope: cos and sin, each ``[T, K / 2]`` fp32, or None for no position encoding.
        first: the first layer's value ``[T, H_v, K]`` and key ``[T, H_kv, K]``, or None in that layer.

    Returns:
        ``Mixed``; the bonus ``sum_n r[n] k[n] r_k[n]``, ``[T, H]`` fp32 (fp64 for fp64 rows), or None without
        ``weights.r_k``; and ``first``: in the first layer this layer's value and key, if a residual will
        read them.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another, or a tensor that the form reads is
            missing.
    """
    check(rows, weights, form=form, rope=rope, first=first)
    if _runs_fused(rows.r):
        from hrwkv.kernels.mix import fused_mix

        return fused_mix.mix(rows, weights, form=form, rope=rope, first=first)
    return naive.mix(rows, weights, form=form, rope=rope, first=first)


def finish(o: Tensor, v: Tensor, gate: Tensor, *, bonus: Tensor | None) -> Tensor:
    """``(o K^-0.5 + bonus v) * gate``, hxa079.md (12) to (14) up to W_o.

    Computed in fp32 (fp64 for fp64 o) and rounded once. Differentiable in everything that it reads.

    Args:
        o: ``[T, H, K]``, what the recurrence returns.
        v: ``[T, H_v, K]``, the value that the recurrence took; read only with a bonus.
        gate: ``[T, H, K]``.
        bonus: ``[T, H]`` as ``mix`` returns it, or None for no bonus.

    Returns:
        y ``[T, H, K]`` in the dtype of o.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another.
    """
    _check_heads("o", o)
    _check("gate", gate, shape=o.shape, like=o)
    if bonus is not None:
        _check("v", v, shape=_shared(v, like=o), like=o)
        _check("bonus", bonus, shape=o.shape[:2], like=o)
    if _runs_fused(o):
        from hrwkv.kernels.mix import fused_finish

        return fused_finish.finish(o, v, gate, bonus=bonus)
    return naive.finish(o, v, gate, bonus=bonus)


def check(rows: Rows, weights: Weights, *, form: Form, rope: Rope | None, first: FirstLayer | None) -> None:
    """Raise ValueError where arguments of ``mix``, or of a kernel that contains it, do not fit together."""
    _check_rows(rows)
    _check_weights(rows, weights, form)
    _check_residuals(rows, weights, form, first)
    if rope is not None:
        for name, table in zip(("cos", "sin"), rope, strict=True):
            _check(name, table, shape=(len(rows.r), rows.r.shape[2] // 2), like=rows.r)


def _runs_fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _check_rows(rows: Rows) -> None:
    """Refuse rows that do not fit ``rows.r`` and ``rows.k``."""
    _check_heads("rows.r", rows.r)
    if rows.r.shape[2] % 2:
        raise ValueError(
            f"rows.r has the head size {rows.r.shape[2]}, expected an even one: RoPE pairs its halves"
        )
    _check_row("rows.k", rows.k, shape=_shared(rows.k, like=rows.r), like=rows.r)
    _check_row("rows.v", rows.v, shape=rows.k.shape, like=rows.r)
    _check_row("rows.decay", rows.decay, shape=rows.r.shape, like=rows.r)
    _check_row("rows.iclr", rows.iclr, shape=rows.r.shape, like=rows.r)
    _check_row("rows.gate", rows.gate, shape=rows.r.shape, like=rows.r)


def _check_weights(rows: Rows, weights: Weights, form: Form) -> None:
    """Refuse vectors of another size than the heads that they belong to, and half a q/k norm."""
    heads, kv_heads = rows.r.shape[1], rows.k.shape[1]
    _check_vector("weights.w0", weights.w0, heads=heads, like=rows.r)
    _check_vector("weights.a0", weights.a0, heads=heads, like=rows.r)
    if weights.v0 is not None:
        value_heads = kv_heads if form.value_residual == "gated" else heads
        _check_vector("weights.v0", weights.v0, heads=value_heads, like=rows.r)
    if weights.k0 is not None:
        _check_vector("weights.k0", weights.k0, heads=kv_heads, like=rows.r)
    if weights.r_k is not None:
        _check_vector("weights.r_k", weights.r_k, heads=heads, like=rows.r)
    if (weights.r_norm is None) != (weights.k_norm is None):
        raise ValueError("one of weights.r_norm and weights.k_norm is None: give both or none of them")
    for name, x in (("weights.r_norm", weights.r_norm), ("weights.k_norm", weights.k_norm)):
        if x is not None:
            _check_vector(name, x, heads=1, like=rows.r)


def _check_residuals(rows: Rows, weights: Weights, form: Form, first: FirstLayer | None) -> None:
    """Refuse a residual whose product, vector or first layer is missing or of another shape."""
    on_query_heads = form.value_residual in ("gated_repeated", "low_rank")
    value_shape = rows.r.shape if on_query_heads else rows.k.shape
    gates_value = form.value_residual in ("gated", "gated_repeated")
    if form.value_residual == "low_rank" or (gates_value and first is not None):
        _check_row("rows.value", rows.value, shape=value_shape, like=rows.r)
    if first is None:
        return
    if gates_value:
        if weights.v0 is None:
            raise ValueError(
                f"weights.v0 is None, but the value residual is {form.value_residual!r}: give it"
            )
        _check("first[0], the value,", first[0], shape=value_shape, like=rows.r)
    if weights.k0 is not None:
        _check_row("rows.key", rows.key, shape=rows.k.shape, like=rows.r)
        _check("first[1], the key,", first[1], shape=rows.k.shape, like=rows.r)


def _check_row(name: str, x: Tensor | None, *, shape: Sequence[int], like: Tensor) -> None:
    """Refuse a row that is missing, of another shape or of another dtype than ``like``."""
    if x is None:
        raise ValueError(
            f"{name} is None, but a residual of this layer reads it: give a tensor {list(shape)}"
        )
    _check(name, x, shape=shape, like=like)
    if x.dtype != like.dtype:
        raise ValueError(f"{name} has dtype {x.dtype}, expected {like.dtype} as rows.r: convert one of them")


def _check_heads(name: str, x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [tokens, heads, head size]: pack it")
    _check(name, x, shape=x.shape, like=x)


def _shared(x: Tensor, *, like: Tensor) -> tuple[int, ...]:
    """The shape that x has to have as a tensor on KV heads, each shared by some of ``like``'s heads."""
    num_tokens, heads, size = like.shape
    if x.dim() == 3 and x.shape[1] > 0 and heads % x.shape[1] == 0:
        return num_tokens, x.shape[1], size
    return num_tokens, heads, size


def _check_vector(name: str, x: Tensor, *, heads: int, like: Tensor) -> None:
    """Refuse a vector that is neither flat nor [heads, K]."""
    flat = (heads * like.shape[2],)
    _check(name, x, shape=x.shape if tuple(x.shape) == (heads, like.shape[2]) else flat, like=like)


def _check(name: str, x: Tensor, *, shape: Sequence[int], like: Tensor) -> None:
    """Refuse another shape, a dtype that is not floating, or another device than ``like``'s."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)} to fit the other tensors")
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}, expected a floating dtype: convert it first")
    if x.device != like.device:
        raise ValueError(f"{name} lies on {x.device}, expected {like.device} as the others: move it there")
