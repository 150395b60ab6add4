"""One option for each layer: a multiple-choice knapsack, solved by SciPy's HiGHS.

Whatever adds up over layers can be a goal or a limit: noise at the UNet's output, bytes, time, operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

RELATIVE_GAP = 1e-4
EQUAL = 1e-3  # relative difference of a goal within which the next goal decides
SECONDS = 20.0
TIME_IS_UP = 1  # a status of SciPy's milp
TOLERANCE = 2e-6  # by which HiGHS may pass a limit
NEGLIGIBLE = 1e-9
TINY = np.finfo(float).tiny

Column = NDArray[np.float64]
Limit = tuple[Column, float]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Take away what C code prints to standard output inside: SciPy's HiGHS has a message that no option stops."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _scaled(column: Column, scale: float) -> Column:
    """The column over the scale, without what is too small for the solver to tell from nothing."""
    scaled = column / scale
    return np.where(scaled < NEGLIGIBLE, 0.0, scaled)


class Infeasible(Exception):
    """No combination of options meets the limits."""


@dataclass(frozen=True)
class Option:
    """The costs of one way to have one layer.

    Attributes:
        noise: relative noise power at the UNet's output, at each analysed step; or in each picture's final latent, or
            each picture's mean squared error.
        milliseconds: time of one call, 0 where no times were measured.
        is_float: whether the layer stays in 16 bit.
        signals: other measures of loss that were asked for, by name.
    """

    layer: str
    scheme: str
    noise: tuple[float, ...]
    bytes: float
    operations: float
    milliseconds: float = 0.0
    is_float: bool = False
    signals: tuple[tuple[str, float], ...] = ()


class Table:
    """Options as columns, one number an option."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.options = list(options)
        self.noise: Column = np.array([o.noise for o in options], dtype=np.float64)
        self.bytes: Column = np.array([o.bytes for o in options], dtype=np.float64)
        self.operations: Column = np.array([o.operations for o in options], dtype=np.float64)
        self.milliseconds: Column = np.array([o.milliseconds for o in options], dtype=np.float64)
        self.is_float: Column = np.array([o.is_float for o in options], dtype=np.float64)
        rows: dict[str, int] = {}
        self.layer = np.array([rows.setdefault(o.layer, len(rows)) for o in options])

    def signal(self, name: str) -> Column:
        """A signal beside noise; 0 where an option has none."""
        return np.array([dict(o.signals).get(name, 0.0) for o in self.options], dtype=np.float64)

    def chosen(self, picked: NDArray[np.intp]) -> dict[str, Option]:
        """Options by layer."""
        return {self.options[i].layer: self.options[i] for i in picked}

    def least(self, *columns: Column) -> NDArray[np.intp]:
        """Each layer's option that is least in the first column, of equal ones in the next."""
        order = np.lexsort((*reversed(columns), self.layer))
        return order[np.unique(self.layer[order], return_index=True)[1]]

    def solve(self, goals: Sequence[Column], limits: Sequence[Limit]) -> NDArray[np.intp]:
        """An option of every layer, least in the first goal; of those within 0.1 % of it, least in the next, and so on.

        Raises:
            Infeasible: no combination meets the limits.
        """
        kept = list(limits)
        for goal in goals:
            picked = self._solve(goal, kept)
            kept.append((goal, float(goal[picked].sum()) * (1 + EQUAL)))
        return picked

    def _solve(self, goal: Column, limits: Sequence[Limit]) -> NDArray[np.intp]:
        picked = self._milp(goal, limits)
        passed = [float(row[picked].sum()) > bound for row, bound in limits]
        if not any(passed):
            return picked
        tighter = [(row, bound * (1 - TOLERANCE * over)) for (row, bound), over in zip(limits, passed, strict=True)]
        return self._milp(goal, tighter)

    def _milp(self, goal: Column, limits: Sequence[Limit]) -> NDArray[np.intp]:
        count = len(self.options)
        one_each = sparse.coo_matrix((np.ones(count), (self.layer, np.arange(count)))).tocsr()
        constraints = [optimize.LinearConstraint(one_each, 1, 1)]
        allowed = np.ones(count, dtype=bool)
        for row, bound in limits:
            allowed &= row <= max(bound, 0.0) * (1 + TOLERANCE)  # an option that passes a limit by itself is out
        for row, bound in limits:
            scale = bound if bound > 0 else max(float(row.max()), TINY)
            scaled = _scaled(np.where(allowed, row, 0.0), scale)
            constraints.append(optimize.LinearConstraint(scaled[None], -np.inf, bound / scale))
        goal = np.where(allowed, goal, 0.0)
        for seconds in (SECONDS, np.inf):  # a process that stood still meanwhile may have found nothing yet
            with _silent():
                result = optimize.milp(
                    _scaled(goal, max(float(goal.max()), TINY)),
                    integrality=np.ones(count),
                    bounds=optimize.Bounds(0, allowed.astype(float)),
                    constraints=constraints,
                    options={"mip_rel_gap": RELATIVE_GAP, "time_limit": seconds},
                )
            if result.x is not None:
                break
            if result.status != TIME_IS_UP:
                raise Infeasible(result.message)
        return np.flatnonzero(result.x > 0.5)
