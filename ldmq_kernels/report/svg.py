"""Figures as inline SVG that takes its fonts and colours from the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from importlib import resources

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ldmq_kernels.numerics.formats import SCHEMES

# Colours that stand for the page's CSS variables until the figure is written.
INK, MUTED, LINE, PAPER = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def scheme_colour(scheme: str) -> str:
    """The colour that stands for a scheme's CSS variable until the figure is written."""
    return f"#0102{list(SCHEMES).index(scheme):02x}"


def scheme_variables(*, dark: bool) -> str:
    """CSS that gives each scheme's variable its colour on light or on dark ground."""
    return " ".join(f"--{name}: {scheme.colours[dark]};" for name, scheme in SCHEMES.items())


def standalone(svg: str) -> str:
    """A figure as a file of its own: the page's colours for light ground in place of its variables."""
    page = resources.files("ldmq_kernels.report").joinpath("page.html").read_text(encoding="utf-8")
    light = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+)", page[: page.index("@media")] + scheme_variables(dark=False)))
    svg = re.sub(r"var\((--[\w-]+)\)", lambda found: light[found[1]], svg)
    ground = f'<rect width="100%" height="100%" fill="{light["--paper"]}"/>'
    return re.sub(r"(<svg [^>]*>)", lambda found: found[1] + ground, svg, count=1)


def draw(name: str, width: float, height: float, paint: Callable[[Figure], None]) -> str:
    """Paint a figure of `width` x `height` inches and give it as an `<svg>` element.

    Args:
        name: makes the element's internal ids its own within the page, and the same in every run.
    """
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        paint(figure)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r'<svg role="img" \1', svg)
    for colour, variable in (_VARIABLES | {scheme_colour(name): f"--{name}" for name in SCHEMES}).items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def plain_axes(axes: Axes) -> None:
    """No frame, on the page's own ground."""
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_visible(False)
