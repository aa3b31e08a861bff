"""The edge without a sort is the edge of the definition, ties and rows without a filter included."""

import math

import pytest
import torch
from torch import Tensor

from hrwkv.kernels import sampling
from hrwkv.kernels.sampling import naive, search

FORMS = [
    pytest.param("cpu", id="search"),
    pytest.param("cuda", id="search-gpu", marks=pytest.mark.gpu),
]


def rows(count: int, vocab: int, *, grid: float) -> Tensor:
    """Logits whose largest is 0, some equal, some -inf as a grammar leaves them."""
    logits = (torch.randn(count, vocab) * 1.5 / grid).round() * grid
    logits[torch.rand(count, vocab) < 0.1] = -math.inf
    logits[:, vocab // 2] = 0.0
    return logits - logits.amax(-1, keepdim=True)


@pytest.mark.parametrize("device", FORMS)
@pytest.mark.parametrize("vocab", [7, 1024, 1500, 2 * 1024 + 3])
@pytest.mark.parametrize(("has_p", "has_min_p"), [(False, False), (True, False), (True, True)])
def test_search_finds_the_definitions_edge(device: str, vocab: int, has_p: bool, has_min_p: bool) -> None:
    """Shares are off the sums of equal weights, which fp32 cannot tell apart from them."""
    ks = [1, 2, 5, vocab - 1, vocab, 2 * vocab, 3, vocab]
    scaled = rows(len(ks), vocab, grid=0.5)
    top_k = torch.tensor(ks).unsqueeze(1)
    top_p = torch.tensor([0.9, 0.5013, 0.7017, 0.9511, 0.3019, 0.9907, 2.0, 2.0]).unsqueeze(1)
    log_min_p = torch.tensor([-math.inf, -2.25, -9.25, -3.25, -1.25, -math.inf, -2.25, -0.25]).unsqueeze(1)
    given = {"top_p": top_p if has_p else None, "log_min_p": log_min_p if has_min_p else None}
    expected = naive.kept_edge(scaled, top_k=top_k, width=vocab, **given)
    moved = {name: None if value is None else value.to(device) for name, value in given.items()}
    found = search.kept_edge(scaled.to(device), top_k=top_k.to(device), **moved)
    assert torch.equal(found.cpu(), expected)
    # Not all of it is trivial: neither one token nor all.
    kept = (scaled >= expected).sum(-1)
    assert ((kept > 1) & (kept < vocab)).any()


@pytest.mark.parametrize("device", FORMS)
def test_the_last_of_top_k_weighs_nothing_below_min_p(device: str) -> None:
    """Three of [0, -1, -1, -1] with min_p above -1: the first has all the weight, so top_p stops there."""
    scaled = torch.tensor([[0.0, -1.0, -1.0, -1.0]], device=device)
    given = {
        "top_p": torch.tensor([[0.9]], device=device),
        "log_min_p": torch.tensor([[-0.5]], device=device),
    }
    top_k = torch.tensor([[3]], device=device)
    assert search.kept_edge(scaled, top_k=top_k, **given) == 0
    assert naive.kept_edge(scaled, top_k=top_k, width=3, **given) == 0


@pytest.mark.parametrize("device", FORMS)
def test_a_rows_edge_does_not_depend_on_its_batch(device: str) -> None:
    scaled = rows(5, 1500, grid=1e-3).to(device)
    top_k = torch.full((5, 1), 1500, device=device)
    top_p = torch.full((5, 1), 0.8, device=device)
    whole = search.kept_edge(scaled, top_k=top_k, top_p=top_p, log_min_p=None)
    alone = [
        search.kept_edge(scaled[i : i + 1], top_k=top_k[:1], top_p=top_p[:1], log_min_p=None)
        for i in range(5)
    ]
    assert torch.equal(whole, torch.cat(alone))


def test_the_cpu_sorts() -> None:
    scaled, top_k = rows(2, 40, grid=0.5), torch.tensor([[3], [40]])
    found = sampling.kept_edge(scaled, top_k=top_k, top_p=None, log_min_p=None, width=40)
    assert torch.equal(found, naive.kept_edge(scaled, top_k=top_k, top_p=None, log_min_p=None, width=40))
    assert found[0] == scaled[0].sort(descending=True).values[2]
