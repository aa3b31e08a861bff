"""Packed contexts for a fused kernel: what is copied and told to it, on the CPU; the kernel on a GPU."""

import pytest
import torch
from torch import Tensor

from hrwkv.kernels import attention
from hrwkv.kernels.attention import naive, sdpa
from tests.kernels.attention.cases import FP32, TOLERANCE, Paged, bounds, make_paged

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Contexts end inside a block or with it, one holds nothing but the piece; pieces within a block and over one.
LENGTHS, CONTEXTS = (40, 17, 130, 64), (170, 192, 130, 515)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window_size
) -> Tensor:
    """What varlen_attn does on a GPU, by the definition: causal and aligned bottom-right."""
    assert window_size == (-1, 0)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    sizes_q, sizes_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max(sizes_q), max(sizes_k)) == (max_q, max_k)
    parts = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True)
    return torch.cat([naive.attend(*part) for part in parts])


def paged_varlen(case: Paged, contexts) -> Tensor:
    indices = {name: x for name, x in case.indices.items() if name != "context_starts"}
    return sdpa.paged_varlen_attention(*case[:3], contexts=contexts, **indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("lengths", "context_lens"),
    [(LENGTHS, CONTEXTS), ((5,), (9,)), ((5, 0, 2), (6, 3, 8)), ((20, 20), (33, 64))],
    ids=["ragged", "one", "empty-one", "equal"],
)
@pytest.mark.parametrize("block_size", [4, 64], ids="block{}".format)
def test_packed_contexts_equal_naive(lengths, context_lens, block_size, dtype, monkeypatch):
    monkeypatch.setattr(sdpa, "_grouped_varlen_attn", attend_fused)
    case = make_paged(lengths, context_lens, block_size=block_size, dtype=dtype)
    expected = naive.paged_attention(*case[:3], **case.indices)
    torch.testing.assert_close(paged_varlen(case, context_lens), expected, **FP32)


def test_a_step_is_packed_where_the_kernel_serves(monkeypatch):
    """The package's choice: pieces of any lengths share a call, single tokens and left padding do not."""
    calls = []

    def attend(*inputs: Tensor, **options) -> Tensor:
        calls.append(inputs[3].diff().tolist())
        return attend_fused(*inputs, **options)

    monkeypatch.setattr(sdpa, "_grouped_varlen_attn", attend)
    monkeypatch.setattr(sdpa, "takes_contexts", lambda q: True)
    lengths, context_lens = (1, 1, 0, 20, 30), (9, 30, 3, 20, 77)
    case = make_paged(lengths, context_lens)
    expected = naive.paged_attention(*case[:3], **case.indices)
    found = attention.paged_attention(*case[:3], contexts=context_lens, **case.indices)
    torch.testing.assert_close(found, expected, **FP32)
    assert calls == [[1, 1, 0], [20, 30]]

    calls.clear()
    case.indices["context_starts"] = torch.tensor([2, 0, 0, 5, 0])
    found = attention.paged_attention(*case[:3], contexts=context_lens, **case.indices)
    torch.testing.assert_close(found, naive.paged_attention(*case[:3], **case.indices), **FP32)
    assert not calls


def test_the_cpu_has_no_such_kernel():
    assert not sdpa.takes_contexts(torch.zeros(3, 2, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("kv_heads", [1, 4, 16], ids="KV{}".format)
@pytest.mark.parametrize("size", [64, 96, 128], ids="K{}".format)
def test_packed_contexts_equal_naive_on_a_gpu(size, kv_heads, dtype):
    """The kernel's causality is aligned bottom-right, and NaN in unused rows of the cache stays there."""
    case = make_paged(
        LENGTHS, CONTEXTS, block_size=64, heads=16, kv_heads=kv_heads, size=size, dtype=dtype, device="cuda"
    )
    found = paged_varlen(case, CONTEXTS)
    assert found.dtype == dtype
    expected = naive.paged_attention(*(x.double() for x in case[:3]), **case.indices)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("size", [64, 96, 128], ids="K{}".format)
def test_a_step_of_decode_rows_and_pieces_equals_naive(size, dtype):
    """Rows of one token, pieces of two lengths and an empty sequence; and the same bits as both kernels'."""
    lengths, context_lens = (1, 1, 0, 130, 190), (77, 300, 5, 130, 513)
    case = make_paged(lengths, context_lens, block_size=64, heads=16, size=size, dtype=dtype, device="cuda")
    found = attention.paged_attention(*case[:3], contexts=context_lens, **case.indices)
    expected = naive.paged_attention(*(x.double() for x in case[:3]), **case.indices)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[dtype])
    pieces = {name: x for name, x in case.indices.items() if name != "context_starts"}
    pieces |= {"lengths": lengths[3:], "cu_seqlens": bounds(lengths[3:]).cuda()}
    pieces |= {name: pieces[name][3:] for name in ("block_tables", "context_lens")}
    alone = sdpa.paged_varlen_attention(case.q[2:], *case[1:3], contexts=context_lens[3:], **pieces)
    assert torch.equal(found[2:], alone)


@pytest.mark.gpu
def test_gradients_through_packed_contexts_equal_naive():
    case = make_paged(
        (40, 64), (170, 64), block_size=64, heads=8, size=96, dtype=torch.bfloat16, device="cuda"
    )
    leaves = [x.nan_to_num(0.0).requires_grad_() for x in case[:3]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    o = attention.paged_attention(*leaves, contexts=(170, 64), **case.indices)
    weight = torch.randn_like(o)
    expected = naive.paged_attention(*exact, **case.indices)
    for x, y in zip(
        torch.autograd.grad((o * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), exact),
        strict=True,
    ):
        scale = y.abs().amax()  # a key's gradient adds up those of many queries
        torch.testing.assert_close(x.double() / scale, y / scale, **TOLERANCE[torch.bfloat16])
