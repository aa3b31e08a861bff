"""``mixer``, fused where no gradient is asked for, against ``mix``, ``wkv7`` and ``finish`` in fp64."""

import pytest
import torch

from hrwkv.kernels.mix import naive as mix_naive
from hrwkv.kernels.wkv7 import mixer, naive
from tests.kernels.mix.cases import DOUBLE, VARIANTS, converted, make_case
from tests.kernels.wkv7.cases import assert_near, bounds

chunk_triton = pytest.importorskip("hrwkv.kernels.wkv7.chunk_triton", reason="Triton is not installed")

# fp32 in the interpreter: sums over chunks and heads, exp2 of sums of up to 32 decays.
FP32 = 5e-6
# Products of bf16; what mix gives is rounded once, where the separate launches round it twice.
BF16 = 1.2e-2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


def run(case, lengths, state, *, form):
    places = {
        "cu_seqlens": bounds(lengths).to(case.rows.r.device),
        "lengths": lengths,
        "initial_state": state,
    }
    y, final_state, first = form(
        case.rows, case.weights, form=case.form, rope=case.rope, first=case.first, **places
    )
    found = {"y": y, "final_state": final_state}
    if case.first is None and first is not None:
        found |= {"v_first": first[0], "k_first": first[1]}
    elif first is not None:
        assert first is case.first
    return found


def definition(rows, weights, *, form, rope, first, **places):
    """Token by token, in the dtype of the rows."""
    mixed, bonus, first = mix_naive.mix(rows, weights, form=form, rope=rope, first=first)
    o, final_state = naive.wkv7(*(mix_naive.repeat_heads(x, rows.r.shape[1]) for x in mixed), **places)
    return mix_naive.finish(o, mixed.v, rows.gate, bonus=bonus), final_state, first


def check(case, lengths, *, dtype=torch.float32, tolerance=FP32, form=chunk_triton.mixer):
    heads, size = case.rows.r.shape[1:]
    state = torch.randn(len(lengths), heads, size, size, dtype=DOUBLE)
    case = converted(case, dtype, device=DEVICE)
    exact = converted(case, DOUBLE, device="cpu")
    expected = run(exact, lengths, state, form=definition)
    with torch.no_grad():
        found = run(case, lengths, state.to(DEVICE, torch.float32), form=form)
    assert found["y"].dtype == dtype
    assert_near({name: x.cpu() for name, x in found.items()}, expected, tolerance=tolerance)


@pytest.mark.parametrize("size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("lengths", [(33, 0, 5), (1,), (32, 32)], ids=str)
def test_equals_the_definition(lengths, size):
    check(make_case(num_tokens=sum(lengths), heads=2, kv_heads=1, size=size), lengths)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["no-norm", "norm"])
@pytest.mark.parametrize("rope", [False, True], ids=["no-rope", "rope"])
@pytest.mark.parametrize("layer_0", [False, True], ids=["later", "layer-0"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_the_definition(variant, layer_0, rope, qk_norm):
    check(make_case(variant, layer_0=layer_0, rope=rope, qk_norm=qk_norm, num_tokens=5), (3, 2))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (3, 1), (6, 2), (1, 1)])
def test_any_group_of_heads_equals_the_definition(heads, kv_heads):
    check(make_case(heads=heads, kv_heads=kv_heads, qk_norm=True, num_tokens=5), (5,))


@pytest.mark.parametrize("logit", [-1000.0, 0.0, 1000.0])
def test_both_ends_of_the_decay_equal_the_definition(logit):
    case = make_case(num_tokens=40)
    case.rows.decay[1:].fill_(logit)
    check(case, (40,))


def test_fp16_rows_are_computed_in_fp32():
    """What is left is the rounding of v and y to 11 bits."""
    check(make_case(num_tokens=40), (40,), dtype=torch.float16, tolerance=6e-4)


def test_rows_may_have_any_strides():
    case = make_case(num_tokens=5)
    rows = case.rows._replace(
        r=case.rows.r.transpose(0, 1).contiguous().transpose(0, 1), k=case.rows.k.repeat(1, 2, 1)[:, ::2]
    )
    check(case._replace(rows=rows), (5,))


def test_no_tokens_return_the_initial_state():
    check(make_case(num_tokens=0), (0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_entry_in_bf16_equals_the_definition(variant, size):
    lengths = (100, 0, 1, 33)
    case = make_case(variant, num_tokens=sum(lengths), heads=4, kv_heads=2, size=size, qk_norm=True)
    check(case, lengths, dtype=torch.bfloat16, tolerance=BF16, form=mixer)


@pytest.mark.gpu
def test_same_bits_twenty_times_on_a_gpu():
    lengths = (300, 1, 500)
    case = converted(make_case(num_tokens=801, heads=8, kv_heads=2, size=96), torch.bfloat16, device="cuda")
    with torch.no_grad():
        first = run(case, lengths, None, form=mixer)
        for _ in range(19):
            again = run(case, lengths, None, form=mixer)
            assert all(torch.equal(first[name], again[name]) for name in first)
