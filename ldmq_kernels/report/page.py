"""One HTML file with everything inside: pictures, figures, what the plan chose, bytes and times.

It needs no network, follows the reader's light or dark setting, and is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from torch import nn

from ldmq_kernels.conversion.summary import Summary
from ldmq_kernels.files import write_whole
from ldmq_kernels.planning.pareto import ParetoPoint
from ldmq_kernels.planning.session import PlanResult
from ldmq_kernels.report import figures, sections
from ldmq_kernels.report.measure import PicturePairs, Timing
from ldmq_kernels.report.rows import layer_rows, schemes_of
from ldmq_kernels.report.svg import scheme_variables
from ldmq_kernels.sensitivity.analysis import Analysis


@dataclass(frozen=True)
class Fact:
    """One of the figures at the top: "0.53x" and "bytes of UNet weights, of fp16"."""

    value: str
    meaning: str


@dataclass(frozen=True)
class Report:
    """The content of the page. Without `result` there is no plan, and `no_plan` says why.

    Attributes:
        lead: the sentence under the title.
        summary: what the plan quantizes, and the bytes; with `result`.
        pareto: plans of all sizes, where they were asked for.
        notes: lines at the foot, such as the machine and the versions.
    """

    title: str
    lead: str
    analysis: Analysis
    result: PlanResult | None = None
    summary: Summary | None = None
    no_plan: str = ""
    facts: Sequence[Fact] = ()
    pictures: PicturePairs | None = None
    timings: Sequence[Timing] = ()
    pareto: Sequence[ParetoPoint] = ()
    notes: Sequence[str] = field(default_factory=list)


def render(model: nn.Module, report: Report) -> str:
    """The page as text; `model` is the analysed one, float or quantized."""
    plan = None if report.result is None else report.result.plan
    schemes = schemes_of(report.analysis)
    rows = layer_rows(model, report.analysis, plan)
    parts = []
    if report.pictures is not None:
        parts.append(sections.pictures(report.pictures))
    if report.result is not None and report.summary is not None:
        parts.append(sections.plan(report.result, report.summary, report.timings))
    else:
        parts.append(sections.without_plan(report.no_plan))
    if report.pareto:
        parts.append(sections.pareto(report.pareto))
    parts.append(_noise(report, rows, schemes))
    parts.append(_steps(report, schemes))
    parts.append(sections.layers(rows, schemes))
    page = Template(resources.files("ldmq_kernels.report").joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(report.title),
        light_schemes=scheme_variables(dark=False),
        dark_schemes=scheme_variables(dark=True),
        lead=escape(report.lead),
        facts="".join(
            f"<div class=fact><b>{escape(f.value)}</b><span>{escape(f.meaning)}</span></div>" for f in report.facts
        ),
        sections="\n".join(parts),
        footer=sections.footer(report.analysis, report.notes),
    )


def write_report(path: Path, model: nn.Module, report: Report) -> None:
    """Write the page.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing half-written is left.
    """
    write_whole(path, render(model, report).encode())


def _noise(report: Report, rows: list, schemes: list[str]) -> str:
    dots = " The dot is what the plan chose; a column without one stays in fp16." if report.result else ""
    return sections.section(
        "Where the noise comes from",
        "Each layer, and then each block, is quantized alone while all others stay in floating point, and the UNet's "
        "output is compared with the exact one. Low SQNR (red) means that quantizing here shows at the output.",
        sections.chart(
            figures.layer_heatmap(rows, schemes),
            f"Every layer from the input (left) to the output (right), in each scheme.{dots}",
        ),
        sections.chart(
            figures.block_figure(report.analysis, schemes),
            "Every block with all of its layers quantized together: the mean over steps, and step by step.",
        ),
    )


def _steps(report: Report, schemes: list[str]) -> str:
    held_out = None if report.result is None else report.result.held_out
    target = None if report.result is None else report.result.plan.target.get("sqnr_db")
    return sections.section(
        "Over the sampling steps",
        "Sampling begins with pure noise and ends with the picture. What is calibrated on the first step must hold "
        "for all of them; layers whose inputs grow later are the ones that gain from dynamic scales.",
        sections.chart(
            figures.step_lines(report.analysis, schemes, held_out, target),
            "SQNR of the UNet's output at each step. Dashed: all layers in one scheme, predicted by adding up the "
            "noise of each layer alone."
            + (" Solid: the plan, measured on prompts and seeds that it was not made from." if held_out else ""),
        ),
        sections.chart(
            figures.drift_lines(report.analysis),
            "The largest input of each layer at each step, relative to the first step (the line at 1). Above the line, "
            "a scale that was calibrated on the first step alone clips. The layers that grow most are named.",
        ),
    )
