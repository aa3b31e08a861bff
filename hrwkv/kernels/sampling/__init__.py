"""Where top_k and top_p cut a distribution; a form is chosen.

``naive`` sorts and is the definition; ``search`` finds the same edge on a GPU without a sort.
"""

from torch import Tensor

from hrwkv.kernels.sampling import naive


def kept_edge(
    scaled: Tensor, *, top_k: Tensor, top_p: Tensor | None, log_min_p: Tensor | None, width: int
) -> Tensor:
    """The smallest logit that top_k and then top_p keep (arXiv 1904.09751), -inf in rows that have neither.

    Equal logits stay together: whoever cuts below the edge keeps all that equal the last one kept.

    Args:
        scaled: [N, V] fp32, the largest of each row 0.
        top_k: [N, 1] int64, at least 1; V or more where off.
        top_p: [N, 1] fp32; above 1 where off. None: off everywhere. It is a share of what min_p and top_k
            leave over.
        log_min_p: [N, 1] fp32, -inf where off, or None. Logits below it weigh nothing.
        width: as many columns as the largest top_k, V if a row has top_p without top_k; at least 1.

    Returns:
        [N, 1] fp32.
    """
    if scaled.is_cuda:
        from hrwkv.kernels.sampling import search

        return search.kept_edge(scaled, top_k=top_k, top_p=top_p, log_min_p=log_min_p)
    return naive.kept_edge(scaled, top_k=top_k, top_p=top_p, log_min_p=log_min_p, width=width)
