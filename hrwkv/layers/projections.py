"""Matrices that meet the same input, laid side by side and multiplied at once, for inference.

A decode step of a few sequences is made of products so small that each costs more in its launch than in its
bytes. ``fuse_projections`` copies the weights of a module into one tensor and makes the parameters views of
it: names, shapes and values stay, and what is written into a parameter in place (``load_state_dict``, an
optimiser's step) is written into the tensor. A parameter that gets memory of its own (``.to``, ``deepcopy``,
``load_state_dict(assign=True)``) is noticed by the next forward pass, which refuses. With gradients, and for
many tokens, the products stay apart, as in a module that was never fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Products of more rows gain nothing from one launch, and whoever reads a part may have to copy it first.
FEW_TOKENS = 512


@dataclass(frozen=True)
class _Fused:
    """weight: [sum, D]. bias: [sum], zeros for a projection without one; None if there is none at all.

    views: by name the rows that are a projection's weight, and its bias if it has one.
    """

    weight: Tensor
    bias: Tensor | None
    views: dict[str, tuple[Tensor, Tensor | None]]

    @classmethod
    def lay(cls, own: dict[str, tuple[Tensor, Tensor | None]]) -> _Fused:
        """Copies of weights [rows, D] and biases [rows] or None, one after the other."""
        weight, bias = torch.cat([matrix for matrix, _ in own.values()]), None
        if any(vector is not None for _, vector in own.values()):
            bias = torch.cat(
                [
                    matrix.new_zeros(len(matrix)) if vector is None else vector
                    for matrix, vector in own.values()
                ]
            )
        views, start = {}, 0
        for name, (matrix, vector) in own.items():
            rows = slice(start, start + len(matrix))
            views[name] = weight[rows], None if vector is None or bias is None else bias[rows]
            start = rows.stop
        return cls(weight, bias, views)

    def products(self, x: Tensor) -> dict[str, Tensor]:
        """x [T, D] -> [T, rows] by name, views of one product."""
        parts = F.linear(x, self.weight, self.bias).split([len(view) for view, _ in self.views.values()], -1)
        return dict(zip(self.views, parts, strict=True))


class Projections(nn.Module):
    """A module with several projections of one input.

    projections: their names; each is an ``nn.Linear``, or the first factor [D, R] of a low-rank product.
    """

    projections: tuple[str, ...]
    _fused: _Fused | None = None

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Lay the weights side by side, unless they lie so; while they are copied they are there twice.

        Raises ValueError if their dtypes or devices differ.
        """
        if self._fused is not None and self._shares(self._fused):
            return
        self._fused = None
        own = {name: _rows(getattr(self, name)) for name in self.projections}
        kinds = sorted(
            {f"{part.dtype} on {part.device}" for pair in own.values() for part in pair if part is not None}
        )
        if len(kinds) > 1:
            raise ValueError(f"the projections are {' and '.join(kinds)}, expected one kind: convert them")
        fused = _Fused.lay(own)
        for name, (matrix, vector) in fused.views.items():
            projection = getattr(self, name)
            if isinstance(projection, Tensor):
                projection.data = matrix.t()
                continue
            projection.weight.data = matrix
            if vector is not None:
                projection.bias.data = vector
        self._fused = fused

    def projected(self, x: Tensor) -> Callable[[str], Tensor]:
        """x [T, D] -> a function from a projection's name to its product [T, rows].

        Raises RuntimeError if fused projections have been given memory of their own.
        """
        if self._fused is None or torch.is_grad_enabled() or len(x) > FEW_TOKENS:
            return lambda name: _product(x, getattr(self, name))
        if not self._shares(self._fused):
            raise RuntimeError(
                f"{type(self).__name__} was moved, converted, copied or given other weights after it was "
                "fused: call fuse_projections() again"
            )
        return self._fused.products(x).__getitem__

    def _shares(self, fused: _Fused) -> bool:
        """True while every weight and bias is the view that it was made."""
        return all(
            _same_memory(part, view)
            for name, views in fused.views.items()
            for part, view in zip(_rows(getattr(self, name)), views, strict=True)
        )


def _rows(projection: nn.Linear | Tensor) -> tuple[Tensor, Tensor | None]:
    """Its weight as [rows, D], and its bias."""
    return (projection.t(), None) if isinstance(projection, Tensor) else (projection.weight, projection.bias)


def _same_memory(part: Tensor | None, view: Tensor | None) -> bool:
    return part is view is None or (
        part is not None and view is not None and part.data_ptr() == view.data_ptr()
    )


def _product(x: Tensor, projection: nn.Module | Tensor) -> Tensor:
    y: Tensor = x @ projection if isinstance(projection, Tensor) else projection(x)
    return y
