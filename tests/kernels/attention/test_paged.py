"""The Triton kernels for a paged cache give what the definition gives: in the interpreter and on a GPU."""

import pytest
import torch

from hrwkv.kernels import attention
from hrwkv.kernels.attention import naive, paged
from tests.kernels.attention.cases import TOLERANCE, Paged, make_paged

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The logarithm of an empty sum is -inf by intention; NumPy, which interprets the kernels, remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
on_devices = pytest.mark.parametrize("device", DEVICES)


def assert_equals_naive(case: Paged) -> None:
    q, k_cache, v_cache, indices = case
    found = paged.paged_attention(q, k_cache, v_cache, **indices)
    assert found.dtype == q.dtype
    expected = naive.paged_attention(q.double(), k_cache.double(), v_cache.double(), **indices)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE[q.dtype])


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32, 64, 96, 128], ids="K{}".format)
def test_decode_equals_naive(size, dtype, device):
    case = make_paged((1, 1), (21, 70), block_size=64, size=size, dtype=DTYPES[dtype], device=device)
    assert_equals_naive(case)


@on_devices
@pytest.mark.parametrize("starts", [None, (2, 0, 5)], ids=["from-0", "left-padded"])
@pytest.mark.parametrize(
    ("lengths", "context_lens"),
    [((1, 1, 1), (9, 1, 16)), ((7, 1, 3), (7, 9, 16)), ((16, 0, 4), (16, 3, 13))],
    ids=["decode", "mixed", "empty-one"],
)
def test_new_tokens_equal_naive(lengths, context_lens, starts, device):
    assert_equals_naive(make_paged(lengths, context_lens, starts=starts, device=device))


@on_devices
@pytest.mark.parametrize("block_size", [7, 16, 64, 128, 500], ids="block{}".format)
def test_split_context_equals_naive(block_size, device):
    """One context is longer than two splits, one ends in the first, one begins in a later one."""
    case = make_paged((1, 2, 1), (480, 35, 300), starts=(0, 0, 290), block_size=block_size, device=device)
    assert_equals_naive(case)


@on_devices
@pytest.mark.parametrize("kv_heads", [1, 3, 24], ids="KV{}".format)
def test_any_group_of_heads_equals_naive(kv_heads, device):
    """5 tokens of 24 heads on one KV head need several programs, one head a KV head leaves spare rows."""
    assert_equals_naive(make_paged((5, 1), (20, 6), heads=24, kv_heads=kv_heads, device=device))


@on_devices
def test_padding_sequence_gives_zeros(device):
    """A CUDA graph has a fixed number of sequences; those without a request have no context."""
    case = make_paged((1, 1, 1), (0, 5, 0), device=device)
    o = paged.paged_attention(*case[:3], **case.indices)
    assert torch.equal(o[[0, 2]], torch.zeros_like(o[[0, 2]]))
    assert_equals_naive(case)


@on_devices
@pytest.mark.parametrize("context", [6, 600], ids=["whole", "split"])
def test_query_before_the_start_gives_zeros(context, device):
    q, k_cache, v_cache, indices = make_paged((6,), (context,), starts=(context - 2,), device=device)
    o = paged.paged_attention(q, k_cache, v_cache, **indices)
    assert torch.equal(o[:4], torch.zeros_like(o[:4]))
    assert (o[4:] != 0).all()


@on_devices
def test_strided_inputs_equal_naive(device):
    """q may be a part of the fused projection's output, the cache any view."""
    q, k_cache, v_cache, indices = make_paged((2, 1), (9, 4), device=device)
    wide = torch.full((3, 10, 32), float("nan"), device=device)
    wide[:, 2:8, ::2] = q
    assert_equals_naive(Paged(wide[:, 2:8, ::2], k_cache.contiguous(), v_cache, indices))


@on_devices
def test_sequences_do_not_see_their_neighbours(device):
    q, k_cache, v_cache, indices = make_paged((1, 1), (300, 9), device=device)
    before = paged.paged_attention(q, k_cache, v_cache, **indices)
    blocks = indices["block_tables"][1]
    k_cache[blocks], v_cache[blocks] = 100.0, 100.0
    after = paged.paged_attention(q, k_cache, v_cache, **indices)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("programs", "tiles", "splits"),
    [(8, 512, 66), (8, 8, 2), (133, 64, 16), (512, 64, 5), (2112, 64, 1), (8, 0, 1)],
    ids=["one-long", "one-short", "some", "many", "full", "empty"],
)
def test_splits_fill_the_gpu_but_stay_worth_a_program(programs, tiles, splits):
    assert paged._num_splits(programs, tiles=tiles) == splits


@pytest.mark.parametrize("tokens", [1, paged.MAX_NEW_TOKENS, paged.MAX_NEW_TOKENS + 1], ids="T{}".format)
def test_few_tokens_without_a_gradient_are_supported(tokens):
    q, k_cache, v_cache, _ = make_paged((tokens,), (20,), size=96)
    few = tokens <= paged.MAX_NEW_TOKENS
    assert paged.is_supported(q, k_cache, v_cache, lengths=(tokens,)) == few
    q.requires_grad_()
    assert not paged.is_supported(q, k_cache, v_cache, lengths=(tokens,))
    with torch.no_grad():
        assert paged.is_supported(q, k_cache, v_cache, lengths=(tokens,)) == few


@pytest.mark.parametrize("size", [16, 48, 64, 80, 96, 112, 128], ids="K{}".format)
def test_parts_are_powers_of_two_that_cover_the_key_size(size):
    parts = paged._parts(size)
    assert [column for first, width in parts for column in range(first, first + width)] == list(range(size))
    assert all(width & (width - 1) == 0 and 16 <= width <= 64 for _, width in parts)


@on_devices
@pytest.mark.parametrize("size", [16, 80, 96, 128], ids="K{}".format)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_store_writes_its_slots_and_nothing_else(cache_dtype, size, device):
    """More rows than one program copies, fp32 into other types, negative slots, and heads before rows."""
    dtype = DTYPES[cache_dtype]
    found = torch.full((2, 9, 3, 4, size), -1.0, dtype=dtype, device=device).transpose(2, 3)
    expected = found.clone()
    k, v = torch.randint(-99, 99, (2, 23, 3, size), device=device).float()  # exact in every type
    slots = torch.randperm(36, device=device)[:23]
    slots[::5] = -1
    paged.store_kv(k, v, found[0], found[1], slot_mapping=slots)
    naive.store_kv(k, v, expected[0], expected[1], slot_mapping=slots)
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_the_package_chooses_the_kernels_on_a_gpu():
    """Same bits as the kernels for a few tokens, near the definition for many."""
    q, k_cache, v_cache, indices = make_paged((1, 1), (300, 9), size=96, device="cuda")
    o = attention.paged_attention(q, k_cache, v_cache, **indices)
    assert torch.equal(o, paged.paged_attention(q, k_cache, v_cache, **indices))
    q, k_cache, v_cache, indices = make_paged((30, 2), (300, 9), size=96, device="cuda")
    o = attention.paged_attention(q, k_cache, v_cache, **indices)
    expected = naive.paged_attention(q, k_cache, v_cache, **indices)
    torch.testing.assert_close(o, expected, **TOLERANCE[q.dtype])


@pytest.mark.gpu
def test_a_cuda_graph_follows_its_inputs():
    """Contexts, tables and slots change between replays; only shapes were recorded."""
    q, k_cache, v_cache, indices = make_paged((1, 1, 1), (600, 70, 9), size=96, block_size=64, device="cuda")
    k_cache.nan_to_num_(0.5)  # tables change owners below, whose blocks are not all written
    v_cache.nan_to_num_(0.5)
    k, v = torch.randn(2, 3, 2, 96, device="cuda")
    slots = torch.full((3,), -1, device="cuda")

    def step() -> torch.Tensor:
        attention.store_kv(k, v, k_cache, v_cache, slot_mapping=slots)
        return attention.paged_attention(q, k_cache, v_cache, **indices)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for context_lens, stored in [
        ([600, 70, 9], [5, 70, -1]),
        ([0, 33, 1], [-1, 8, 640]),
        ([599, 0, 8], [3, -1, 4]),
    ]:
        slots.copy_(torch.tensor(stored))
        indices["context_lens"].copy_(torch.tensor(context_lens))
        indices["block_tables"].copy_(indices["block_tables"].roll(1, 0))
        graph.replay()
        naive.store_kv(k, v, expected_k, expected_v, slot_mapping=slots)
        assert torch.equal(k_cache, expected_k)
        assert torch.equal(v_cache, expected_v)
        expected = naive.paged_attention(q, k_cache, v_cache, **indices)
        torch.testing.assert_close(o, expected, **TOLERANCE[q.dtype])


@pytest.mark.gpu
def test_same_inputs_give_the_same_bits():
    q, k_cache, v_cache, indices = make_paged((1, 1), (900, 500), size=96, device="cuda")
    first = paged.paged_attention(q, k_cache, v_cache, **indices)
    for _ in range(20):
        assert torch.equal(first, paged.paged_attention(q, k_cache, v_cache, **indices))
