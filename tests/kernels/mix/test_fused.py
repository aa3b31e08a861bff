"""The Triton forms of ``mix`` and ``finish`` against ``naive`` in fp64: in the interpreter, and on a GPU."""

import pytest
import torch

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

fused_mix = pytest.importorskip("hrwkv.kernels.mix.fused_mix", reason="needs Triton")
fused_finish = pytest.importorskip("hrwkv.kernels.mix.fused_finish", reason="needs Triton")

# fp32, with exp2 and rsqrt as the hardware approximates them, in sums over a head and over the tokens.
FP32 = 3e-6
# Rows in bf16 are exact in fp32; what is left is one rounding to 8 bits.
BF16 = 4e-3
PLACES = [
    pytest.param(
        ("cpu", torch.float32, FP32),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
        id="interpreter",
    ),
    pytest.param(("cuda", torch.float32, FP32), marks=pytest.mark.gpu, id="gpu-fp32"),
    pytest.param(("cuda", torch.bfloat16, BF16), marks=pytest.mark.gpu, id="gpu-bf16"),
]
everywhere = pytest.mark.parametrize("place", PLACES)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


def check_mix(case, place):
    device, dtype, tolerance = place
    case = converted(case, dtype, device=device)
    expected = run_mix(naive.mix, converted(case, torch.float64, device=device))
    found = run_mix(fused_mix.mix, case)
    assert found["log_decay"].dtype == torch.float32
    assert found["k"].dtype == found["drows.decay"].dtype == dtype
    assert_near(found, expected, tolerance=tolerance)


def check_finish(inputs, place):
    device, dtype, tolerance = place
    inputs = {name: None if x is None else x.to(device, dtype) for name, x in inputs.items()}
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    found = run_finish(fused_finish.finish, inputs)
    assert found["y"].dtype == dtype
    assert_near(found, run_finish(naive.finish, exact), tolerance=tolerance)


@everywhere
@pytest.mark.parametrize("size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 33], ids="T{}".format)  # blocks have 4 to 16 tokens
def test_mix_equals_naive(num_tokens, size, place):
    check_mix(make_case(num_tokens=num_tokens, size=size), place)


@everywhere
@pytest.mark.parametrize("size", [160, 256], ids="K{}".format)
def test_heads_of_more_than_two_tiles_equal_naive(size, place):
    check_mix(make_case(num_tokens=3, size=size, qk_norm=True), place)


@everywhere
@pytest.mark.parametrize("qk_norm", [False, True], ids=["no-norm", "norm"])
@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("layer_0", [False, True], ids=["later", "layer-0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_naive(variant, layer_0, rope, qk_norm, place):
    check_mix(make_case(variant, layer_0=layer_0, rope=rope, qk_norm=qk_norm, num_tokens=5, size=24), place)


@everywhere
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (3, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize("variant", ["hxa079", "radlads"])
def test_any_group_of_heads_equals_naive(variant, heads, kv_heads, place):
    check_mix(make_case(variant, heads=heads, kv_heads=kv_heads, qk_norm=True, num_tokens=5, size=24), place)


@everywhere
@pytest.mark.parametrize("variant", ["hxa079", "hxa07c"])
@pytest.mark.parametrize("logit", [-1000.0, -90.0, 0.0, 90.0, 1000.0])
def test_both_ends_of_the_decay_equal_naive(logit, variant, place):
    case = make_case(variant, num_tokens=5)
    case.rows.decay[1:].fill_(logit)
    case.rows.iclr[2:].fill_(-logit)
    check_mix(case, place)


@everywhere
def test_a_key_of_zeros_equals_naive(place):
    case = make_case(num_tokens=5, layer_0=True)
    case.rows.k[2].zero_()
    check_mix(case, place)


@everywhere
def test_rows_may_have_any_strides(place):
    case = make_case(num_tokens=5)
    rows = case.rows._replace(
        r=case.rows.r.transpose(0, 1).contiguous().transpose(0, 1), k=case.rows.k.repeat(1, 2, 1)[:, ::2]
    )
    check_mix(case._replace(rows=rows), place)


@everywhere
def test_same_inputs_give_the_same_bits(place):
    device, dtype, _ = place
    case = converted(make_case(num_tokens=63, qk_norm=True), dtype, device=device)
    first, second = (run_mix(fused_mix.mix, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    inputs = {name: x.to(device, dtype) for name, x in make_finish(num_tokens=63).items()}
    first, second = (run_finish(fused_finish.finish, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@everywhere
def test_a_first_layer_without_gradients_gets_none(place):
    device, dtype, _ = place
    case = converted(make_case(num_tokens=5), dtype, device=device)
    rows = case.rows._replace(r=case.rows.r.requires_grad_(), k=case.rows.k.requires_grad_())
    mixed, _, first = fused_mix.mix(rows, case.weights, form=case.form, rope=case.rope, first=case.first)
    assert first is case.first
    mixed.k.float().sum().backward()
    assert rows.k.grad.isfinite().all()
    assert all(x.grad is None for x in first)


@everywhere
def test_nothing_but_the_inputs_is_kept(place):
    device, dtype, _ = place
    case = converted(make_case(num_tokens=5), dtype, device=device)
    rows = case.rows._replace(r=case.rows.r.requires_grad_())
    given, kept = {x.data_ptr() for x in (*rows, *case.weights, *case.first) if x is not None}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mixed, bonus, _ = fused_mix.mix(rows, case.weights, form=case.form, rope=case.rope, first=case.first)
        assert {x.data_ptr() for x in kept} <= given
        given |= {x.data_ptr() for x in mixed}
        fused_finish.finish(mixed.b, mixed.v, rows.gate, bonus=bonus)
    assert {x.data_ptr() for x in kept} <= given | {bonus.data_ptr()}


@everywhere
@pytest.mark.parametrize("size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 63, 100], ids="T{}".format)
def test_finish_equals_naive(num_tokens, size, place):
    check_finish(make_finish(num_tokens=num_tokens, size=size), place)


@everywhere
@pytest.mark.parametrize("bonus", [False, True], ids=["no-bonus", "bonus"])
@pytest.mark.parametrize(("heads", "value_heads"), [(3, 3), (3, 1), (6, 2), (1, 1)])
def test_finish_of_any_group_of_heads_equals_naive(heads, value_heads, bonus, place):
    inputs = make_finish(num_tokens=5, heads=heads, value_heads=value_heads, size=24)
    check_finish(inputs if bonus else inputs | {"bonus": None}, place)


@everywhere
def test_no_tokens_give_nothing_and_no_gradient(place):
    check_mix(make_case(num_tokens=0), place)
    check_finish(make_finish(num_tokens=0), place)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a case of every test on a GPU")
def test_bf16_rows_are_computed_in_fp32():
    """The interpreter cuts fp32 to bf16 where hardware rounds: one unit in the last place, not a half."""
    check_mix(make_case(num_tokens=5, qk_norm=True), ("cpu", torch.bfloat16, 2 * BF16))
    check_finish(make_finish(num_tokens=5), ("cpu", torch.bfloat16, 2 * BF16))
