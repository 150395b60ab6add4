"""A Pareto front holds plans of all sizes, none of which another one beats unless it is marked."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from ldmq_kernels.planning import session as sessions
from ldmq_kernels.planning.pareto import _dominated, pareto_front
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import StepNoise
from python_tests.planning.synthetic import SummedRuns, everything_in
from python_tests.report.analyses import TRIED, made_up_analysis
from python_tests.tiny import tiny_unet

FORMATS = [*TRIED, "fp16"]


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def analysis(unet: nn.Module) -> Analysis:
    return made_up_analysis(unet)


@pytest.fixture
def session(unet: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(sessions, "PlanEvaluator", SummedRuns)
    return Session(unet, analysis, analysis.calibration.trajectory, FORMATS)


def test_the_pareto_front_goes_from_the_smallest_plan_to_float_and_up(session: Session) -> None:
    points = pareto_front(session, points=6)
    costs, dbs = [p.cost for p in points], [p.measured_db for p in points]
    assert costs == sorted(set(costs))
    assert dbs == sorted(set(dbs))
    assert costs[0] == session.chooser.least("bytes")
    assert costs[-1] == points[0].result.plan.measured["weight_bytes_fp16"]
    assert dbs[-1] == 200.0
    assert 4 <= len(points) <= 6
    assert not any(point.dominated for point in points)
    gaps = [b - a for a, b in itertools.pairwise(costs)]
    assert max(gaps) < 1.5 * (costs[-1] - costs[0]) / 5


def test_every_point_is_a_plan_that_was_run_with_its_prediction_beside(session: Session, unet: nn.Module) -> None:
    for point in pareto_front(session, points=5):
        measured = point.result.plan.measured
        assert measured["held_out_sqnr_db"] == pytest.approx(point.measured_db, abs=1e-3)
        assert point.predicted_db == pytest.approx(point.measured_db, abs=0.5)
        assert point.result.plan.target["bytes"] >= measured["weight_bytes"] == point.cost
        assert len(point.result.plan.layers(unet)) == len(session.analysis.candidates)


def test_a_point_that_turns_out_worse_is_marked(
    unet: nn.Module, analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneIsBad(SummedRuns):
        def noise(self, schemes, trajectory):  # type: ignore[no-untyped-def]
            noise = super().noise(schemes, trajectory)
            floats = sum(scheme == "fp16" for scheme in schemes.values())
            spoilt = 0 < floats < len(schemes)
            return StepNoise({step: power * (1e6 if spoilt else 1) for step, power in noise.by_step.items()})

    monkeypatch.setattr(sessions, "PlanEvaluator", OneIsBad)
    points = pareto_front(Session(unet, analysis, analysis.calibration.trajectory, FORMATS), points=6)
    marked = [point for point in points if point.dominated]
    assert marked
    for point in marked:
        assert any(o.cost <= point.cost and o.measured_db >= point.measured_db for o in points if o is not point)
    kept = [point.measured_db for point in points if not point.dominated]
    assert kept == sorted(kept)


def test_a_front_over_time_needs_times_and_keeps_them(session: Session, unet: nn.Module, analysis: Analysis) -> None:
    with pytest.raises(ValueError, match="needs the layers' times"):
        pareto_front(session, axis="milliseconds")
    times = LayerTimes(everything_in(analysis, {"fp16": 2.0, "w8a8-static": 1.0, "w8a8-dynamic": 1.2, "w8a16": 1.9}), 3)
    timed = Session(unet, analysis, analysis.calibration.trajectory, FORMATS, times=times)
    points = pareto_front(timed, axis="milliseconds", points=5)
    layers = len(analysis.candidates)
    assert points[0].cost == pytest.approx(3 + 1.0 * layers)
    assert points[-1].cost == pytest.approx(3 + 2.0 * layers)
    for point in points:
        assert point.cost == pytest.approx(point.result.plan.measured["milliseconds"], abs=1e-3)
        assert point.cost <= point.result.plan.target["milliseconds"] + 1e-9


def test_one_point_is_no_front(session: Session) -> None:
    with pytest.raises(ValueError, match="ask for 2 or more"):
        pareto_front(session, points=1)


def test_domination_by_its_definition() -> None:
    assert _dominated([1, 2, 3, 3], [10, 9, 12, 12]) == [False, True, False, True]
    assert _dominated([1, 1], [5, 6]) == [True, False]
