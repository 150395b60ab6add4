"""This package beside SDNQ, torchao and optimum-quanto: the same UNet, quantized by each, in one run.

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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import common
from benchmarks.rivals_measure import Anatomy, anatomy, checkpoint_bytes, ssim
from benchmarks.rivals_tools import OURS, Contender, Workbench, own_beside, own_planned, own_uniform, rivals
from ldmq_kernels import demo
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.trajectory import SamplingSettings, Trajectory, denoiser, record_trajectory
from ldmq_kernels.demo import scenes
from ldmq_kernels.demo.evaluator import Evaluator, attribute_accuracy
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, GUIDANCE, STEPS, calibration_captions, held_out_captions
from ldmq_kernels.planning.planner import HELD_OUT_SEED, split_prompts
from ldmq_kernels.report.measure import PicturePairs, draw_pictures
from ldmq_kernels.sensitivity.output_noise import output_noise

TEST_SEED = 2_000_003  # of pictures, far from those of calibration and of the planner's check
COLUMNS = ("convolutions", "linears", "MB", "of fp16", "SQNR dB", "PSNR dB", "SSIM", "attributes")


@dataclass
class Measured:
    """A row of the table; `failed` says why there are no figures."""

    tool: str
    configuration: str
    note: str = ""
    version: str | None = None
    failed: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exam:
    """What every contender is measured on."""

    pipe: Any
    original: nn.Module
    captions: list[tuple[str, scenes.Scene]]
    trajectory: Trajectory
    pictures: Tensor
    settings: SamplingSettings
    evaluator: Evaluator | None

    @property
    def fp16_bytes(self) -> int:
        """Of the float UNet's checkpoint in 16 bits."""
        return checkpoint_bytes(self.original, self.original)

    def draw(self, model: nn.Module) -> Tensor:
        """The captions' pictures with this UNet in the pipeline."""
        self.pipe.unet = model
        try:
            return draw_pictures(self.pipe, [text for text, _ in self.captions], self.settings, "pictures")
        finally:
            self.pipe.unet = self.original

    @torch.no_grad()
    def accuracy(self, pictures: Tensor) -> float | None:
        """Share of the captions' attributes that the evaluator finds in the pictures."""
        if self.evaluator is None:
            return None
        return attribute_accuracy(self.evaluator(pictures * 2 - 1), [scene for _, scene in self.captions])

    def figures(self, model: nn.Module, seen: Anatomy) -> dict[str, Any]:
        """All that is measured of one quantized UNet, but time."""
        noise = output_noise(model, self.trajectory)
        pictures = self.draw(model)
        pairs = PicturePairs([text for text, _ in self.captions], [], self.pictures, pictures)
        return {
            "convolutions": asdict(seen.counts["conv2d"]),
            "linears": asdict(seen.counts["linear"]),
            "bytes": seen.bytes,
            "share_of_fp16": seen.bytes / self.fp16_bytes,
            "sqnr_db": noise.mean_db,
            "sqnr_db_by_step": list(noise.db_by_step.values()),
            "psnr_db": pairs.pooled_psnr_db,
            "psnr_db_mean_of_pictures": statistics.mean(pairs.psnr_db),
            "ssim": ssim(self.pictures, pictures),
            "attribute_accuracy": self.accuracy(pictures),
        }


def prepare(model: Path | None, count: int, *, show: bool) -> tuple[Workbench, Exam]:
    """Load the pipeline, calibrate it, and record what the contenders are measured against."""
    dtype = torch.float16 if common.device().type == "cuda" else torch.float32
    folder = model or demo.WEIGHTS
    pipe = demo.load_demo_pipeline(dtype, folder).to(common.device())
    calibrated_on, verified_on = split_prompts(calibration_captions(CALIBRATION_PROMPTS))
    calibration = calibrate(pipe, calibrated_on, SamplingSettings(STEPS, GUIDANCE, 0), show=show)
    check = record_trajectory(pipe, verified_on, SamplingSettings(STEPS, GUIDANCE, HELD_OUT_SEED), show=show)
    captions, settings = held_out_captions(count), SamplingSettings(STEPS, GUIDANCE, TEST_SEED)
    texts = [text for text, _ in captions]
    trajectory = record_trajectory(pipe, texts, settings, show=show)
    pictures = draw_pictures(pipe, texts, settings, "float pictures", show=show)
    evaluator = demo.load_evaluator(folder) if (folder / "evaluator").is_dir() else None
    exam = Exam(pipe, denoiser(pipe), captions, trajectory, pictures, settings, evaluator)
    return Workbench(pipe, calibration, check), exam


def examine(
    contender: Contender, bench: Workbench, exam: Exam, models: dict[str, nn.Module]
) -> tuple[Measured, Anatomy | None]:
    """Build and measure one contender; one that is missing or fails becomes a row that says why."""
    row = Measured(contender.tool, contender.configuration, contender.note)
    try:
        row.version = contender.version
        model = contender.build(bench)
        seen = anatomy(model, exam.original, exam.trajectory.calls[0])
        row.figures = exam.figures(model, seen)
    except importlib.metadata.PackageNotFoundError:
        row.failed = "not installed: pip install --no-deps -r benchmarks/requirements-rivals.txt"
        return row, None
    except Exception as error:  # a rival may fail in any way, and its row says how
        row.failed = f"{type(error).__name__}: {error}"
        return row, None
    models[f"{row.tool}: {row.configuration}"] = model
    return row, seen


def run(bench: Workbench, exam: Exam, console: Console, *, show: bool) -> list[Measured]:
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
            scheme = "w8a8-static" if "calibrated" in rival.configuration else "w8a8-dynamic"
            add(own_beside(rival, seen.stored, seen.computed, scheme))
    for contender in (*own_uniform(), *own_planned(show=show)):
        add(contender)

    call = exam.trajectory.calls[0]

    @torch.no_grad()
    def once(model: nn.Module) -> None:
        model(*call.args, **call.kwargs)

    times = common.interleaved_ms({name: partial(once, model) for name, model in models.items()})
    for row in rows:
        if row.failed is None:
            row.figures["ms"] = times[f"{row.tool}: {row.configuration}"]
    whole = {"bytes": exam.fp16_bytes, "share_of_fp16": 1.0, "attribute_accuracy": exam.accuracy(exam.pictures)}
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

    def figure(tool: str, start: str, key: str) -> float | None:
        return next((f.get(key) for (t, c), f in measured.items() if t == tool and c == start), None)

    sdnq = figure("sdnq", "w8a8 dynamic, everywhere", "sqnr_db")
    beside = figure(OURS, "w8a8 dynamic, layers of sdnq", "sqnr_db")
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
    bench, exam = prepare(arguments.model, arguments.captions, show=console.is_terminal)
    rows = run(bench, exam, console, show=console.is_terminal)
    batch = exam.trajectory.calls[0].output.shape[0]
    Console(width=None if sys.stdout.isatty() else 190).print(as_table(rows, batch))
    for row in rows:
        if row.failed is not None:
            print(f"{row.tool}, {row.configuration}: {row.failed}")
    records = [{"op": "unet", "captions": len(exam.captions), "batch": batch, **asdict(row)} for row in rows]
    print(f"written: {common.write_results('rivals', records, summary(rows))}")


if __name__ == "__main__":
    main()
