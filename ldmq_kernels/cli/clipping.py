"""`ldmq check`: which ranges of a plan clip at other settings, what that costs, and a plan without them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmq_kernels.calibration.clipping import Clipping, observe_clipping, unclip
from ldmq_kernels.calibration.denoisers import chosen, denoiser
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.settings import SamplingSettings, recorded
from ldmq_kernels.cli.fitted import Column, output_console, print_fitted, say
from ldmq_kernels.cli.models import Loading, load_pipeline
from ldmq_kernels.conversion.hessian import RecordedHessians
from ldmq_kernels.files import printable
from ldmq_kernels.planning.evaluate import measure_plan
from ldmq_kernels.planning.session import mean_db
from ldmq_kernels.plans.plan import Plan, plan_output
from ldmq_kernels.sensitivity.output_noise import by_setting


def run_check(
    model: Path,
    plan_file: Path,
    drawn: Sequence[Call],
    settings: Sequence[SamplingSettings],
    out: Path | None,
    how: Loading,
) -> None:
    """Print what clips, and the SQNR of the plan at each setting; with `out`, write the mended plan, measured too."""
    plan = Plan.load(plan_file)
    with contextlib.nullcontext() if out is None else plan_output(out) as write:
        pipe = load_pipeline(model, how)
        found = observe_clipping(pipe, plan, drawn, settings, show=True)
        _print(found)
        mended = unclip(plan, found)
        entries = [recorded(one) for one in found.settings]
        before, after = (_decibels(pipe, one, found) for one in (plan, mended))
        for entry, clipped, unclipped in zip(entries, before, after, strict=True):
            words = ", ".join(f"{name} {value}" for name, value in entry.items() if value is not None)
            say(f"SQNR at {words}: {clipped:.2f} dB, without clipping {unclipped:.2f} dB")
        if write is not None and out is not None:
            by_settings = [e | {"sqnr_db": round(db, 3)} for e, db in zip(entries, after, strict=True)]
            mended.measured = {"by_settings": by_settings}
            write(mended)
            say(f"written to {printable(out)}")


def _decibels(pipe: Any, plan: Plan, found: Clipping) -> list[float]:
    """SQNR of the UNet's output at each setting, along the float trajectory."""
    planned = chosen(pipe, plan.model.get("part"))
    hessians = RecordedHessians(planned, plan, show=True) if plan.needs_inputs else None
    noise = measure_plan(denoiser(planned), plan, found.trajectory, hessians)
    return [mean_db(one) for one in by_setting(noise, len(found.settings))]


def _print(found: Clipping) -> None:
    """The layers that clip, the one that loses most first."""
    columns = [
        Column("layer", is_number=False, wraps=True),
        Column("scheme", 3, is_number=False),
        Column("values beyond", 1),
        Column("largest", 2),
        Column("SQNR of the input, dB", 4),
        Column("lost, dB"),
    ]
    rows = []
    for one in found.clipped:
        figures = f"{one.share:.3%}", f"{max(one.largest):.2f}x", f"{one.sqnr_db:.1f}", f"{one.lost_db:.1f}"
        rows.append((one.layer, one.scheme, *figures))
    title = f"{len(rows)} of {len(found.layers)} layers with calibrated ranges clip"
    if rows:
        print_fitted(output_console(), title, columns, rows)
    else:
        say(title)
