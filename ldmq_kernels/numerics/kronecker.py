"""GPTQ rounding by two Hessians: the error of an output is made up for by the outputs rounded after it, too.

The error to be small is tr(O (W - Q) H (W - Q)^T): H are the second moments of what the inputs of a layer weigh, O of
what its outputs weigh. With H = V V^T and O = U U^T, both triangular, it is ||U^T (W - Q) V||^2, whose element (r, c)
needs the errors of the places rounded before it and its own: each place is rounded to the value that makes its own
element smallest. With O diagonal this is GPTQ. The form of the Hessian is K-FAC's (Martens and Grosse, arXiv
1503.05671), and rounding by it YAQA's (Tseng et al., arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128  # rows and columns whose errors reach the others by matrix products


@dataclass(frozen=True)
class KroneckerHessian:
    """What errors of a layer's weight count: an error E counts tr(outputs E inputs E^T).

    Attributes:
        inputs: (K, K) float32, positive semidefinite.
        outputs: (out, out) float32, alike.
    """

    inputs: Tensor
    outputs: Tensor


def round_both_ways(
    weight: Tensor, steps: Tensor, nearest: Callable[[Tensor], Tensor], by_column: Tensor, by_row: Tensor
) -> Tensor:
    """Points of a grid for a weight whose rows and columns are in the order of rounding, the last ones first.

    Args:
        weight: (out, K) float32.
        steps: (out, K) float32, positive: the unit of the grid at each place.
        nearest: the grid point next to each value, in these units; may overwrite them.
        by_column: (K, K) float32, lower triangular with ones on its diagonal: V, each column by its diagonal.
        by_row: (out, out) alike, of U.

    Returns:
        (out, K) float32, grid points.
    """
    rows, columns = weight.shape
    points, error, moved = (torch.zeros_like(weight) for _ in range(3))  # moved: error V, of what is rounded
    for bottom in range(rows, 0, -TILE):
        top = max(0, bottom - TILE)
        from_rows = by_row[bottom:, top:bottom].t() @ moved[bottom:]
        for right in range(columns, 0, -TILE):
            left = max(0, right - TILE)
            place = slice(top, bottom), slice(left, right)
            tile = _Tile(
                weight[place],
                steps[place],
                by_column[left:right, left:right],
                by_row[top:bottom, top:bottom],
                own=error[top:bottom, right:] @ by_column[right:, left:right],
                others=from_rows[:, left:right],
            )
            points[place], error[place], moved[place] = tile.rounded(nearest)
    return points


class _Tile:
    """A part of a weight that is rounded place by place, those of one antidiagonal at once: none needs another.

    Columns are held from the last to the first, which makes diagonals of the antidiagonals.

    Args:
        own: what the errors of later columns move each place by, in its own row.
        others: the same of later rows.
    """

    def __init__(
        self, weight: Tensor, steps: Tensor, by_column: Tensor, by_row: Tensor, *, own: Tensor, others: Tensor
    ) -> None:
        self._weight, self._steps, self._own, self._others = (t.flip(1) for t in (weight, steps, own, others))
        self._by_column, self._by_row = by_column.tril(-1).flip(0, 1), by_row.tril(-1)

    def rounded(self, nearest: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The points, their errors, and the errors times V."""
        points, error, moved = (torch.empty_like(self._weight) for _ in range(3))
        rows, columns = self._weight.shape
        for offset in range(1 - rows, columns):
            row, column = max(0, -offset), max(0, offset)
            count = min(rows - row, columns - column)
            of_rows, of_columns = slice(row, row + count), slice(column, column + count)
            exact, steps, own, others = (
                t.diagonal(offset) for t in (self._weight, self._steps, self._own, self._others)
            )
            rounded = nearest((exact + own + others) / steps)
            left = exact - rounded * steps
            passed_on = left + own
            for whole, of_diagonal in ((points, rounded), (error, left), (moved, passed_on)):
                whole.diagonal(offset).copy_(of_diagonal)
            self._own[of_rows].addcmul_(left[:, None], self._by_column[of_columns])
            self._others[:, of_columns].addcmul_(self._by_row[of_rows].t(), passed_on)
        return points.flip(1), error.flip(1), moved.flip(1)
