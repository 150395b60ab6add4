"""The Pareto front of plans: the highest SQNR for each size, or each time, as predicted and as measured by a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ldmq_kernels.planning.assignment import Assignment
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

    def cost(assignment: Assignment) -> float:
        return float(assignment.bytes) if axis == "bytes" else rest + assignment.milliseconds

    least = chooser.least(axis)
    most = cost(chooser.best(Target(layers=len(chooser.table.options))))
    budgets = np.linspace(least, most, points)
    # a budget is not below what the smallest assignment takes, whatever its last digit
    targets = [_target(axis, max(float(np.nextafter(budget, np.inf)), least)) for budget in budgets]
    assignments = [chooser.choose(target) for target in targets]
    unlikely = _dominated([cost(a) for a in assignments], [a.sum_db for a in assignments])
    likely = [(t, a) for t, a, beaten in zip(targets, assignments, unlikely, strict=True) if not beaten]
    measured = []
    for target, assignment in track(likely, "plans of the Pareto front", len(likely), show=show):
        run = session.verified(assignment)
        result = session.result(run, target)
        measured.append(ParetoPoint(result, cost(assignment), result.predicted_db, run.db))
    beaten = _dominated([p.cost for p in measured], [p.measured_db for p in measured])
    return [
        ParetoPoint(p.result, p.cost, p.predicted_db, p.measured_db, is_beaten)
        for p, is_beaten in zip(measured, beaten, strict=True)
    ]
