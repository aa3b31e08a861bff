import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hrwkv.kernels.wkv7 import chunk_torch, naive
from tests.kernels.wkv7.cases import (
    LOWEST_LOG_DECAY,
    assert_near,
    make_inputs,
    run,
    run_with_grads,
)

# Both forms in fp64 differ by rounding alone; a wrong formula, even in one element, is far above this.
FP64 = 1e-12
# The worst fp32 error measured against fp64 is 2.5e-6 (da, repeated keys, chunk 64, K 128).
FP32 = 1e-5
# bf16 inputs are exact in fp32; what is left is the rounding of o and of the gradients to 8 bits.
BF16 = 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("key_size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("lengths", [(1,), (15,), (16,), (63,), (100,)], ids=lambda x: f"T{x[0]}")
def test_equals_naive(lengths, key_size, dtype):
    inputs = make_inputs(lengths, key_size=key_size)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    found = run_with_grads(chunk_torch.wkv7, [x.to(dtype) for x in inputs], lengths)
    assert_near(found, expected, tolerance=FP32 if dtype == torch.float32 else FP64)


@pytest.mark.parametrize("chunk", [16, 32, 64], ids="C{}".format)
@pytest.mark.parametrize(
    "lengths",
    [(64, 64, 64), (17, 0, 40, 64, 3), (0, 5), (5, 0), (0, 0), (1, 1, 1), (65, 66, 80)],
    ids=lambda x: "-".join(map(str, x)),
)
def test_equals_naive_for_packed_sequences(lengths, chunk):
    inputs = make_inputs(lengths)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    assert_near(run_with_grads(chunk_torch.wkv7, inputs, lengths, chunk=chunk), expected, tolerance=FP64)


@pytest.mark.gpu
@pytest.mark.parametrize("key_size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("lengths", [(64, 64, 64), (17, 0, 40, 64, 3)], ids=["equal", "ragged"])
def test_equals_naive_on_a_gpu(lengths, key_size):
    inputs = make_inputs(lengths, key_size=key_size)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    found = run_with_grads(chunk_torch.wkv7, [x.float().cuda() for x in inputs], lengths)
    assert_near(found, expected, tolerance=FP32)


@pytest.mark.parametrize("lengths", [(96, 96), (90, 31, 96)], ids=["equal", "ragged"])
def test_equals_naive_across_blocks(lengths, monkeypatch):
    """Small inputs fit one block: make blocks of one step so that states and gradients cross them."""
    monkeypatch.setattr(chunk_torch, "CPU_BLOCK_ELEMENTS", 1)
    inputs = make_inputs(lengths)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    assert_near(run_with_grads(chunk_torch.wkv7, inputs, lengths), expected, tolerance=FP64)


@pytest.mark.parametrize(("key_size", "value_size"), [(8, 24), (24, 8)], ids=["V-larger", "V-smaller"])
def test_key_and_value_size_may_differ(key_size, value_size):
    lengths = (20, 33)
    inputs = make_inputs(lengths, heads=3, key_size=key_size, value_size=value_size)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    assert_near(run_with_grads(chunk_torch.wkv7, inputs, lengths), expected, tolerance=FP64)


def test_no_initial_state_is_zeros():
    lengths = (20, 33)
    *tokens, state = make_inputs(lengths)
    expected = run(naive.wkv7, (*tokens, torch.zeros_like(state)), lengths)
    found = run(chunk_torch.wkv7, (*tokens, None), lengths)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("lengths", [(48, 48), (40, 7)], ids=["equal", "ragged"])
def test_bf16_inputs_are_computed_in_fp32(lengths):
    half = [x.bfloat16() for x in make_inputs(lengths)]
    half[-1] = half[-1].float()
    expected = run_with_grads(naive.wkv7, [x.double() for x in half], lengths)
    found = run_with_grads(chunk_torch.wkv7, half, lengths)
    assert found["o"].dtype == found["dlog_decay"].dtype == torch.bfloat16
    assert found["final_state"].dtype == found["dinitial_state"].dtype == torch.float32
    state = {name: found.pop(name) for name in ("final_state", "dinitial_state")}
    assert_near(found, {name: expected[name] for name in found}, tolerance=BF16)
    # The gradient that reaches the state has passed through bf16 dO only if something was rounded on the way.
    assert_near(state, {name: expected[name] for name in state}, tolerance=BF16)
    assert_near({"o": state["final_state"]}, {"o": expected["final_state"]}, tolerance=FP32)


@pytest.mark.parametrize("chunk", [16, 32, 64], ids="C{}".format)
@pytest.mark.parametrize("case", ["lowest-decay", "no-decay", "repeated-keys", "mixed-ends"])
def test_extreme_inputs_stay_exact(case, chunk):
    """The doubling inverse is off by 140 % at 32 near-identical keys: the reason for the triangular solve."""
    lengths = (100, 37)
    inputs = make_inputs(lengths)
    if case == "lowest-decay":
        inputs[1].fill_(LOWEST_LOG_DECAY)
    elif case == "no-decay":
        inputs[1].fill_(-1e-6)
    elif case == "mixed-ends":
        inputs[1].copy_(torch.where(torch.rand_like(inputs[1]) < 0.5, LOWEST_LOG_DECAY, -1e-6))
    else:
        inputs[1].fill_(-1e-6)
        key = torch.randn(1, 2, 32).double() + 1e-3 * torch.randn(137, 2, 32).double()
        inputs[2].copy_(key)
        inputs[4].copy_(-normalize(key, dim=-1))
        inputs[5].copy_(0.9 * normalize(key, dim=-1))
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    found = run_with_grads(chunk_torch.wkv7, [x.float() for x in inputs], lengths, chunk=chunk)
    assert_near(found, expected, tolerance=FP32)


@pytest.mark.parametrize("lengths", [(32, 32, 32), (50, 0, 21)], ids=["equal", "ragged"])
def test_packed_equals_one_sequence_at_a_time(lengths):
    inputs = make_inputs(lengths)
    packed = run_with_grads(chunk_torch.wkv7, inputs, lengths)
    o, final_state = packed["o"].split(list(lengths)), packed["final_state"]
    parts = zip(*(x.split(list(lengths)) for x in inputs[:-1]), strict=True)
    for n, part in enumerate(parts):
        o_n, final_n = run(chunk_torch.wkv7, (*part, inputs[-1][n : n + 1]), lengths[n : n + 1])
        torch.testing.assert_close(o[n], o_n, rtol=FP64, atol=FP64)
        torch.testing.assert_close(final_state[n], final_n[0], rtol=FP64, atol=FP64)


def test_second_half_from_the_first_halfs_state_equals_the_whole():
    """Gradients too: the state between the halves carries them."""
    whole = make_inputs((75,))

    def in_halves(*tokens, cu_seqlens, lengths, initial_state):
        first = [x[:41] for x in tokens]
        second = [x[41:] for x in tokens]
        o_1, middle = run(chunk_torch.wkv7, (*first, initial_state), (41,))
        o_2, final_state = run(chunk_torch.wkv7, (*second, middle), (34,))
        return torch.cat([o_1, o_2]), final_state

    expected = run_with_grads(naive.wkv7, whole, (75,))
    assert_near(run_with_grads(in_halves, whole, (75,)), expected, tolerance=FP64)


def test_inputs_may_have_any_strides():
    lengths = (32, 32)
    inputs = make_inputs(lengths)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:-1]]
    found = run(chunk_torch.wkv7, (*strided, inputs[-1]), lengths)
    expected = run(chunk_torch.wkv7, inputs, lengths)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_same_inputs_give_the_same_bits():
    lengths = (40, 7)
    inputs = [x.float() for x in make_inputs(lengths)]
    first, second = (run_with_grads(chunk_torch.wkv7, inputs, lengths) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_changes_nothing():
    lengths = (40, 7)
    inputs = [x.float() for x in make_inputs(lengths)]
    expected = run_with_grads(chunk_torch.wkv7, inputs, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_with_grads(chunk_torch.wkv7, inputs, lengths)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_keeps_one_state_per_chunk_and_nothing_without_gradients():
    lengths, kept = (256, 256), []
    inputs = [x.float().requires_grad_() for x in make_inputs(lengths)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run(chunk_torch.wkv7, inputs, lengths)
        states = [x for x in kept if not any(x is y or x.data_ptr() == y.data_ptr() for y in inputs)]
        # 2 sequences of 8 chunks and, per block, the states that it starts from.
        assert sum(x.numel() for x in states) <= (2 * 8 + 2 * 2) * inputs[-1][0].numel()
        kept.clear()
        with torch.no_grad():
            run(chunk_torch.wkv7, inputs, lengths)
        assert not kept


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 50), max_size=6), chunk=st.sampled_from([2, 5, 16]))
def test_any_lengths_equal_naive(lengths, chunk):
    torch.manual_seed(sum(lengths))
    inputs = make_inputs(lengths, key_size=4)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    assert_near(run_with_grads(chunk_torch.wkv7, inputs, lengths, chunk=chunk), expected, tolerance=FP64)
