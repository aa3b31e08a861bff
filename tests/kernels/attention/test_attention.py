import pytest
import torch
from torch import Tensor

from hrwkv.kernels.attention import naive, paged_attention, store_kv, varlen_attention
from tests.kernels.attention.cases import BF16, FP32, TOLERANCE, bounds, make_paged, make_qkv, names

RAGGED = [(1,), (15,), (63, 1, 16), (5, 0, 7), (33, 33), (0,), ()]


def outputs_and_grads(form, q, k, v, lengths) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = form(*leaves, cu_seqlens=bounds(lengths).to(q.device), lengths=lengths)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o)
    return [o.detach(), *torch.autograd.grad((o * weight).sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("kv_heads", [1, 2, 6], ids="KV{}".format)
@pytest.mark.parametrize("lengths", RAGGED, ids=names)
def test_varlen_equals_naive(lengths, kv_heads):
    q, k, v = make_qkv(lengths, kv_heads=kv_heads)
    expected = outputs_and_grads(naive.varlen_attention, q, k, v, lengths)
    found = outputs_and_grads(varlen_attention, q, k, v, lengths)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **FP32)


def test_varlen_in_bf16_equals_naive():
    lengths = (63, 1, 16)
    q, k, v = (x.bfloat16() for x in make_qkv(lengths))
    expected = outputs_and_grads(naive.varlen_attention, q, k, v, lengths)
    found = outputs_and_grads(varlen_attention, q, k, v, lengths)
    assert found[0].dtype == torch.bfloat16
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **BF16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [32, 64, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("lengths", RAGGED, ids=names)
def test_varlen_on_a_gpu_equals_naive(lengths, size, dtype):
    q, k, v = (x.to("cuda", dtype) for x in make_qkv(lengths, heads=8, size=size))
    expected = outputs_and_grads(naive.varlen_attention, *(x.double() for x in (q, k, v)), lengths)
    found = outputs_and_grads(varlen_attention, q, k, v, lengths)
    # A single key leaves exactly 0 for q's and k's gradients: the difference of two equal sums over v, times
    # a key over sqrt(K). The largest of such terms is the measure there; there is none without tokens.
    term = v.norm(dim=-1).amax() * k.abs().amax() / size**0.5 if len(v) else 1.0
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        # Otherwise against the largest value: a gradient of one key adds up those of many queries.
        scale = y.abs().amax() if y.any() else term
        torch.testing.assert_close(x.double() / scale, y / scale, **TOLERANCE[dtype])


def test_packed_equals_one_sequence_at_a_time():
    lengths = (9, 20, 9)
    q, k, v = make_qkv(lengths)
    packed = varlen_attention(q, k, v, cu_seqlens=bounds(lengths), lengths=lengths).split(list(lengths))
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    for length, found, part in zip(lengths, packed, parts, strict=True):
        alone = varlen_attention(*part, cu_seqlens=bounds((length,)), lengths=(length,))
        torch.testing.assert_close(found, alone, **FP32)


def test_later_tokens_do_not_change_earlier_ones():
    lengths = (12,)
    q, k, v = make_qkv(lengths)
    before = varlen_attention(q, k, v, cu_seqlens=bounds(lengths), lengths=lengths)
    k[8:], v[8:] = 100.0, 100.0
    after = varlen_attention(q, k, v, cu_seqlens=bounds(lengths), lengths=lengths)
    torch.testing.assert_close(before[:8], after[:8], **FP32)
    assert not torch.allclose(before[8:], after[8:])


@pytest.mark.parametrize("starts", [None, (2, 0, 5)], ids=["from-0", "left-padded"])
@pytest.mark.parametrize(
    ("lengths", "context_lens"),
    [
        ((1, 1, 1), (9, 1, 16)),
        ((7, 1, 3), (7, 9, 16)),
        ((1, 1, 9), (16, 3, 11)),
        ((4, 4, 4), (4, 9, 13)),
        ((5, 0, 2), (6, 3, 8)),
    ],
    ids=["decode", "mixed", "decode-and-prompt", "equal", "empty-one"],
)
@pytest.mark.parametrize("on_host", [False, True], ids=["", "contexts"])
def test_paged_equals_naive(lengths, context_lens, starts, on_host):
    q, k_cache, v_cache, indices = make_paged(lengths, context_lens, starts=starts)
    found = paged_attention(q, k_cache, v_cache, contexts=context_lens if on_host else None, **indices)
    torch.testing.assert_close(found, naive.paged_attention(q, k_cache, v_cache, **indices), **FP32)


def test_paged_query_with_nothing_to_attend_gives_zeros():
    """Left padding comes before ``context_starts``; a NaN there would spread through the recurrent state."""
    q, k_cache, v_cache, indices = make_paged((6,), (6,), starts=(4,))
    o = paged_attention(q, k_cache, v_cache, **indices)
    assert torch.equal(o[:4], torch.zeros(4, 6, 16))
    assert (o[4:] != 0).all()


def test_paged_equals_varlen_when_the_cache_holds_just_the_new_tokens():
    lengths, block_size = (5, 11), 4
    q, k, v = make_qkv(lengths)
    tables = torch.tensor([[3, 1, 0], [4, 2, 5]])
    caches = torch.full((2, 6, block_size, 2, 16), float("nan"))
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequence = torch.tensor([0] * 5 + [1] * 11)
    slots = tables[sequence, positions // block_size] * block_size + positions % block_size
    store_kv(k, v, caches[0], caches[1], slot_mapping=slots)
    found = paged_attention(
        q,
        caches[0],
        caches[1],
        cu_seqlens=bounds(lengths),
        lengths=lengths,
        block_tables=tables,
        context_lens=torch.tensor(lengths),
    )
    expected = varlen_attention(q, k, v, cu_seqlens=bounds(lengths), lengths=lengths)
    torch.testing.assert_close(found, expected, **FP32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_store_writes_its_slots_and_nothing_else(dtype):
    caches = torch.full((2, 3, 2, 4, 8), -1.0, dtype=dtype).transpose(2, 3)  # strided: heads before rows
    expected = caches.clone()
    k, v = torch.randn(2, 5, 2, 8).to(dtype)
    slots = torch.tensor([11, -1, 6, 3, 4])
    store_kv(k, v, caches[0], caches[1], slot_mapping=slots)
    naive.store_kv(k, v, expected[0], expected[1], slot_mapping=slots)
    assert torch.equal(caches, expected)
    assert (caches[0, 0, 1] == -1).all()


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "lengths", "message"),
    [
        ((5, 6, 16), (5, 4, 16), (5,), "divides the 6 heads of q"),
        ((5, 6, 16), (5, 2, 8), (5,), "expected key size 16"),
        ((5, 6, 16), (4, 2, 16), (5,), "k and v hold 4 and 4 tokens, expected 5"),
        ((5, 6, 16), (5, 2, 16), (2, 2), "lengths have sum 4, but q holds 5 tokens"),
        ((5, 6, 16), (5, 2, 16), (7, -2), "lengths have sum 5, but q holds 5 tokens: give one length >= 0"),
        ((5, 96), (5, 2, 16), (5,), "q has shape"),
    ],
    ids=["heads", "key-size", "tokens", "lengths", "negative", "rank"],
)
def test_varlen_refuses_what_does_not_fit(q_shape, k_shape, lengths, message):
    k = torch.zeros(k_shape)
    with pytest.raises(ValueError, match=message):
        varlen_attention(torch.zeros(q_shape), k, k, cu_seqlens=bounds(lengths), lengths=lengths)


def test_paged_refuses_tables_of_another_number_of_sequences():
    q, k_cache, v_cache, indices = make_paged((1, 1), (4, 4))
    indices["block_tables"] = indices["block_tables"][:1]
    with pytest.raises(ValueError, match=r"block_tables has shape \[1, 2\], expected \[2, blocks\]"):
        paged_attention(q, k_cache, v_cache, **indices)


def test_store_refuses_another_number_of_slots_than_tokens():
    _, k_cache, v_cache, _ = make_paged((1,), (4,))
    k = torch.zeros(3, 2, 16)
    with pytest.raises(ValueError, match="expected as many slots as tokens"):
        store_kv(k, k, k_cache, v_cache, slot_mapping=torch.tensor([0, 1]))
