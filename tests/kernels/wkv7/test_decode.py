"""The step in one launch against the definition in fp64, in Triton's interpreter or on a GPU."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernel is Triton's; its interpreter runs it without a GPU")

from hrwkv.kernels.mix import naive as mix_naive
from hrwkv.kernels.mix.naive import Form, Rows, Weights
from hrwkv.kernels.wkv7 import naive
from hrwkv.kernels.wkv7.decode import Launch, choose_launch, mixer_decode, wkv7_decode
from tests.kernels.wkv7.cases import LOWEST_LOG_DECAY, assert_near, bounds, make_inputs

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# By the norm: fp32 rounds by 6e-8 an operation, exp and log on a GPU by a few times that. Results are rounded
# to bf16's 8 bits once; the interpreter cuts them off instead, which is twice as far.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
FORMS = {
    "hxa079": (Form("gated", "log_log", 1e-6), True, True),  # form, key residual, bonus
    "hxa07a": (Form("none", "log_log", 1e-6), False, False),
    "hxa07c": (Form("low_rank", "decay", 1e-6), False, False),
    "radlads": (Form("gated_repeated", "decay", 1e-6), False, False),
}


def make_pool(state: Tensor, slots: Sequence[int], *, dtype: torch.dtype, device: str) -> Tensor:
    """NaN but for the slots that are used, so that a step elsewhere is seen."""
    pool = torch.full((7, *state.shape[1:]), float("nan"), dtype=dtype, device=device)
    for slot, x in zip(slots, state, strict=True):
        if slot >= 0:
            pool[slot] = x.to(pool)
    return pool


def repeat(x: Tensor, heads: int) -> Tensor:
    return mix_naive.repeat_heads(x, heads)


def expected_steps(
    tokens: Sequence[Tensor], pool: Tensor, slots: Sequence[int], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Outputs and pool of the definition in fp64 for rounded inputs; zeros where the slot is padding.

    On the CPU, since cuBLAS refuses to work under deterministic algorithms without a variable set.
    """
    heads = tokens[0].shape[1]
    tokens = [repeat(x.cpu().double(), heads) for x in tokens]
    pool = pool.cpu().double()
    start = torch.stack([pool[max(slot, 0)] for slot in slots])
    o, final = naive.wkv7(*tokens, cu_seqlens=bounds(lengths), lengths=lengths, initial_state=start)
    padding = torch.tensor([slot < 0 for slot in slots]).repeat_interleave(torch.tensor(lengths))
    o[padding] = 0
    for slot, x in zip(slots, final, strict=True):
        if slot >= 0:
            pool[slot] = x
    return o, pool


def compare(
    o: Tensor, pool: Tensor, expected: tuple[Tensor, Tensor], *, state_dtype: torch.dtype = torch.float32
) -> None:
    expected_o, expected_pool = expected
    pool = pool.cpu()
    assert_near({"o": o}, {"o": expected_o}, tolerance=TOLERANCES[o.dtype])
    used = expected_pool.isfinite().all(dim=(1, 2, 3))
    assert pool[~used].isnan().all(), "a slot of nobody was written"
    assert_near({"state": pool[used]}, {"state": expected_pool[used]}, tolerance=TOLERANCES[state_dtype])


@DEVICES
@DTYPES
@pytest.mark.parametrize(("key_size", "value_size"), [(32, 32), (64, 64), (96, 96), (128, 128), (96, 32)])
def test_one_token_equals_naive(key_size, value_size, dtype, device):
    """Rows and state in one dtype, three query heads to a head of v and a, slots in any order."""
    slots = (4, 0)
    *tokens, state = make_inputs((1, 1), heads=3, key_size=key_size, value_size=value_size)
    tokens[3], tokens[4] = tokens[3][:, :1], tokens[4][:, :1]
    tokens = [x.to(device, dtype) for x in tokens]
    pool = make_pool(state, slots, dtype=dtype, device=device)
    expected = expected_steps(tokens, pool, slots, (1, 1))
    o = wkv7_decode(*tokens, state=pool, state_slots=torch.tensor(slots, device=device))
    assert o.dtype == dtype
    compare(o, pool, expected, state_dtype=dtype)


@DEVICES
@pytest.mark.parametrize(
    "launch", [Launch(16, 32, 1, load_first=True), Launch(32, 32, 2), Launch(32, 16, 4)], ids=str
)
def test_ragged_steps_equal_naive(launch, device):
    """An empty sequence between two of several tokens, near-identical keys, both ends of the decay."""
    slots, lengths = (2, 5, 0), (4, 0, 3)
    r, log_decay, k, v, a, b, state = make_inputs(lengths, key_size=96)
    direction = torch.nn.functional.normalize(a[:1] + 1e-3 * a, dim=-1)
    log_decay[::2], log_decay[1::2] = LOWEST_LOG_DECAY, 0
    tokens = [x.to(device, torch.float32) for x in (r, log_decay, k, v, -direction, 0.9 * direction)]
    pool = make_pool(state, slots, dtype=torch.float32, device=device)
    expected = expected_steps(tokens, pool, slots, lengths)
    empty = pool[5].clone()
    o = wkv7_decode(
        *tokens,
        state=pool,
        state_slots=torch.tensor(slots, dtype=torch.int32, device=device),
        cu_seqlens=bounds(lengths).to(device),
        launch=launch,
    )
    compare(o, pool, expected)
    assert torch.equal(pool[5], empty)


@DEVICES
@pytest.mark.parametrize("lengths", [None, (1, 2)], ids=["one", "ragged"])
def test_padding_touches_no_state_and_gives_zeros(lengths, device):
    """A captured graph runs for more sequences than there are; the others' rows may hold anything."""
    slots, given = (-1, 3), lengths or (1, 1)
    *tokens, state = make_inputs(given)
    tokens = [x.to(device, torch.float32) for x in tokens]
    pool = make_pool(state, slots, dtype=torch.float32, device=device)
    expected = expected_steps(tokens, pool, slots, given)
    for x in tokens:
        x[: given[0]] = float("nan")
    bound = None if lengths is None else bounds(lengths).to(device)
    slot_tensor = torch.tensor(slots, device=device)
    o = wkv7_decode(*tokens, state=pool, state_slots=slot_tensor, cu_seqlens=bound)
    assert (o[: given[0]] == 0).all()
    compare(o, pool, expected)


@DEVICES
def test_same_inputs_give_the_same_bits_however_the_tokens_are_given(device):
    *tokens, state = make_inputs((1, 1), key_size=96)
    tokens = [x.to(device, torch.float32) for x in tokens]
    slots = torch.tensor([1, 0], device=device)
    # Rows as views of one wider product: tokens lie apart, and the pool is every other slot of a larger one.
    wide = torch.cat([x.flatten(1) for x in tokens], dim=1).split([x[0].numel() for x in tokens], dim=1)
    views = [x.unflatten(1, (2, 96)) for x in wide]
    larger = state.float().to(device).repeat_interleave(2, dim=0)
    results = []
    for rows, bound, pool in (
        (tokens, None, state.float().to(device)),
        (tokens, bounds((1, 1)).to(device), state.float().to(device)),
        (views, None, larger[::2]),
    ):
        results.append((wkv7_decode(*rows, state=pool, state_slots=slots, cu_seqlens=bound), pool))
    for o, pool in results[1:]:
        assert torch.equal(o, results[0][0])
        assert torch.equal(pool, results[0][1])


def test_launch_divides_every_head_size():
    for size in (16, 24, 32, 64, 80, 96, 128):
        for num_pairs in (1, 10_000):
            launch = choose_launch(
                num_pairs, key_size=size, value_size=size, num_warps=1, state_dtype=torch.float32
            )
            assert size % launch.block_k == 0
            assert size % launch.block_v == 0


def make_mixer(
    variant: str, *, lengths: Sequence[int], size: int, norm: bool = False
) -> tuple[Rows, Weights, Form, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Rows, weights, form, rope, first and state in fp64: four query heads, two KV heads."""
    form, key_residual, bonus = FORMS[variant]
    heads, kv_heads, num = 4, 2, sum(lengths)
    value_heads = kv_heads if form.value_residual in ("gated", "none") else heads
    reads_value = form.value_residual != "none"

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    rows = Rows(
        r=rand(num, heads, size),
        k=rand(num, kv_heads, size),
        v=rand(num, kv_heads, size),
        decay=4 * rand(num, heads, size),
        iclr=rand(num, heads, size),
        gate=rand(num, heads, size),
        value=rand(num, value_heads, size) if reads_value else None,
        key=rand(num, kv_heads, size) if key_residual else None,
    )
    weights = Weights(
        w0=rand(heads * size),
        a0=rand(heads * size),
        v0=rand(value_heads * size) if form.value_residual.startswith("gated") else None,
        k0=rand(kv_heads * size) if key_residual else None,
        r_k=rand(heads, size) if bonus else None,
        r_norm=rand(size) if norm else None,
        k_norm=rand(size) if norm else None,
    )
    angles = 100 * rand(num, size // 2)
    first = rand(num, value_heads, size), rand(num, kv_heads, size)
    state = rand(len(lengths), heads, size, size)
    return rows, weights, form, (angles.cos(), angles.sin()), first, state


def cast(tensors, dtype, device):
    """The same named tuple with every tensor in ``dtype``."""
    return type(tensors)._make(None if x is None else x.to(device, dtype) for x in tensors)


def check_mixer(variant, *, size, dtype, device, lengths=None, norm=False, rope=True, in_first=False):
    slots = (3, 0) if lengths is None else (3, -1, 0)
    given = lengths or (1, 1)
    rows, weights, form, tables, first, state = make_mixer(variant, lengths=given, size=size, norm=norm)
    rows, weights = cast(rows, dtype, device), cast(weights, dtype, device)
    if in_first:
        rows = rows._replace(value=rows.value if form.value_residual == "low_rank" else None, key=None)
    tables = tuple(x.float().to(device) for x in tables) if rope else None
    first = None if in_first else tuple(x.to(device, dtype) for x in first)
    pool = make_pool(state, slots, dtype=torch.float32, device=device)
    exact_rows, exact_weights = (cast(x, torch.float64, "cpu") for x in (rows, weights))
    mixed, bonus, expected_first = mix_naive.mix(
        exact_rows,
        exact_weights,
        form=form,
        rope=tables and tuple(x.cpu() for x in tables),
        first=first and tuple(x.cpu() for x in first),
    )
    o, expected_pool = expected_steps(mixed, pool, slots, given)
    expected_y = mix_naive.finish(o, mixed.v, exact_rows.gate, bonus=bonus)
    padding = [slot < 0 for slot in slots for _ in range(given[slots.index(slot)])]
    expected_y[torch.tensor(padding)] = 0
    y, found_first = mixer_decode(
        rows,
        weights,
        form=form,
        rope=tables,
        first=first,
        state=pool,
        state_slots=torch.tensor(slots, device=device),
        cu_seqlens=None if lengths is None else bounds(lengths).to(device),
    )
    assert y.dtype == dtype
    compare(y, pool, (expected_y, expected_pool))
    return found_first, expected_first


@DEVICES
@DTYPES
@pytest.mark.parametrize("variant", FORMS)
def test_mixer_step_equals_mix_naive_and_finish(variant, dtype, device):
    check_mixer(variant, size=32, dtype=dtype, device=device)


@DEVICES
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64, {"norm": True}),
        (96, {"norm": True}),
        (128, {"norm": True}),
        (96, {"rope": False}),
        (96, {"lengths": (2, 1, 3)}),
    ],
    ids=str,
)
def test_mixer_step_with_norms_without_rope_and_with_several_tokens(size, options, device):
    check_mixer("hxa079", size=size, dtype=torch.float32, device=device, **options)


@DEVICES
@DTYPES
@pytest.mark.parametrize("variant", FORMS)
def test_first_layer_gives_its_value_and_key(variant, dtype, device):
    found, expected = check_mixer(variant, size=32, dtype=dtype, device=device, norm=True, in_first=True)
    if expected is None:
        assert found is None
        return
    assert [x.dtype for x in found] == [dtype, dtype]
    named = [dict(zip(("v", "k"), pair, strict=True)) for pair in (found, expected)]
    assert_near(*named, tolerance=TOLERANCES[dtype])
