"""Pareto front: what SQNR each number of bytes, or each time, can have at best, and what it has when it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ldmq_kernels.planning.choice import Choice
from ldmq_kernels.planning.session import PlanResult, Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.progress import track

POINTS = 12

Axis = Literal["bytes", "milliseconds"]


@dataclass(frozen=True)
class ParetoPoint:
    """One plan of a Pareto front.

    Attributes:
        cost: bytes, or milliseconds.
        predicted_db: from the noise of single layers and their interaction along the calibration's trajectory.
        measured_db: of the whole quantized model along the held-out trajectory; 200 dB for no noise at all.
        dominated: whether another point measures at least as many dB at no higher cost.
    """

    result: PlanResult
    cost: float
    predicted_db: float
    measured_db: float
    dominated: bool = False


def _target(axis: Axis, limit: float) -> Target:
    return Target(bytes=int(limit)) if axis == "bytes" else Target(milliseconds=limit)


def _dominated(costs: Sequence[float], dbs: Sequence[float]) -> list[bool]:
    """Whether another point is no worse in both and better in one; of equal points, the first stays."""

    def beats(one: int, other: int) -> bool:
        no_worse = costs[one] <= costs[other] and dbs[one] >= dbs[other]
        return no_worse and ((costs[one], -dbs[one]) != (costs[other], -dbs[other]) or one < other)

    places = range(len(costs))
    return [any(beats(one, other) for one in places if one != other) for other in places]


def pareto_front(
    session: Session, *, axis: Axis = "bytes", points: int = POINTS, show: bool = False
) -> list[ParetoPoint]:
    """Plans from the smallest that the formats allow up to the least noisy one, each run on the held-out trajectory.

    Budgets are spaced evenly. Plans that the prediction already calls dominated are left out; those that turn out
    so when they are run are marked.

    Args:
        session: an analysis with its held-out trajectory; one with times for `axis="milliseconds"`.
        points: at most so many plans, at least 2.

    Raises:
        ValueError: too few points, or milliseconds without times.
    """
    if points < 2:
        raise ValueError(f"a Pareto front of {points} points has no two ends: ask for 2 or more")
    if axis == "milliseconds" and session.times is None:
        raise ValueError("a Pareto front over milliseconds needs the layers' times: give them to the session")
    chooser = session.chooser
    rest = 0.0 if session.times is None else session.times.rest

    def cost(choice: Choice) -> float:
        return float(choice.bytes) if axis == "bytes" else rest + choice.milliseconds

    least = chooser.least(axis)
    most = cost(chooser.best(Target(layers=len(chooser.table.options))))
    budgets = np.linspace(least, most, points)
    # a budget is not below what the smallest choice takes, whatever its last digit
    targets = [_target(axis, max(float(np.nextafter(budget, np.inf)), least)) for budget in budgets]
    choices = [chooser.choose(target) for target in targets]
    unlike = _dominated([cost(c) for c in choices], [c.sum_db for c in choices])
    kept = [(t, c) for t, c, beaten in zip(targets, choices, unlike, strict=True) if not beaten]
    found = []
    for target, choice in track(kept, "plans of the Pareto front", len(kept), show=show):
        run = session.verified(choice)
        result = session.result(run, target)
        found.append(ParetoPoint(result, cost(choice), result.predicted_db, run.db))
    beaten = _dominated([p.cost for p in found], [p.measured_db for p in found])
    return [
        ParetoPoint(p.result, p.cost, p.predicted_db, p.measured_db, is_beaten)
        for p, is_beaten in zip(found, beaten, strict=True)
    ]
