"""The figures of the page: where the noise is, by layer, block and sampling step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.numerics.sqnr import to_db
from ldmq_kernels.report.rows import LayerRow
from ldmq_kernels.report.stages import Stage, stages
from ldmq_kernels.report.svg import INK, LINE, MUTED, PAPER, draw, plain_axes, scheme_colour
from ldmq_kernels.sensitivity.analysis import Analysis
from ldmq_kernels.sensitivity.output_noise import StepNoise, finite_db

NOISE_MAP = LinearSegmentedColormap.from_list(
    "noise", ["#a8322a", "#dd7a4a", "#f1c88f", "#f2ead2", "#a9d0c4", "#4d9a99", "#22606b"]
)
NAMED_LINES = 5
MANYFOLD = 4.0
LETTER = 0.0075  # of the width of the map of all layers: what a letter below it takes
WIDTH = 11.0


def _range(values: np.ndarray) -> Normalize:
    """From the noisiest to where it no longer matters; the cleanest few must not stretch the scale."""
    finite = values[np.isfinite(values)]
    return Normalize(float(finite.min()), float(max(np.quantile(finite, 0.95), finite.min() + 1)))


def layer_heatmap(rows: Sequence[LayerRow], schemes: Sequence[str]) -> str:
    """SQNR at the output of every layer alone, layers left to right, schemes top to bottom, with the plan dotted."""
    values = np.array([[row.sqnr_db.get(scheme, np.nan) for row in rows] for scheme in schemes])
    parts = stages([row.name for row in rows])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        plain_axes(axes)
        image = axes.imshow(values, aspect="auto", interpolation="none", cmap=NOISE_MAP, norm=_range(values))
        axes.set_yticks(range(len(schemes)), schemes, color=INK)
        _name_stages(axes, parts, len(schemes))
        for row in range(1, len(schemes)):
            axes.axhline(row - 0.5, color=PAPER, linewidth=2)
        chosen = [(x, schemes.index(row.scheme)) for x, row in enumerate(rows) if row.scheme in schemes]
        if chosen:
            size = float(np.clip(400 / len(rows), 0.6, 3.2))
            axes.plot(
                *zip(*chosen, strict=True),
                "o",
                color="#16242b",
                markersize=size,
                markeredgecolor="#ffffff",
                markeredgewidth=0.4,
            )
        axes.set_ylim(len(schemes) - 0.5, -0.5)
        bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=12, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label("SQNR, dB")

    lists = any(stage.is_entry for stage in parts)
    return draw("layers", WIDTH, 0.9 + 0.42 * len(schemes) + (0.2 if lists else 0), paint)


def _name_stages(axes: Axes, parts: Sequence[Stage], schemes: int) -> None:
    """A line and a label below each stage that is wide enough; the name of a list of blocks below their numbers."""
    letter = LETTER * parts[-1].end
    named = [s for s in parts if s.is_entry or s.end - s.start >= letter * len(s.label)]
    axes.set_xticks([(stage.start + stage.end - 1) / 2 for stage in named], [stage.label for stage in named])
    axes.tick_params(axis="x", pad=9)
    for stage in named:
        ends = [stage.start - 0.35, stage.end - 0.65]
        axes.plot(ends, [schemes - 0.42] * 2, color=MUTED, linewidth=1, clip_on=False)
    for (part, together), members in groupby((s for s in parts if s.is_entry), lambda s: (s.part, s.together)):
        each = list(members)
        words = part if together == 1 else f"{part}, {together} in one"
        axes.annotate(
            words,
            ((each[0].start + each[-1].end - 1) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -27),
            textcoords="offset points",
            ha="center",
            va="top",
            color=MUTED,
            annotation_clip=False,
        )


def block_figure(analysis: Analysis, schemes: Sequence[str]) -> str:
    """SQNR at the output of each block alone: mean as dots, and every analysed step as numbers."""
    names = list(dict.fromkeys(name for name, _ in analysis.blocks))
    steps = analysis.steps
    lead = schemes[0]

    def paint(figure: Figure) -> None:
        axes, table = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        _block_dots(axes, analysis, names, schemes)
        _block_steps(table, analysis, names, steps, lead)

    return draw("blocks", WIDTH, 1.3 + 0.25 * len(names), paint)


def _block_dots(axes: Axes, analysis: Analysis, names: list[str], schemes: Sequence[str]) -> None:
    plain_axes(axes)
    for scheme in schemes:
        points = [
            (finite_db(analysis.blocks[name, scheme].mean_power), y)
            for y, name in enumerate(names)
            if (name, scheme) in analysis.blocks
        ]
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o", color=scheme_colour(scheme), markersize=6, markeredgewidth=0, label=scheme)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="both")
    axes.set_axisbelow(True)
    axes.set_xlabel("SQNR at the output, dB, mean noise over steps")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(schemes), handletextpad=0.2, columnspacing=1.2)


def _block_steps(axes: Axes, analysis: Analysis, names: list[str], steps: list[int], scheme: str) -> None:
    plain_axes(axes)
    values = np.full((len(names), len(steps)), np.nan)
    for y, name in enumerate(names):
        noise = analysis.blocks.get((name, scheme))
        if noise is not None:
            values[y] = [finite_db(noise.by_step[step]) for step in steps]
    norm = _range(values)
    axes.imshow(values, aspect="auto", interpolation="none", cmap=NOISE_MAP, norm=norm)
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = norm(value)
            colour = "#ffffff" if shade < 0.16 or shade > 0.8 else "#16242b"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8.5)
    axes.set_xticks(range(len(steps)), [f"step {step + 1}" for step in steps])
    axes.set_title(f"{scheme}, dB by sampling step", color=INK, fontsize=9, loc="left")


def step_lines(analysis: Analysis, schemes: Sequence[str], held_out: StepNoise | None, target_db: float | None) -> str:
    """SQNR at the output by sampling step: each scheme everywhere as predicted, and the plan as measured."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        plain_axes(axes)
        count = analysis.calibration.trajectory.steps
        labels: list[tuple[float, str, str]] = []
        for scheme in schemes:
            noises = [noise for (_, tried), noise in analysis.output.items() if tried == scheme]
            x = [step + 1 for step in analysis.steps]
            y = [to_db(sum(noise.by_step[step] for noise in noises)) for step in analysis.steps]
            axes.plot(x, y, "o--", color=scheme_colour(scheme), linewidth=1.2, markersize=4, markeredgewidth=0)
            labels.append((y[-1], f"{scheme} everywhere, predicted", scheme_colour(scheme)))
        if held_out is not None and held_out.mean_power > 0:
            by_step = held_out.db_by_step
            axes.plot([step + 1 for step in by_step], list(by_step.values()), color=INK, linewidth=2.2)
            labels.append((list(by_step.values())[-1], "the plan, held-out prompts", INK))
        if target_db is not None:
            axes.axhline(target_db, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            labels.append((target_db, f"target, mean over steps: {target_db:g} dB", MUTED))
        _end_labels(axes, labels, count + 0.3)
        axes.set_xlim(0.7, count + 0.2)
        axes.set_xlabel("sampling step, noisiest first")
        axes.set_ylabel("SQNR at the output, dB")
        axes.grid(axis="y")
        axes.set_xticks([x for x in range(1, count + 1) if x == 1 or x % max(1, count // 4) == 0])

    return draw("steps", WIDTH, 3.4, paint)


def _end_labels(axes: Axes, labels: list[tuple[float, str, str]], x: float) -> None:
    """Name lines at their right ends, pushed apart so that no two texts touch."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        low, high = np.log(low), np.log(high)
        labels = [(float(np.log(y)), text, colour) for y, text, colour in labels]
    gap = (high - low) * 0.066
    last = -np.inf
    for y, text, colour in sorted(labels):
        last = max(y, last + gap)
        place = float(np.exp(last)) if axes.get_yscale() == "log" else last
        axes.text(x, place, text, va="center", color=colour, clip_on=False)


def _ratio_axis(axes: Axes, largest: float) -> None:
    """Powers of two where something grows manyfold, plain ratios otherwise."""
    if largest <= MANYFOLD:
        return
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0.25, largest * 1.3)


def drift_lines(analysis: Analysis) -> str:
    """The range of each layer's input by sampling step, relative to the first; the widest movers named."""
    ranges = {name: by_step.amax(1).double() for name, by_step in analysis.calibration.absmax.items()}
    relative = {name: (r / r[0]).numpy() for name, r in ranges.items() if float(r[0]) > 0 and len(r) > 1}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        plain_axes(axes)
        movers = sorted(relative, key=lambda name: -float(relative[name].max()))[:NAMED_LINES]
        for name, line in relative.items():
            if name not in movers:
                axes.plot(range(1, len(line) + 1), line, color=MUTED, linewidth=0.6, alpha=0.35)
        axes.axhline(1, color=INK, linewidth=0.8)
        colours = [scheme_colour(name) for name in SCHEMES if name != str(FLOAT)]
        for name, colour in zip(movers, colours, strict=False):
            axes.plot(range(1, len(relative[name]) + 1), relative[name], color=colour, linewidth=1.8)
        _ratio_axis(axes, max((float(line.max()) for line in relative.values()), default=1.0))
        count = analysis.calibration.trajectory.steps
        labels = [
            (float(relative[name][-1]), f"{name}  {relative[name].max():.2f}x", colour)
            for name, colour in zip(movers, colours, strict=False)
        ]
        _end_labels(axes, labels, count + 0.3)
        axes.set_xlim(0.7, count + 0.2)
        axes.set_xlabel("sampling step, noisiest first")
        axes.set_ylabel("input range / first step's")
        axes.grid(axis="y", color=LINE)
        axes.set_xticks([x for x in range(1, count + 1) if x == 1 or x % max(1, count // 4) == 0])

    return draw("drift", WIDTH, 3.6, paint)
