"""Inputs of the recurrence and the comparison of two of its forms, for the tests beside this file."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

NAMES = ("r", "log_decay", "k", "v", "a", "b", "initial_state")
Form = Callable[..., tuple[Tensor, Tensor]]
LOWEST_LOG_DECAY = -math.exp(-0.5)


def make_inputs(
    lengths: Sequence[int], *, heads: int = 2, key_size: int = 32, value_size: int | None = None
) -> list[Tensor]:
    """Give r .. b and an initial state in fp64: decays over the whole range, keys of uneven norms."""
    shape = (sum(lengths), heads, key_size)
    double = torch.float64
    key = torch.randn(shape, dtype=double) * torch.rand(shape[0], 1, 1, dtype=double) * 4
    direction = normalize(key, dim=-1)
    rate = torch.rand(shape, dtype=double)
    log_decay = LOWEST_LOG_DECAY * torch.rand(shape, dtype=double)
    v = torch.randn(*shape[:2], value_size or key_size, dtype=double)
    state = torch.randn(len(lengths), heads, key_size, v.shape[-1], dtype=double)
    return [torch.randn(shape, dtype=double), log_decay, key, v, -direction, direction * rate, state]


def bounds(lengths: Sequence[int]) -> Tensor:
    """Give cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(
    form: Form, inputs: Sequence[Tensor], lengths: Sequence[int], **options: int
) -> tuple[Tensor, Tensor]:
    """Call a form of the recurrence with r .. b and the initial state."""
    *tokens, state = inputs
    return form(*tokens, cu_seqlens=bounds(lengths), lengths=lengths, initial_state=state, **options)


def run_with_grads(
    form: Form, inputs: Sequence[Tensor], lengths: Sequence[int], **options: int
) -> dict[str, Tensor]:
    """Give both outputs, and every gradient of a fixed random projection of both."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, final_state = run(form, leaves, lengths, **options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (o, final_state)]
    loss = sum((y * weight.to(y)).sum() for y, weight in zip((o, final_state), weights, strict=True))
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    found = {"o": o, "final_state": final_state}
    found.update({f"d{name}": grad for name, grad in zip(NAMES, grads, strict=True)})
    return {name: x.detach() for name, x in found.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Compare by the norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        assert found[name].isfinite().all(), f"{name} is not finite"
        error = (found[name].to(x) - x).norm() / x.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.1e}"
