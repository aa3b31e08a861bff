import pytest
import torch

from hrwkv.kernels.wkv7 import naive, wkv7, wkv7_decode
from tests.kernels.wkv7.cases import assert_near, bounds, make_inputs, run, run_with_grads


@pytest.mark.parametrize("lengths", [(7,), (5, 0, 20), ()], ids=["one", "ragged", "none"])
def test_equals_naive(lengths):
    inputs = make_inputs(lengths)
    expected = run_with_grads(naive.wkv7, inputs, lengths)
    assert_near(run_with_grads(wkv7, inputs, lengths), expected, tolerance=1e-12)


def test_empty_sequence_returns_its_initial_state():
    inputs = make_inputs((3, 0))
    _, final_state = run(wkv7, inputs, (3, 0))
    assert torch.equal(final_state[1], inputs[-1][1])


def test_final_state_is_a_copy():
    """A caller that goes on from the initial state in place must not change the result."""
    inputs = make_inputs((0, 0))
    _, final_state = run(wkv7, inputs, (0, 0))
    expected = final_state.clone()
    inputs[-1].zero_()
    assert torch.equal(final_state, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decode_token_by_token_equals_the_whole(dtype):
    num_steps, num = 9, 3
    *tokens, state = make_inputs((num_steps,) * num)
    tokens = [x.to(dtype) for x in tokens]
    state = state.float()
    o, final_state = run(wkv7, (*tokens, state), (num_steps,) * num)
    slots = torch.tensor([4, 0, 2])
    pool = torch.full((6, *state.shape[1:]), float("nan"))
    pool[slots] = state
    steps = [x.unflatten(0, (num, num_steps)).unbind(1) for x in tokens]
    outputs = [wkv7_decode(*step, state=pool, state_slots=slots) for step in zip(*steps, strict=True)]
    # fp32 rounding in both; bf16 outputs may also differ by one unit in the last of 8 bits.
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert outputs[0].dtype == dtype
    assert_near({"o": torch.stack(outputs, dim=1).flatten(0, 1)}, {"o": o.double()}, tolerance=tolerance)
    assert_near({"state": pool[slots]}, {"state": final_state.double()}, tolerance=1e-5)
    untouched = [n for n in range(6) if n not in slots.tolist()]
    assert pool[untouched].isnan().all()


def test_decode_equals_the_naive_step():
    *tokens, state = make_inputs((1, 1))
    pool = state.clone()
    o = wkv7_decode(*tokens, state=pool, state_slots=torch.tensor([0, 1]))
    r, log_decay, k, v, a, b = tokens
    after, expected = naive.step(state, r, log_decay=log_decay, k=k, v=v, a=a, b=b)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pool, after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": lambda x: x[0]}, r"r has shape .* expected \[tokens, heads, key size\]"),
        ({"k": lambda x: x[..., 1:]}, r"k has shape \[5, 2, 31\], expected \[5, 2, 32\]"),
        ({"v": lambda x: x[:-1]}, r"v has shape \[4, 2, 32\], expected \[5, 'a divisor of 2', 'V'\]"),
        ({"b": lambda x: x.long()}, r"b has dtype torch.int64, expected a floating dtype"),
        ({"a": lambda x: x.to("meta")}, r"a lies on meta, expected cpu"),
        ({"initial_state": lambda x: x[:1]}, r"initial_state has shape \[1, .*, expected \[2, 2, 32, 32\]"),
        ({"initial_state": lambda x: x.int()}, r"initial_state has dtype torch.int32"),
    ],
    ids=["r-rank", "k-shape", "v-tokens", "b-dtype", "a-device", "state-shape", "state-dtype"],
)
def test_refuses_what_does_not_fit(change, message):
    names = ("r", "log_decay", "k", "v", "a", "b", "initial_state")
    inputs = dict(zip(names, make_inputs((2, 3)), strict=True))
    inputs = {name: change.get(name, lambda x: x)(x) for name, x in inputs.items()}
    with pytest.raises(ValueError, match=message):
        run(wkv7, list(inputs.values()), (2, 3))


@pytest.mark.parametrize("lengths", [(2, 4), (6, -1)], ids=["sum", "negative"])
def test_refuses_lengths_that_do_not_add_up(lengths):
    *tokens, _ = make_inputs((2, 3))
    with pytest.raises(ValueError, match=r"lengths are .* but r holds 5 tokens"):
        wkv7(*tokens, cu_seqlens=bounds((2, 3)), lengths=lengths)


def test_refuses_boundaries_of_another_number_of_sequences():
    *tokens, _ = make_inputs((2, 3))
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \[2\], expected \[3\]"):
        wkv7(*tokens, cu_seqlens=bounds((5,)), lengths=(2, 3))


def test_decode_refuses_slots_of_another_number_of_sequences():
    *tokens, state = make_inputs((1, 1))
    with pytest.raises(ValueError, match=r"state_slots has shape \[1\], expected \[2\]"):
        wkv7_decode(*tokens, state=state, state_slots=torch.tensor([0]))
