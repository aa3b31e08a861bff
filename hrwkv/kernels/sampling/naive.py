"""The edge of top_k and top_p by sorting: the definition."""

import math

import torch
from torch import Tensor


def kept_edge(
    scaled: Tensor, *, top_k: Tensor, top_p: Tensor | None, log_min_p: Tensor | None, width: int
) -> Tensor:
    """The contract is ``hrwkv.kernels.sampling.kept_edge``'s."""
    ordered = scaled.topk(width, dim=-1).values  # [N, width], falling
    edge = ordered.gather(-1, top_k.clamp(max=width) - 1)
    edge = edge.masked_fill(top_k >= scaled.shape[1], -math.inf)
    if top_p is None:
        return edge
    ranks = torch.arange(width, device=scaled.device)
    weights = ordered.exp().masked_fill_(ranks >= top_k, 0.0)
    if log_min_p is not None:
        weights.masked_fill_(ordered < log_min_p, 0.0)
    reached = weights.cumsum(-1)
    # At least the likeliest: a top_p that fp32 rounds to 0 would keep none.
    kept = (reached - weights < top_p * reached[:, -1:]).sum(-1, keepdim=True).clamp_(min=1)
    nucleus = ordered.gather(-1, kept - 1).masked_fill(top_p > 1, -math.inf)
    return edge.maximum(nucleus)
