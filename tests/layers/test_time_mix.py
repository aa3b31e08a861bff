"""The mixer against its equations, written down once more: token by token, head by head, in fp64."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hrwkv.layers.batch import TokenBatch
from hrwkv.layers.time_mix import VARIANTS, FirstLayer, LowRankSizes, TimeMix
from tests.builders import RANKS, randomise, ranks_of

WIDTH, HEADS, SIZE, EPS, THETA = 20, 6, 8, 1e-5, 100.0
LENGTHS = (7, 1, 19)
GPU_LENGTHS = (70, 1, 0, 19)  # several chunks of 32, less than one, none
# Relative to the largest output. The mixer computes in fp32: sums of up to a hundred products, each
# rounded by 6e-8, over 19 steps of the recurrence in two layers; measured 1.9e-6. Another variant's equations
# are off by 0.7 or more.
TOLERANCE = 5e-6
# On a GPU products of fp32 are three of tf32, and exp2 and rsqrt are a few last places off; sums as above.
GPU_TOLERANCE = 5e-5
# In bf16 a GPU rounds what the CPU rounds (rows, what ``mix`` gives, o, y) and the operands of the chunks'
# products besides. In parts of the CPU's own error, because that is 0.5 to 8 % from tensor to tensor.
BF16_RATIO = 3.0
CASES: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "one-kv-head": {"num_kv_heads": 1},
    "as-many-kv-heads": {"num_kv_heads": HEADS},
    "qk-norm": {"num_kv_heads": 2, "qk_norm_eps": EPS},
    "biases": {"num_kv_heads": 3, "bias": True, "output_bias": True},
    "qk-norm-biases": {"num_kv_heads": 3, "qk_norm_eps": EPS, "bias": True},
}
# What each variant has beside the parameters of all of them.
OWN_PARAMETERS = {
    "hxa079": {"v0": [16], "v1": [WIDTH, 3], "v2": [3, 16], "k0": [16], "k1": [WIDTH, 3], "k2": [3, 16]}
    | {"r_k": [HEADS, SIZE]},
    "hxa07a": {},
    "hxa07c": {"v1": [WIDTH, 3], "v2": [3, 48]},
    "radlads": {"v0": [48], "v1": [WIDTH, 3], "v2": [3, 48]},
}
# Whose weights are enough for whose equations, where every query head has a KV head.
PAIRS = [
    ("hxa079", "hxa07a"),
    ("hxa079", "hxa07c"),
    ("hxa079", "radlads"),
    ("hxa07c", "hxa07a"),
    ("radlads", "hxa07a"),
    ("radlads", "hxa07c"),
]
# Projections of layer 0 that later layers read, by variant.
READ_LATER = {"hxa079": {"key", "value"}, "hxa07a": set(), "hxa07c": set(), "radlads": {"value"}}

Weights = dict[str, Tensor]
Heads = list[Tensor]  # one [K] for each head


class Carried(NamedTuple):
    """What a token of layer 0 hands to the same token of later layers."""

    v: Heads
    k: Heads


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def low_rank(weights: Weights, name: str, x: Tensor) -> Tensor:
    return (x @ weights[f"{name}1"]) @ weights[f"{name}2"]


def gate(weights: Weights, name: str, x: Tensor) -> Tensor:
    return sigmoid(weights[f"{name}0"] + low_rank(weights, name, x))


def part(vector: Tensor, head: int) -> Tensor:
    """The head's own channels."""
    return vector[head * SIZE : (head + 1) * SIZE]


def rotated(u: Tensor, position: int) -> Tensor:
    """Equation 4."""
    result, half = u.clone(), SIZE // 2
    for i in range(half):
        angle = position * THETA ** (-2 * i / SIZE)
        result[i] = u[i] * math.cos(angle) - u[i + half] * math.sin(angle)
        result[i + half] = u[i + half] * math.cos(angle) + u[i] * math.sin(angle)
    return result


def projected(weights: Weights, name: str, norm: str, x: Tensor, *, position: int | None) -> Heads:
    """Equations 2 to 4 for each head that this projection has; ``norm`` is "" for the value."""
    flat = weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)
    heads = [part(flat, head) for head in range(len(flat) // SIZE)]
    if f"{norm}.weight" in weights:
        heads = [u / (u.square().mean() + EPS).sqrt() * weights[f"{norm}.weight"] for u in heads]
    return heads if position is None or not norm else [rotated(u, position) for u in heads]


def repeated(heads: Heads) -> Heads:
    """Query head h reads KV head h // (H / H_kv)."""
    return [heads[head // (HEADS // len(heads))] for head in range(HEADS)]


class Mixed(NamedTuple):
    """What a variant feeds the recurrence with: values and unscaled keys of the query heads."""

    v: Heads
    k: Heads
    carried: Carried | None = None


def hxa079(weights: Weights, x: Tensor, v: Heads, k: Heads, carried: Carried | None) -> Mixed:
    """Equations 5 and 6, then repetition."""
    if carried is None:
        return Mixed(repeated(v), repeated(k), Carried(v, k))
    to_v, to_k = gate(weights, "v", x), gate(weights, "k", x)
    v = [own + (first - own) * part(to_v, h) for h, (own, first) in enumerate(zip(v, carried.v, strict=True))]
    k = [own + (first - own) * part(to_k, h) for h, (own, first) in enumerate(zip(k, carried.k, strict=True))]
    return Mixed(repeated(v), repeated(k), carried)


def hxa07a(weights: Weights, x: Tensor, v: Heads, k: Heads, carried: Carried | None) -> Mixed:
    """No residual at all."""
    return Mixed(repeated(v), repeated(k))


def hxa07c(weights: Weights, x: Tensor, v: Heads, k: Heads, carried: Carried | None) -> Mixed:
    """Repetition, then equation 32."""
    more = low_rank(weights, "v", x)
    return Mixed([own + 0.2 * part(more, h) for h, own in enumerate(repeated(v))], repeated(k))


def radlads(weights: Weights, x: Tensor, v: Heads, k: Heads, carried: Carried | None) -> Mixed:
    """Repetition, then equation 31."""
    v = repeated(v)
    if carried is None:
        return Mixed(v, repeated(k), Carried(v, k))
    to_v = gate(weights, "v", x)
    v = [own + (first - own) * part(to_v, h) for h, (own, first) in enumerate(zip(v, carried.v, strict=True))]
    return Mixed(v, repeated(k), carried)


class Naive(NamedTuple):
    residuals: Callable[[Weights, Tensor, Heads, Heads, Carried | None], Mixed]
    key_scale: Callable[[Tensor, Tensor], Tensor]  # of decay and rate
    bonus: bool


def scale_by_w(decay: Tensor, rate: Tensor) -> Tensor:
    return 1 - (-decay.log()).log() + rate


def scale_by_decay(decay: Tensor, rate: Tensor) -> Tensor:
    return 1 - decay + rate


NAIVE = {
    "hxa079": Naive(hxa079, scale_by_w, bonus=True),
    "hxa07a": Naive(hxa07a, scale_by_w, bonus=False),
    "hxa07c": Naive(hxa07c, scale_by_decay, bonus=False),
    "radlads": Naive(radlads, scale_by_decay, bonus=False),
}


def naive_token(
    naive: Naive, weights: Weights, x: Tensor, states: Heads, *, position: int | None, carried: Carried | None
) -> tuple[Tensor, Carried | None]:
    """One token of one layer: y [D], and ``states`` [value, key] of each head moved on in place."""
    r = projected(weights, "receptance", "r_norm", x, position=position)
    own_k = projected(weights, "key", "k_norm", x, position=position)
    own_v = projected(weights, "value", "", x, position=position)
    v, k, carried = naive.residuals(weights, x, own_v, own_k, carried)
    rate = gate(weights, "a", x)
    decay_input = weights["w0"] + torch.tanh(x @ weights["w1"]) @ weights["w2"]
    decay = (-math.exp(-0.5) * sigmoid(decay_input)).exp()  # the other form of equation 8
    outputs = []
    for h in range(HEADS):
        kk = k[h] / k[h].norm()
        key = k[h] * naive.key_scale(part(decay, h), part(rate, h))
        transition = torch.diag(part(decay, h)) - torch.outer(kk, kk * part(rate, h))
        states[h] = states[h] @ transition + torch.outer(v[h], key)
        o = states[h] @ (r[h] * SIZE**-0.5)
        if naive.bonus:
            o = o + (r[h] * key * weights["r_k"][h]).sum() * v[h]
        outputs.append(o)
    gated = torch.cat(outputs) * (sigmoid(x @ weights["g1"]) @ weights["g2"])
    return weights["output.weight"] @ gated + weights.get("output.bias", 0.0), carried


def naive_stack(variant: str, mixers: list[TimeMix], x: Tensor, *, rotates: bool) -> list[Tensor]:
    """One sequence x [T, D] through two layers, the second on x + y: both y [T, D]."""
    layers = [{name: p.detach().double() for name, p in mixer.named_parameters()} for mixer in mixers]
    states = [[torch.zeros(SIZE, SIZE, dtype=torch.float64) for _ in range(HEADS)] for _ in layers]
    rows: list[list[Tensor]] = [[] for _ in layers]
    for step, hidden in enumerate(x.double()):
        carried = None
        for layer, weights in enumerate(layers):
            position = step if rotates else None
            y, carried = naive_token(
                NAIVE[variant], weights, hidden, states[layer], position=position, carried=carried
            )
            rows[layer].append(y)
            hidden = hidden + y
    return [torch.stack(row) for row in rows]


def build(variant: str, *, num_kv_heads: int = 2, head_dim: int = SIZE, **changes: Any) -> list[TimeMix]:
    """Two layers with every parameter random."""
    own = ranks_of(variant)
    ranks = LowRankSizes(**{name.removesuffix("_rank"): own.get(name) for name in RANKS})
    torch.manual_seed(0)
    mixers = [
        TimeMix(
            WIDTH,
            HEADS,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ranks=ranks,
            variant=VARIANTS[variant],
            **changes,
        )
        for _ in range(2)
    ]
    for seed, mixer in enumerate(mixers):
        randomise(mixer, seed)
    return mixers


def tables(batch: TokenBatch, size: int = SIZE) -> tuple[Tensor, Tensor]:
    steps = torch.arange(0, size, 2, dtype=torch.float64, device=batch.positions.device)
    angles = batch.positions.double().unsqueeze(-1) * THETA ** (-steps / size)
    return angles.cos().float(), angles.sin().float()


def stack(
    mixers: list[TimeMix],
    x: Tensor,
    batch: TokenBatch,
    *,
    rotates: bool = True,
    states: list[Tensor] | None = None,
) -> list[Tensor]:
    """As ``naive_stack``, for packed x."""
    rope = tables(batch, mixers[0].head_dim) if rotates else None
    first: FirstLayer | None = None
    outputs = []
    for mixer, state in zip(mixers, states or (None, None), strict=True):
        y, first = mixer(x, batch, rope=rope, first=first, state=state)
        outputs.append(y)
        x = x + y
    return outputs


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in parts of the largest output."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def inputs(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("rotates", [True, False], ids=["rope", "nope"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_its_equations(variant: str, case: str, rotates: bool) -> None:
    mixers, x = build(variant, **CASES[case]), inputs(sum(LENGTHS))
    with torch.no_grad():
        ours = stack(mixers, x, TokenBatch.from_lengths(LENGTHS), rotates=rotates)
    alone = [naive_stack(variant, mixers, own, rotates=rotates) for own in x.split(LENGTHS)]
    for layer, y in enumerate(ours):
        assert error(y, torch.cat([outputs[layer] for outputs in alone])) < TOLERANCE


@pytest.mark.parametrize(("variant", "other"), PAIRS)
def test_no_variant_passes_for_another(variant: str, other: str) -> None:
    mixers, x = build(variant, num_kv_heads=HEADS), inputs(19)
    with torch.no_grad():
        ours = stack(mixers, x, TokenBatch.from_lengths([19]))[1]
    assert error(ours, naive_stack(other, mixers, x, rotates=True)[1]) > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_parameters_of_its_equations_only(variant: str) -> None:
    common = {"w0": [48], "w1": [WIDTH, 5], "w2": [5, 48], "a0": [48], "a1": [WIDTH, 4], "a2": [4, 48]}
    shapes = {name: list(p.shape) for name, p in build(variant)[0].named_parameters(recurse=False)}
    assert shapes == common | {"g1": [WIDTH, 6], "g2": [6, 48]} | OWN_PARAMETERS[variant]


def outputs_and_grads(
    mixers: Sequence[TimeMix], x: Tensor, *, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Both y, and the gradients of a fixed sum of them in x and every parameter that is read, by name."""
    mixers = [deepcopy(mixer).to(device, dtype) for mixer in mixers]
    x = x.to(device, dtype, copy=True).requires_grad_()
    ys = stack(mixers, x, TokenBatch.from_lengths(GPU_LENGTHS, device=device))
    generator = torch.Generator().manual_seed(6)
    torch.autograd.backward(ys, [torch.randn(y.shape, generator=generator).to(y) for y in ys])
    found = {"y0": ys[0], "y1": ys[1], "dx": x.grad}
    for layer, mixer in enumerate(mixers):
        found |= {f"{layer}.{name}": p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    return {name: y.detach().cpu().double() for name, y in found.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("variant", "size", "eps"),
    [(variant, 32, EPS) for variant in VARIANTS] + [("hxa079", 96, EPS), ("hxa079", 32, None)],
)
def test_outputs_and_gradients_on_a_gpu_are_those_of_fp64(
    variant: str, size: int, eps: float | None, dtype: torch.dtype
) -> None:
    mixers = [mixer.to(dtype) for mixer in build(variant, head_dim=size, qk_norm_eps=eps)]
    x = inputs(sum(GPU_LENGTHS)).to(dtype)
    exact = outputs_and_grads(mixers, x, dtype=torch.float64, device="cpu")
    on_cpu = outputs_and_grads(mixers, x, dtype=dtype, device="cpu")
    on_gpu = outputs_and_grads(mixers, x, dtype=dtype, device="cuda")
    assert on_gpu.keys() == exact.keys()
    for name, y in exact.items():
        rounding = BF16_RATIO * ((on_cpu[name] - y).norm() / y.norm()).item()
        allowed = rounding if dtype == torch.bfloat16 else GPU_TOLERANCE
        assert (on_gpu[name] - y).norm() / y.norm() < allowed, name


@pytest.mark.parametrize(
    ("device", "size", "tolerance"),
    [("cpu", SIZE, TOLERANCE), pytest.param("cuda", 32, GPU_TOLERANCE, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_then_decode_are_one_forward(variant: str, device: str, size: int, tolerance: float) -> None:
    mixers = [mixer.to(device) for mixer in build(variant, qk_norm_eps=EPS, head_dim=size)]
    x = inputs(2 * 15).to(device)
    states = [torch.full((4, HEADS, size, size), 1e4, device=device) for _ in mixers]
    slots = torch.tensor([3, 1], device=device)
    for state in states:
        state[slots] = 0
    rows, pieces, start = x.view(2, 15, WIDTH), [[], []], 0
    with torch.no_grad():
        whole = stack(mixers, x, TokenBatch.from_lengths([15, 15], device=device))
        for count in (7, 4, 1, 1, 1, 1):  # the last ones are decode steps
            batch = replace(
                TokenBatch.from_lengths([count, count], device=device),
                positions=torch.arange(start, start + count, device=device).repeat(2),
                state_slots=slots,
            )
            packed = rows[:, start : start + count].flatten(0, 1)
            for parts, y in zip(pieces, stack(mixers, packed, batch, states=states), strict=True):
                parts.append(y.view(2, count, WIDTH))
            start += count
    for parts, expected in zip(pieces, whole, strict=True):
        assert error(torch.cat(parts, 1).flatten(0, 1), expected) < tolerance
    assert all((state[[0, 2]] == 1e4).all() for state in states), "a slot of nobody was written"


@pytest.mark.parametrize("length", [1, 3], ids=["decode", "piece"])
def test_a_step_from_memory_has_gradients_but_leaves_none_in_it(length: int) -> None:
    """A pool that took part in a graph would keep the graph of every step before it alive."""
    (mixer, _), x = build("hxa079"), inputs(2 * length)
    batch = replace(TokenBatch.from_lengths([length] * 2), state_slots=torch.tensor([1, 0]))
    pool = torch.randn(2, HEADS, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    state, same = pool.clone(), pool.clone()
    y, _ = mixer(x, batch, state=state)
    y.square().sum().backward()
    with torch.no_grad():
        expected, _ = mixer(x, batch, state=same)
    assert not state.requires_grad
    assert error(y.detach(), expected) < TOLERANCE
    assert error(state, same) < TOLERANCE
    unread = {"v0", "v1", "v2", "k0", "k1", "k2"}  # by a first layer
    assert {name for name, p in mixer.named_parameters() if p.grad is None} == unread
    assert all(p.grad.norm() > 1e-3 for p in mixer.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_layer_0_through_residuals_only(variant: str) -> None:
    """The second layer gets an input of its own, so that only ``first`` leads back."""
    mixers, x, batch = build(variant), inputs(27), TokenBatch.from_lengths(LENGTHS)
    _, first = mixers[0](x, batch, rope=tables(batch))
    y, again = mixers[1](x.flip(0), batch, rope=tables(batch), first=first)
    y.square().sum().backward()
    reached = {name.removesuffix(".weight") for name, p in mixers[0].named_parameters() if p.grad is not None}
    assert reached == READ_LATER[variant]
    assert all(mixers[0].get_parameter(f"{name}.weight").grad.norm() > 1e-3 for name in reached)
    assert again is first
    assert (first is None) == (not reached)
