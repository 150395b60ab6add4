"""The parts of the page as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.conversion.summary import Summary
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.planning.drawn import spread_in_words
from ldmq_kernels.planning.pareto import ParetoPoint
from ldmq_kernels.planning.session import PlanResult
from ldmq_kernels.planning.target import MEASURES, Target
from ldmq_kernels.report.measure import IDENTICAL_DB, PicturePairs, Timing
from ldmq_kernels.report.pareto import pareto_figure
from ldmq_kernels.report.rows import LayerRow
from ldmq_kernels.sensitivity.analysis import Analysis

LARGEST_PICTURE = 384  # pixels; larger ones are shown smaller anyway, and would make the file heavy
DIFFERENCE_GAIN = 16


def section(title: str, text: str, *parts: str) -> str:
    """A heading, a paragraph and what follows."""
    return f"<section><h2>{escape(title)}</h2><p class=lead>{escape(text)}</p>{''.join(parts)}</section>"


def chart(svg: str, caption: str) -> str:
    """A figure with its caption."""
    return f"<figure class=chart>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def chip(scheme: str) -> str:
    """A scheme's name with its colour."""
    return f'<span class=chip style="--c: var(--{scheme})">{scheme}</span>'


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB"


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


# -- pictures ------------------------------------------------------------------------------------------


def _png(picture: Tensor) -> str:
    levels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(levels))
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def pictures(pairs: PicturePairs) -> str:
    """Float, quantized and their difference side by side."""
    cards = []
    for prompt, seed, before, after, db in zip(
        pairs.prompts, pairs.seeds, pairs.before, pairs.after, pairs.psnr_db, strict=True
    ):
        difference = (after - before).abs() * DIFFERENCE_GAIN
        row = "".join(
            f'<img alt="{what}: {escape(prompt, quote=True)}" src="{_png(picture)}">'
            for what, picture in (("float", before), ("quantized", after), ("difference", difference))
        )
        measure = "identical" if db >= IDENTICAL_DB else f"{db:.1f} dB"
        cards.append(
            f"<figure><div class=row>{row}</div><figcaption>{escape(prompt)}"
            f"<i>{measure}, seed {seed}</i></figcaption></figure>"
        )
    return section(
        "The same pictures",
        "Each row is drawn from one seed: by the float model, by the quantized one, and the difference of the two, "
        f"{DIFFERENCE_GAIN} times as strong. The figure beside the caption is the PSNR of the pair.",
        f"<div class=pictures>{''.join(cards)}</div>",
    )


# -- the plan ------------------------------------------------------------------------------------------


Bar = tuple[str, list[tuple[str, float]], str]


def _bars(rows: Iterable[Bar]) -> str:
    """Label, (colour, share) pieces and value of each bar; an empty label makes a gap."""
    lines = []
    for label, pieces, value in rows:
        if not label:
            lines.append("<hr>")
            continue
        inner = "".join(f'<i style="width: {100 * share:.3f}%; background: {colour}"></i>' for colour, share in pieces)
        lines.append(
            f"<span>{escape(label)}</span><div class=bar>{inner}</div><span class=value>{escape(value)}</span>"
        )
    return f"<div class=bars>{''.join(lines)}</div>"


def _size_bars(summary: Summary) -> list[Bar]:
    full = summary.bytes_before
    after = [(f"var(--{name})", share.bytes_after / full) for name, share in summary.schemes.items()]
    other = ("var(--muted)", summary.other_bytes / full)
    return [
        ("weights in fp16", [("var(--fp16)", 1 - other[1]), other], megabytes(full)),
        (
            "after the plan",
            [*after, other],
            f"{megabytes(summary.bytes_after)}  ({summary.bytes_after / full:.3f}x)",
        ),
    ]


def _time_bars(timing: Timing) -> list[Bar]:
    longest = max(timing.before, timing.after)
    return [
        ("", [], ""),
        (f"{timing.what}, float", [("var(--fp16)", timing.before / longest)], seconds(timing.before)),
        (
            f"{timing.what}, quantized",
            [("var(--accent)", timing.after / longest)],
            f"{seconds(timing.after)}  ({timing.speedup:.2f}x as fast)",
        ),
    ]


def plan(result: PlanResult, summary: Summary, timings: Sequence[Timing]) -> str:
    """The schemes of the plan, how large and how fast the model is before and after."""
    asked = Target(**result.plan.target)
    measured = result.plan.measured
    kept = next(measure for measure in MEASURES if f"predicted_{measure}_db" in measured)
    drawn, within = spread_in_words(measured), measured.get(f"predicted_{kept}_db_within")
    expected = f"{measured[f'predicted_{kept}_db']:.1f} dB"
    if within is not None:
        expected += f" in the mean (95 % interval of other pictures: within {within:.1f} dB)"
    rows = "".join(
        f"<tr><td>{chip(name)}</td><td class=n>{share.convolutions}</td><td class=n>{share.linears}</td>"
        f"<td class=n>{megabytes(share.bytes_before)}</td><td class=n>{megabytes(share.bytes_after)}</td></tr>"
        for name, share in summary.schemes.items()
    )
    rows += (
        f"<tr><td>biases, norms, other</td><td></td><td></td><td class=n>{megabytes(summary.other_bytes)}</td>"
        f"<td class=n>{megabytes(summary.other_bytes)}</td></tr>"
    )
    table = (
        "<table class=plain><thead><tr><th>scheme<th class=n>convolutions<th class=n>linears<th class=n>in fp16"
        f"<th class=n>after</tr></thead><tbody>{rows}</tbody></table>"
    )
    return section(
        "What the plan chose",
        f"Asked for {asked}, it expected {expected} and reaches "
        f"{measured[f'held_out_{kept}_db']:.1f} dB on prompts and seeds that it had not seen{drawn}. "
        f"{summary.quantized_convolutions} of {summary.convolutions} convolutions and {summary.quantized_linears} of "
        f"{summary.linears} linears are quantized; {FLOAT} stands for a layer that stays as it was.",
        _bars([*_size_bars(summary), *(bar for timing in timings for bar in _time_bars(timing))]),
        table,
    )


def pareto(points: Sequence[ParetoPoint]) -> str:
    """Plans of all sizes."""
    beaten = sum(point.dominated for point in points)
    remark = f" {beaten} of them turned out worse than another one." if beaten else ""
    return section(
        "Smaller and larger plans",
        f"{len(points)} plans from the smallest that the formats allow up to the least noisy one, each run on prompts "
        f"and seeds that it was not made from.{remark}",
        chart(
            pareto_figure(points),
            "What each size has at best. Dashed: predicted from the noise of single layers, corrected by one run "
            "along the calibration's own prompts. A plan without any noise is left out.",
        ),
    )


def without_plan(why: str) -> str:
    """The section that says why there is no plan."""
    return section("No plan", why)


# -- every layer ---------------------------------------------------------------------------------------


def _layer(row: LayerRow, schemes: Sequence[str]) -> str:
    numbers = "".join(
        f"<td class=n>{row.sqnr_db[s]:.1f}</td>" if s in row.sqnr_db else "<td class=n>&ndash;</td>" for s in schemes
    )
    name = escape(row.name).replace(".", ".<wbr>")
    scheme = "" if row.scheme is None else f"<td>{chip(row.scheme)}</td>"
    searched = "" if row.scheme is None else f"<td>{escape(row.search.get(row.scheme, ''))}</td>"
    after = (
        "" if row.bytes_after is None else f'<td class=n data-v="{row.bytes_after}">{row.bytes_after / 1e3:.1f}</td>'
    )
    why = "" if row.scheme is None else f"<td class=why>{escape(row.reason)}</td>"
    return (
        f"<tr><td class=name>{name}</td><td>{row.kind} {'x'.join(map(str, row.shape))}</td>"
        f"{scheme}{numbers}<td class=n>{row.drift:.2f}x</td>{searched}{after}{why}</tr>"
    )


def layers(rows: Sequence[LayerRow], schemes: Sequence[str]) -> str:
    """Every layer in a table that can be sorted and searched."""
    planned = any(row.scheme is not None for row in rows)
    heads = ["<th>layer", "<th>weight"]
    heads += ["<th>chosen"] if planned else []
    heads += [f"<th class=n>{scheme}" for scheme in schemes] + ["<th class=n>drift"]
    heads += ["<th>search", "<th class=n>kB", "<th>why"] if planned else []
    body = "".join(_layer(row, schemes) for row in rows)
    return section(
        "Every layer",
        "Under each scheme: SQNR at the UNet's output in dB, with this layer alone quantized. Drift: how many times "
        "larger its input gets than at the first step. Click a heading to sort.",
        '<div class=tools><input type=search id=find placeholder="Search: attn2 static, conv, w8a16 ..." '
        f'aria-label="Search layers"><span class=note id=find-count>{len(rows)} layers</span></div>',
        f"<div class=scroll><table class=sortable data-search=find><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>",
    )


def footer(analysis: Analysis, notes: Sequence[str]) -> str:
    """The meaning of the figures, and where they were measured."""
    calibration = analysis.calibration
    analysed = ", ".join(str(step + 1) for step in analysis.steps)
    lines = [
        "SQNR = 10 log10(sum of squares of the float output / sum of squares of the error), over all elements of the "
        "batch, guidance halves pooled, along the float trajectory. A target in dB is the mean over sampling steps.",
        f"Calibrated on {_drawn(calibration)} ({calibration.mode} scales), "
        f"{'; and with '.join(_settings(calibration, one) for one in calibration.settings)}; noise measured at steps "
        f"{analysed}.",
        *notes,
    ]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _settings(calibration: Calibration, settings: SamplingSettings) -> str:
    guidance = "" if settings.guidance_scale is None else f"guidance {settings.guidance_scale:g}, "
    scheduler = "" if settings.scheduler is None else f"{settings.scheduler}, "
    steps = settings.num_inference_steps or calibration.trajectory.steps
    return f"{steps} steps, {guidance}{scheduler}seeds from {settings.seed}"


def _drawn(calibration: Calibration) -> str:
    of_prompts = all(isinstance(call, str) for call in calibration.calls)
    return f"{len(calibration.calls)} {'prompts' if of_prompts else 'calls of the pipeline'}"
