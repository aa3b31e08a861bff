"""The public ``mix`` and ``finish``: the definition's own properties, and what is refused."""

import math
import re

import pytest
import torch

from hrwkv.kernels import mix as kernels
from hrwkv.kernels.mix import naive
from tests.kernels.mix.cases import (
    VARIANTS,
    assert_near,
    converted,
    make_case,
    make_finish,
    run_finish,
    run_mix,
)

# One rounding to 8 bits.
BF16 = 4e-3


def call(case, **changes):
    case = case._replace(**changes)
    return kernels.mix(case.rows, case.weights, form=case.form, rope=case.rope, first=case.first)


@pytest.mark.parametrize("layer_0", [False, True], ids=["later", "layer-0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equations_element_by_element(variant, layer_0):
    """hxa079.md (4) to (10), (31) to (33), written out for every query head by itself."""
    case = make_case(variant, num_tokens=3, heads=4, kv_heads=2, size=6, layer_0=layer_0)
    mixed, bonus, _ = call(case)
    assert (bonus is None) == (not VARIANTS[variant][3])
    rows, weights, (cos, sin) = case.rows, case.weights, case.rope

    def rope(x):
        low, high = x[:, :3], x[:, 3:]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], 1)

    def of(vector, head):
        return vector.view(-1, 6)[head]

    for head in range(4):
        kv = head // 2
        k, v = rope(rows.k[:, kv]), rows.v[:, kv]
        if variant == "hxa079" and not layer_0:
            v = v + (case.first[0][:, kv] - v) * (of(weights.v0, kv) + rows.value[:, kv]).sigmoid()
            k = k + (case.first[1][:, kv] - k) * (of(weights.k0, kv) + rows.key[:, kv]).sigmoid()
        elif variant == "radlads" and not layer_0:
            v = v + (case.first[0][:, head] - v) * (of(weights.v0, head) + rows.value[:, head]).sigmoid()
        elif variant == "hxa07c":
            v = v + 0.2 * rows.value[:, head]
        iclr = (of(weights.a0, head) + rows.iclr[:, head]).sigmoid()
        log_decay = -math.exp(-0.5) * (of(weights.w0, head) + rows.decay[:, head]).sigmoid()
        scale = (-log_decay).log() if VARIANTS[variant][2] == "log_log" else log_decay.exp()
        kk = k / k.square().sum(1, keepdim=True).sqrt()
        expected = {
            "r": rope(rows.r[:, head]),
            "log_decay": log_decay,
            "k": k * (1 - scale + iclr),
            "v": v,
            "a": -kk,
            "b": kk * iclr,
        }
        found = {name: naive.repeat_heads(x, 4)[:, head] for name, x in mixed._asdict().items()}
        if VARIANTS[variant][3]:
            expected["bonus"] = (expected["r"] * expected["k"] * of(weights.r_k, head)).sum(1)  # (13)
            found["bonus"] = bonus[:, head]
        assert_near(found, expected, tolerance=1e-12)


def test_finish_element_by_element():
    inputs = make_finish(num_tokens=3, heads=4, value_heads=2, size=6)
    y = run_finish(kernels.finish, inputs)["y"]
    for head in range(4):
        o, gate, v = inputs["o"][:, head], inputs["gate"][:, head], inputs["v"][:, head // 2]
        expected = (o / 6**0.5 + inputs["bonus"][:, head : head + 1] * v) * gate
        assert_near({"y": y[:, head]}, {"y": expected}, tolerance=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_q_and_k_norms_come_before_rope(variant):
    case = make_case(variant, qk_norm=True, num_tokens=3)
    normed = {
        name: torch.nn.functional.rms_norm(x, (32,), weight, 1e-6)
        for name, x, weight in (
            ("r", case.rows.r, case.weights.r_norm),
            ("k", case.rows.k, case.weights.k_norm),
        )
    }
    expected, *_ = call(
        case, rows=case.rows._replace(**normed), weights=case.weights._replace(r_norm=None, k_norm=None)
    )
    found, *_ = call(case)
    assert_near(found._asdict(), expected._asdict(), tolerance=1e-12)


def test_the_first_layer_gives_its_value_and_key_to_the_others():
    case = make_case(layer_0=True, num_tokens=3)
    mixed, _, (v_first, k_first) = call(case)
    assert torch.equal(v_first, mixed.v)
    # The key as it is before (10): its direction is kk's.
    assert_near({"a": -torch.nn.functional.normalize(k_first, dim=-1)}, {"a": mixed.a}, tolerance=1e-12)
    later = make_case(num_tokens=3)
    assert call(later)[2] is later.first


@pytest.mark.parametrize("variant", ["hxa07a", "hxa07c"])
def test_a_variant_without_residuals_to_layer_0_gives_none(variant):
    assert call(make_case(variant, num_tokens=3))[2] is None


def test_vectors_may_be_flat_or_by_head():
    case = make_case(num_tokens=3)
    heads = {name: getattr(case.weights, name).view(-1, 32) for name in ("w0", "a0", "v0", "k0", "r_k")}
    by_head, *_ = call(case, weights=case.weights._replace(**heads))
    for x, y in zip(by_head, call(case)[0], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_rows_are_computed_in_fp32_and_rounded_once(variant):
    case = converted(make_case(variant, qk_norm=True), torch.bfloat16)
    found = run_mix(kernels.mix, case)
    assert found["log_decay"].dtype == torch.float32
    assert all(found[name].dtype == torch.bfloat16 for name in ("r", "k", "v", "a", "b"))
    exact = run_mix(naive.mix, converted(case, torch.float64))
    forward = ("r", "log_decay", "k", "v", "a", "b")
    assert_near({x: found[x] for x in forward}, {x: exact[x] for x in forward}, tolerance=BF16)


ROWS = {
    "rows.r has shape [3, 128], expected [tokens, heads, head size]": {"r": torch.randn(3, 128)},
    "rows.r has the head size 3, expected an even one": {"r": torch.randn(3, 4, 3)},
    "rows.k has shape [3, 3, 32], expected [3, 4, 32]": {"k": torch.randn(3, 3, 32).double()},
    "rows.v has shape [3, 4, 32], expected [3, 2, 32]": {"v": torch.randn(3, 4, 32).double()},
    "rows.decay has shape [2, 4, 32], expected [3, 4, 32]": {"decay": torch.randn(2, 4, 32).double()},
    "rows.iclr has dtype torch.float32, expected torch.float64": {"iclr": torch.randn(3, 4, 32)},
    "rows.iclr has dtype torch.int64, expected a floating dtype": {"iclr": torch.ones(3, 4, 32).long()},
    "rows.iclr lies on meta, expected cpu": {"iclr": torch.randn(3, 4, 32, device="meta")},
    "rows.value is None, but a residual of this layer reads it": {"value": None},
    "rows.key has shape [3, 4, 32], expected [3, 2, 32]": {"key": torch.randn(3, 4, 32).double()},
}


@pytest.mark.parametrize("message", ROWS)
def test_rows_that_do_not_fit_are_refused(message):
    case = make_case(num_tokens=3)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(case, rows=case.rows._replace(**ROWS[message]))


WEIGHTS = {
    "weights.w0 has shape [64], expected [128]": {"w0": torch.randn(64)},
    "weights.k0 has shape [128], expected [64]": {"k0": torch.randn(128)},
    "weights.v0 is None, but the value residual is 'gated'": {"v0": None},
    "one of weights.r_norm and weights.k_norm is None": {"r_norm": torch.ones(32)},
}


@pytest.mark.parametrize("message", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(message):
    case = make_case(num_tokens=3)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(case, weights=case.weights._replace(**WEIGHTS[message]))


def test_a_first_layer_or_rope_that_does_not_fit_is_refused():
    case = make_case(num_tokens=3)
    with pytest.raises(ValueError, match=r"first\[1\], the key, has shape \[2, 2, 32\]"):
        call(case, first=(case.first[0], case.first[1][:2]))
    with pytest.raises(ValueError, match=r"cos has shape \[3, 32\], expected \[3, 16\]"):
        call(case, rope=(torch.ones(3, 32), torch.ones(3, 32)))


@pytest.mark.parametrize("name", ["v", "gate", "bonus"])
def test_inputs_of_finish_that_do_not_fit_are_refused(name):
    inputs = make_finish(num_tokens=3)
    inputs[name] = inputs[name][..., :-1]
    with pytest.raises(ValueError, match=rf"{name} has shape .*, expected"):
        run_finish(kernels.finish, inputs)
