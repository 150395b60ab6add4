"""One choice for each layer: a multiple-choice knapsack, solved by SciPy's HiGHS.

Relative noise powers at the UNet's output add, and so do bytes and operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse

RELATIVE_GAP = 1e-3
SECONDS = 20.0


class Infeasible(Exception):
    """No combination of choices meets the limits."""


@dataclass(frozen=True)
class Option:
    """One choice of one layer: its costs."""

    layer: str
    scheme: str
    noise: float
    bytes: float
    operations: float


def _solve(options: list[Option], goal: np.ndarray, limits: list[tuple[np.ndarray, float]]) -> np.ndarray:
    layers = {name: row for row, name in enumerate(dict.fromkeys(o.layer for o in options))}
    rows = [layers[o.layer] for o in options]
    one_each = sparse.coo_matrix((np.ones(len(options)), (rows, range(len(options)))))
    constraints = [optimize.LinearConstraint(one_each.tocsr(), 1, 1)]
    constraints += [optimize.LinearConstraint(row[None] / bound, -np.inf, 1.0) for row, bound in limits]
    scale = max(float(goal.max()), np.finfo(float).tiny)
    result = optimize.milp(
        goal / scale,
        integrality=np.ones(len(options)),
        bounds=optimize.Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        raise Infeasible(result.message)
    return np.flatnonzero(result.x > 0.5)


def _chosen(options: list[Option], picked: np.ndarray) -> dict[str, Option]:
    return {options[i].layer: options[i] for i in picked}


def _columns(options: list[Option]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array([(o.noise, o.bytes, o.operations) for o in options], dtype=np.float64)
    return table[:, 0], table[:, 1], table[:, 2]


def fewest_bytes(options: list[Option], noise_limit: float) -> dict[str, Option]:
    """The choice of fewest bytes within a noise power; of equal ones, the one of least operations.

    Raises:
        Infeasible: even the least noisy choice is above the limit.
    """
    noise, size, operations = _columns(options)
    limits = [(noise, noise_limit)]
    smallest = _solve(options, size, limits)
    bound = float(size[smallest].sum()) * (1 + RELATIVE_GAP)
    return _chosen(options, _solve(options, operations, [*limits, (size, bound)]))


def least_noise(options: list[Option], byte_limit: float) -> dict[str, Option]:
    """The choice of least noise within a number of bytes.

    Raises:
        Infeasible: even the smallest choice is above the limit.
    """
    noise, size, _ = _columns(options)
    return _chosen(options, _solve(options, noise, [(size, byte_limit)]))


def smallest_bytes(options: list[Option]) -> float:
    """Bytes of the smallest choice of all."""
    best: dict[str, float] = {}
    for option in options:
        best[option.layer] = min(best.get(option.layer, np.inf), option.bytes)
    return sum(best.values())


def smallest_noise(options: list[Option]) -> float:
    """Noise power of the least noisy choice of all."""
    best: dict[str, float] = {}
    for option in options:
        best[option.layer] = min(best.get(option.layer, np.inf), option.noise)
    return sum(best.values())
