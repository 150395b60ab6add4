"""This package beside SDNQ, torchao, optimum-quanto and nvidia-modelopt: the same UNet, quantized by each, in one run.

Every tool gets all the layers that it can quantize; the table tells how many those are, since a tool that
leaves convolutions in float looks better for that reason alone. After each tool that multiplies in 8 bits
comes this package on exactly the same layers. SQNR is at the UNet's output along the float trajectory,
mean over steps; pictures are compared with the float pipeline's at the same seeds. The captions measured on
are held out: calibration and planning see others, the demo's. In float16 on a GPU, in float32 on a CPU.

    pip install --no-deps -r benchmarks/requirements-rivals.txt
    python benchmarks/rivals.py [MODEL]

On a CPU, SDNQ compiles for about a minute before its first picture; SDNQ_USE_TORCH_COMPILE=0 keeps it from that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import common
from benchmarks.exam import Exam, Workbench, prepare
from benchmarks.rivals_measure import Anatomy, anatomy
from benchmarks.rivals_tools import OURS, Contender, own_beside, own_planned, own_uniform, rivals
from benchmarks.samples import Samples, measures_of, value

COLUMNS = ("convolutions", "linears", "MB", "of fp16", "SQNR dB", "PSNR dB", "SSIM", "attributes")
NOT_INSTALLED = "not installed: pip install --no-deps -r benchmarks/requirements-rivals.txt"


@dataclass
class Measured:
    """A row of the table; `failed` says why there are no figures."""

    tool: str
    configuration: str
    note: str = ""
    version: str | None = None
    failed: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def figures(exam: Exam, seen: Anatomy, samples: Samples) -> dict[str, Any]:
    """All that is measured of one quantized UNet, but time."""
    with np.errstate(divide="ignore"):
        each_db = -10 * np.log10(samples.arrays["squared_error"])
    by_step = samples.arrays["output_signal"].sum((0, 1)) / samples.arrays["output_noise"].sum((0, 1))
    return {
        "convolutions": asdict(seen.counts["conv2d"]),
        "linears": asdict(seen.counts["linear"]),
        "bytes": seen.bytes,
        "share_of_fp16": seen.bytes / exam.fp16_bytes,
        **{name: value(samples, measure) for name, measure in measures_of(samples).items()},
        "sqnr_db_by_step": (10 * np.log10(by_step)).tolist(),
        "psnr_db_mean_of_pictures": statistics.mean(each_db.ravel().tolist()),
    }


def examine(
    contender: Contender, bench: Workbench, exam: Exam, models: dict[str, nn.Module]
) -> tuple[Measured, Anatomy | None]:
    """Build and measure one contender; one that is missing or fails becomes a row that says why."""
    row = Measured(contender.tool, contender.configuration, contender.note)
    try:
        row.version = contender.version
        model = contender.build(bench)
        seen = anatomy(model, exam.original, exam.call)
        row.figures = figures(exam, seen, exam.sit(model))
    except importlib.metadata.PackageNotFoundError:
        row.failed = NOT_INSTALLED
        return row, None
    except Exception as error:  # a rival may fail in any way, and its row says how
        row.failed = f"{type(error).__name__}: {error}"
        return row, None
    models[f"{row.tool}: {row.configuration}"] = model
    return row, seen


def run(bench: Workbench, exam: Exam, console: Console) -> list[Measured]:
    """Measure all contenders one after the other, then time them in turns."""
    models: dict[str, nn.Module] = {"float": exam.original}
    rows: list[Measured] = []

    def add(contender: Contender) -> Anatomy | None:
        row, seen = examine(contender, bench, exam, models)
        rows.append(row)
        told = row.failed or "{sqnr_db:.2f} dB at the output, pictures {psnr_db:.2f} dB".format(**row.figures)
        console.print(f"{row.tool}, {row.configuration}: {told}", soft_wrap=True)
        return seen

    for rival in rivals():
        seen = add(rival)
        if seen is not None and seen.computed:
            add(own_beside(rival, seen.stored, seen.computed))
    for contender in (*own_uniform(), *own_planned()):
        add(contender)

    @torch.no_grad()
    def once(model: nn.Module) -> None:
        model(*exam.call.args, **exam.call.kwargs)

    calls: dict[str, Callable[[], Any]] = {name: partial(once, model) for name, model in models.items()}
    times = common.interleaved_ms(calls)
    for row in rows:
        if row.failed is None:
            row.figures["ms"] = times[f"{row.tool}: {row.configuration}"]
    whole = {"bytes": exam.fp16_bytes, "share_of_fp16": 1.0, **exam.float_figures}
    return [Measured("float", "", figures=whole | {"ms": times["float"]}), *rows]


def as_table(rows: list[Measured], batch: int) -> Table:
    """The rows for a terminal; of the layers, those with 8-bit weights and of these those that multiply in 8 bits."""
    table = Table(title="layers: with 8-bit weights / multiplying in 8 bits / all")
    table.add_column("tool")
    table.add_column("configuration")
    for column in (*COLUMNS, f"ms, batch {batch}"):
        table.add_column(column, justify="right")

    def number(figures: dict[str, Any], key: str, form: str, factor: float = 1.0) -> str:
        value = figures.get(key)
        return "" if value is None else format(value * factor, form)

    def layers(counts: dict[str, int] | None) -> str:
        return f"{counts['stored']} / {counts['computed']} / {counts['all']}" if counts else ""

    for row in rows:
        name = f"{row.tool} {row.version}" if row.version and row.tool != OURS else row.tool
        if row.failed is not None:
            table.add_row(name, row.configuration, "[red]failed[/red]")
            continue
        figures = row.figures
        table.add_row(
            name,
            f"{row.configuration} ({row.note})" if row.note else row.configuration,
            layers(figures.get("convolutions")),
            layers(figures.get("linears")),
            number(figures, "bytes", ".2f", 1e-6),
            number(figures, "share_of_fp16", ".3f"),
            number(figures, "sqnr_db", ".2f"),
            number(figures, "psnr_db", ".2f"),
            number(figures, "ssim", ".4f"),
            number(figures, "attribute_accuracy", ".1%"),
            number(figures, "ms", ".1f"),
        )
    return table


def summary(rows: list[Measured]) -> dict[str, float | None]:
    """The figures that the package is held to."""
    measured = {(row.tool, row.configuration): row.figures for row in rows}

    def figure(tool: str, configuration: str, key: str) -> float | None:
        return measured.get((tool, configuration), {}).get(key)

    sdnq = figure("sdnq", "w8a8 dynamic, everywhere", "sqnr_db")
    beside = figure(OURS, "w8a8 dynamic, layers of sdnq w8a8 dynamic, everywhere", "sqnr_db")
    return {
        "weights/w8_share_of_fp16": figure(OURS, "w8a8 dynamic", "share_of_fp16"),
        "w8a8_dynamic/sqnr_db": figure(OURS, "w8a8 dynamic", "sqnr_db"),
        "sdnq/sqnr_db": sdnq,
        "same_layers/sqnr_db_above_sdnq": None if sdnq is None or beside is None else beside - sdnq,
    }


def main() -> None:
    """Run, print the table and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="a StableDiffusionPipeline folder; without: the demo model")
    parser.add_argument("--captions", type=int, default=32, help="held-out captions to draw; eights keep batches equal")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    bench, exam = prepare(arguments.model, captions=arguments.captions, show=console.is_terminal)
    rows = run(bench, exam, console)
    batch = exam.call.output.shape[0]
    Console(width=None if sys.stdout.isatty() else 190).print(as_table(rows, batch))
    for row in rows:
        if row.failed is not None:
            print(f"{row.tool}, {row.configuration}: {row.failed}")
    records = [{"op": "unet", "captions": len(exam.captions), "batch": batch, **asdict(row)} for row in rows]
    print(f"written: {common.write_results('rivals', records, summary(rows))}")


if __name__ == "__main__":
    main()
