"""The edge of top_k and top_p without a sort, one program a row (Triton).

A sort moves every logit several times to find one of them. Logits are at most 0 here, so the bits of their
negatives, read as integers, are in falling order of the logits, and the edge is found digit by digit: 8
passes over the row for top_k and 8 for top_p, of which a multiprocessor's rows stay in the L2 cache. A pass
counts, or weighs, what lies up to each of 15 thresholds. Each lane adds for itself until the pass is over,
always in the same order, so a row's edge does not depend on its batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 8


def kept_edge(scaled: Tensor, *, top_k: Tensor, top_p: Tensor | None, log_min_p: Tensor | None) -> Tensor:
    """Run the kernel; the contract is ``hrwkv.kernels.sampling.kept_edge``'s."""
    scaled = scaled.contiguous()
    num_rows, vocab = scaled.shape
    edge = torch.empty(num_rows, 1, dtype=torch.float32, device=scaled.device)
    _kept_edge[(num_rows,)](
        scaled,
        top_k,
        # Where there is none, any pointer does: it is never read.
        edge if top_p is None else top_p,
        edge if log_min_p is None else log_min_p,
        edge,
        vocab,
        HAS_TOP_P=top_p is not None,
        HAS_MIN_P=log_min_p is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return edge


@triton.jit
def _load(row, start, vocab, BLOCK: tl.constexpr):
    """Logits [BLOCK], and their ranks as integers: 0 for the largest possible, beyond infinity outside."""
    columns = start + tl.arange(0, BLOCK)
    logits = tl.load(row + columns, mask=columns < vocab, other=float("-inf"))
    bits = tl.abs(logits).to(tl.int32, bitcast=True)
    return logits, tl.where(columns < vocab, bits, 0x7FFFFFFF)


@triton.jit
def _kept_edge(
    scaled,
    top_k,
    top_p,
    log_min_p,
    edge,
    vocab,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0)
    row = scaled + number.to(tl.int64) * vocab
    digits = tl.arange(0, 16)
    wanted = tl.load(top_k + number)
    last = tl.full((), 0x7FFFFFFF, tl.int32)  # rank of the last one that is kept
    if wanted < vocab:
        last = tl.full((), 0, tl.int32)
        for step in range(8):
            shift = tl.maximum(27 - 4 * step, 0)
            ends = last + (digits << shift) + ((1 << shift) - 1)
            counts = tl.zeros((16, BLOCK), dtype=tl.int32)
            for start in range(0, vocab, BLOCK):
                _, ranks = _load(row, start, vocab, BLOCK)
                counts += (ranks[None, :] <= ends[:, None]).to(tl.int32)
            # The sixteenth threshold is the end of what the digits before have left over.
            short = (tl.sum(counts, 1) < wanted) & (digits < 15)
            last += tl.sum(short.to(tl.int32), 0) << shift
    if HAS_TOP_P:
        share = tl.load(top_p + number)
        if share <= 1:
            least = float("-inf")
            if HAS_MIN_P:
                least = tl.load(log_min_p + number)
            # What top_k leaves over: all before its last rank, and of that rank what makes it k.
            weight = tl.zeros((BLOCK,), dtype=tl.float32)
            count = tl.zeros((BLOCK,), dtype=tl.int32)
            for start in range(0, vocab, BLOCK):
                logits, ranks = _load(row, start, vocab, BLOCK)
                before = ranks < last
                weight += tl.where(before & (logits >= least), tl.exp(logits), 0.0)
                count += before.to(tl.int32)
            total = tl.sum(weight, 0)
            if wanted < vocab:
                value = -(last.to(tl.float32, bitcast=True))
                rest = (wanted - tl.sum(count, 0)).to(tl.float32)
                total += tl.where(value >= least, rest * tl.exp(value), 0.0)
            nucleus = tl.full((), 0, tl.int32)
            for step in range(8):
                shift = tl.maximum(27 - 4 * step, 0)
                ends = nucleus + (digits << shift) + ((1 << shift) - 1)
                weights = tl.zeros((16, BLOCK), dtype=tl.float32)
                for start in range(0, vocab, BLOCK):
                    logits, ranks = _load(row, start, vocab, BLOCK)
                    # What min_p leaves out lies behind the edge and need not be told apart.
                    weights += tl.where(ranks[None, :] <= ends[:, None], tl.exp(logits)[None, :], 0.0)
                short = (tl.sum(weights, 1) < share * total) & (digits < 15)
                nucleus += tl.sum(short.to(tl.int32), 0) << shift
            # Only rounding can put it behind top_k's.
            last = tl.minimum(last, nucleus)
    value = -(last.to(tl.float32, bitcast=True))
    tl.store(edge + number, tl.where(last < 0x7F800000, value, float("-inf")))
