"""Inputs of ``mix`` and ``finish``, and a form of them run with every gradient, for the tests beside this."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hrwkv.kernels.mix.naive import FirstLayer, Form, Mixed, Rope, Rows, Weights

DOUBLE = torch.float64


class Case(NamedTuple):
    """Everything that ``mix`` takes; ``gate`` and ``r_k`` are in rows and weights."""

    rows: Rows
    weights: Weights
    form: Form
    rope: Rope | None
    first: FirstLayer | None


VARIANTS = {  # value_residual, key residual, key_scale, bonus
    "hxa079": ("gated", True, "log_log", True),
    "hxa07a": ("none", False, "log_log", False),
    "hxa07c": ("low_rank", False, "decay", False),
    "radlads": ("gated_repeated", False, "decay", False),
}


def make_case(
    variant: str = "hxa079",
    *,
    num_tokens: int = 15,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 32,
    layer_0: bool = False,
    qk_norm: bool = False,
    rope: bool = True,
    flat: bool = True,
) -> Case:
    """Give random fp64 rows, as a layer of ``variant`` has them; logits reach both ends of the sigmoids."""
    value_residual, key_residual, key_scale, bonus = VARIANTS[variant]
    value_heads = kv_heads if value_residual == "gated" else heads
    gates_value = value_residual in ("gated", "gated_repeated")

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=DOUBLE) * scale

    def vector(heads: int, scale: float = 1.0) -> Tensor:
        return random(heads * size, scale=scale) if flat else random(heads, size, scale=scale)

    reads_value = value_residual == "low_rank" or (gates_value and not layer_0)
    rows = Rows(
        r=random(num_tokens, heads, size),
        k=random(num_tokens, kv_heads, size) * torch.rand(num_tokens, 1, 1, dtype=DOUBLE) * 4,
        v=random(num_tokens, kv_heads, size),
        decay=random(num_tokens, heads, size, scale=4.0),
        iclr=random(num_tokens, heads, size, scale=2.0),
        gate=random(num_tokens, heads, size),
        value=random(num_tokens, value_heads, size) if reads_value else None,
        key=random(num_tokens, kv_heads, size) if key_residual and not layer_0 else None,
    )
    weights = Weights(
        w0=vector(heads, 3.0),
        a0=vector(heads),
        v0=vector(value_heads) if gates_value else None,
        k0=vector(kv_heads) if key_residual else None,
        r_k=vector(heads) if bonus else None,
        r_norm=random(size) + 1 if qk_norm else None,
        k_norm=random(size) + 1 if qk_norm else None,
    )
    first = (random(num_tokens, value_heads, size), random(num_tokens, kv_heads, size))
    angle = torch.rand(num_tokens, size // 2, dtype=DOUBLE) * 6.3
    return Case(
        rows=rows,
        weights=weights,
        form=Form(value_residual=value_residual, key_scale=key_scale, norm_eps=1e-6),
        rope=(angle.cos(), angle.sin()) if rope else None,
        first=None if layer_0 or not (gates_value or key_residual) else first,
    )


def converted(case: Case, dtype: torch.dtype, *, device: str = "cpu") -> Case:
    """Give the rows in ``dtype``, vectors and angles in no less than fp32."""
    fine = torch.promote_types(dtype, torch.float32)

    def to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.to(device, dtype)

    return Case(
        rows=Rows(*(to(x, dtype) for x in case.rows)),
        weights=Weights(*(to(x, fine) for x in case.weights)),
        form=case.form,
        rope=case.rope and tuple(to(x, fine) for x in case.rope),
        first=case.first and tuple(to(x, dtype) for x in case.first),
    )


def run_mix(
    form: Callable[..., tuple[Mixed, Tensor | None, FirstLayer | None]], case: Case
) -> dict[str, Tensor]:
    """Every output, and every gradient of a fixed random projection of all outputs."""
    rows, weights, first = _leaves(case.rows), _leaves(case.weights), case.first and _leaves(case.first)
    mixed, bonus, first_out = form(rows, weights, form=case.form, rope=case.rope, first=first)
    outputs = {name: x for name, x in mixed._asdict().items() if x is not None}
    if bonus is not None:
        outputs["bonus"] = bonus
    if case.first is None and first_out is not None:
        outputs |= {"v_first": first_out[0], "k_first": first_out[1]}
    leaves = {f"drows.{name}": x for name, x in rows._asdict().items() if name != "gate"}
    leaves |= {f"dweights.{name}": x for name, x in weights._asdict().items()}
    if first is not None:
        leaves |= {"dv_first": first[0], "dk_first": first[1]}
    return _with_grads(outputs, leaves)


def make_finish(
    *, num_tokens: int = 15, heads: int = 4, value_heads: int = 2, size: int = 32
) -> dict[str, Tensor | None]:
    """Give random fp64 inputs of ``finish`` by name."""
    full, shared = (num_tokens, heads, size), (num_tokens, value_heads, size)
    shapes = {"o": full, "v": shared, "gate": full, "bonus": (num_tokens, heads)}
    return {name: torch.randn(shape, dtype=DOUBLE) for name, shape in shapes.items()}


def run_finish(form: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """y, and the gradient of a fixed random projection of it in everything that is read."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y = form(leaves["o"], leaves["v"], leaves["gate"], bonus=leaves["bonus"])
    return _with_grads({"y": y}, {f"d{name}": x for name, x in leaves.items()})


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Compare every element: the difference over the tensor's largest element."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        assert found[name].isfinite().all(), f"{name} is not finite"
        if x.numel():
            error = (found[name].to(x) - x).abs().max() / x.abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"{name}: {error:.1e}, allowed {tolerance:.1e}"


def _leaves(tensors):
    """Every tensor of a tuple as a leaf of a new graph, in a tuple of the same type."""
    fresh = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    return type(tensors)(*fresh) if hasattr(tensors, "_fields") else tuple(fresh)


def _with_grads(outputs: dict[str, Tensor], leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The outputs, and the gradients in those leaves that they depend on."""
    generator = torch.Generator().manual_seed(7)
    loss = 0.0
    for x in outputs.values():
        # The same numbers for every dtype: the gradients that arrive are no part of the comparison.
        weight = torch.randn(x.shape, generator=generator).bfloat16()
        loss = loss + (x * weight.to(x.device, x.dtype)).sum()
    leaves = {name: x for name, x in leaves.items() if x is not None}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = dict(outputs)
    found |= {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {name: x.detach() for name, x in found.items()}
