"""A Pareto front of plans: as a figure, as a section of the page, as a picture of its own and as a table of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldmq_kernels.files import csv_bytes
from ldmq_kernels.planning.assignment import MOST_DB
from ldmq_kernels.planning.pareto import ParetoPoint
from ldmq_kernels.report.svg import INK, MUTED, draw, plain_axes, scheme_colour, standalone

WIDTH, HEIGHT = 11.0, 4.2
ACCENT = scheme_colour("w8a8-dynamic")


def _is_timed(points: Sequence[ParetoPoint]) -> bool:
    """Whether the points are spaced by time."""
    return "milliseconds" in points[0].result.plan.target


def _cost(point: ParetoPoint, timed: bool) -> float:
    """The cost on the axis: milliseconds, or a share of the bytes in 16 bit."""
    return point.cost if timed else point.cost / point.result.plan.measured["weight_bytes_fp16"]


def _paint(axes: Axes, points: Sequence[ParetoPoint]) -> None:
    plain_axes(axes)
    timed = _is_timed(points)
    finite = [point for point in points if point.measured_db < MOST_DB]
    best = [point for point in finite if not point.dominated]
    beaten = [point for point in finite if point.dominated]
    expected = [point for point in finite if point.predicted_db < MOST_DB]
    axes.plot(
        [_cost(p, timed) for p in expected],
        [p.predicted_db for p in expected],
        "--",
        color=MUTED,
        linewidth=1,
        label="predicted before the run",
    )
    axes.plot(
        [_cost(p, timed) for p in best],
        [p.measured_db for p in best],
        "o-",
        color=ACCENT,
        linewidth=1.8,
        markersize=6,
        markeredgewidth=0,
        label="measured on held-out prompts",
    )
    if beaten:
        axes.plot(
            [_cost(p, timed) for p in beaten],
            [p.measured_db for p in beaten],
            "o",
            color=MUTED,
            markersize=5,
            fillstyle="none",
            label="measured, another plan is better",
        )
    for point in best:
        text = f"{point.measured_db:.1f}"
        place = (_cost(point, timed), point.measured_db)
        axes.annotate(text, place, (0, 7), textcoords="offset points", ha="center", color=INK, fontsize=8.5)
    device = points[0].result.plan.measured.get("predicted_for")
    milliseconds = "milliseconds of one UNet call" + (f", predicted for {device}" if device else "")
    axes.set_xlabel(milliseconds if timed else "bytes of the weights, of those in fp16")
    axes.set_ylabel("SQNR at the output, dB")
    axes.margins(y=0.12)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right")


def pareto_figure(points: Sequence[ParetoPoint]) -> str:
    """SQNR against bytes or time as an `<svg>` element: predicted as a dashed line, measured as dots.

    A plan without any noise has no place on it.
    """

    def paint(figure: Figure) -> None:
        _paint(figure.add_subplot(), points)

    return draw("pareto", WIDTH, HEIGHT, paint)


def pareto_picture(points: Sequence[ParetoPoint]) -> str:
    """The figure as the content of an SVG file."""
    return standalone(pareto_figure(points))


def pareto_csv(points: Sequence[ParetoPoint]) -> bytes:
    """A row for each plan, as CSV in UTF-8."""
    is_predicted = any("predicted_milliseconds" in point.result.plan.measured for point in points)
    time = "predicted_milliseconds" if is_predicted else "milliseconds"
    columns = ["plan", "weight_bytes", "weight_bytes_fp16", time, "predicted_db", "measured_db", "dominated"]
    rows = []
    for number, point in enumerate(points, 1):
        measured = point.result.plan.measured
        size = [measured["weight_bytes"], measured["weight_bytes_fp16"], measured.get(time, "")]
        decibels = [f"{point.predicted_db:.3f}", f"{point.measured_db:.3f}"]
        rows.append([number, *size, *decibels, int(point.dominated)])
    return csv_bytes(columns, rows)
