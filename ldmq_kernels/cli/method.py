"""`ldmq plan`, `ldmq quantize` and `ldmq analyze`: calibrate, analyse, plan, convert, write."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console

import ldmq_kernels
from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.trajectory import SamplingSettings, denoiser, record_trajectory
from ldmq_kernels.cli.models import load, load_pipeline, load_structure, to_stored_dtype
from ldmq_kernels.cli.options import parse_formats
from ldmq_kernels.conversion import quantize, summarize
from ldmq_kernels.files import whole_folder, write_whole
from ldmq_kernels.numerics.formats import FLOAT, parse_schemes
from ldmq_kernels.planning.cost import weight_bytes
from ldmq_kernels.planning.plan import Plan, PlanError, kind_of, quantizable_layers
from ldmq_kernels.planning.planner import HELD_OUT_SEED, Target, make_plan, plan_from_analysis, split_prompts
from ldmq_kernels.sensitivity.analysis import Analysis, analyze

if TYPE_CHECKING:
    from ldmq_kernels.report.page import Fact, Report

PICTURES = 8

console = Console()


def target_of(sqnr_db: float | None, size: int | None) -> Target:
    """The one target that was given."""
    if (sqnr_db is None) == (size is None):
        raise typer.BadParameter("give one target: --target-sqnr DB, or --target-bytes N")
    return Target(sqnr_db, size)


def _check_free(folder: Path) -> None:
    """Before hours of work: the place for the result must be free."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty: choose another place, or remove it")


def preview(model: Path, formats: str | None, prompts: int) -> None:
    """Tell what each scheme would make of the model; nothing runs and nothing is written."""
    from rich.table import Table

    schemes = [s for s in parse_schemes(parse_formats(formats)) if s.quantizes]
    layers = quantizable_layers(load_structure(model)).values()
    table = Table(title=f"{model}: weights of all quantizable layers, before planning on {prompts} prompts")
    table.add_column("every layer in")
    for column in ("convolutions", "linears", "bytes before", "bytes after"):
        table.add_column(column, justify="right")
    for scheme in schemes:
        fitting = [layer for layer in layers if kind_of(layer) in scheme.format.layers]
        counts = [sum(kind_of(layer) == kind for layer in fitting) for kind in ("conv2d", "linear")]
        before = sum(weight_bytes(layer, FLOAT) for layer in layers)
        after = sum(weight_bytes(layer, scheme if layer in fitting else FLOAT) for layer in layers)
        table.add_row(str(scheme), *map(str, counts), f"{before:,}", f"{after:,}")
    console.print(table)
    console.print("A plan mixes these to meet the target; nothing was written.")


def run_plan(
    model: Path,
    prompts: list[str],
    target: Target,
    out: Path,
    formats: str | None,
    calibration: str,
    settings: SamplingSettings,
    dtype: str,
) -> None:
    """Make a plan and write it."""
    names = parse_formats(formats)
    pipe = load_pipeline(model, dtype)
    result = make_plan(pipe, prompts, target, formats=names, calibration_mode=calibration, settings=settings, show=True)
    result.plan.save(out)
    console.print(summarize(denoiser(pipe), result.plan).table())
    console.print(f"{_reached(result.plan)}\nwritten to {out}")


def _reached(plan: Plan) -> str:
    return f"SQNR on held-out prompts: {plan.measured['held_out_sqnr_db']:.2f} dB"


def quantize_by_plan(model: Path, plan_file: Path, out: Path, dtype: str, *, dry_run: bool) -> None:
    """Quantize a pipeline or a model alone as a plan file says."""
    plan = Plan.load(plan_file)
    structure = load_structure(model)
    console.print(summarize(structure, plan).table())
    if dry_run:
        console.print("nothing was written")
        return
    _check_free(out)
    loaded = load(model, dtype)
    quantize(loaded, plan)
    _save(loaded, model, out)


def quantize_by_prompts(
    model: Path,
    prompts: list[str],
    target_db: float,
    out: Path,
    formats: str | None,
    calibration: str,
    settings: SamplingSettings,
    dtype: str,
    *,
    dry_run: bool,
) -> None:
    """Make a plan and quantize the pipeline by it."""
    names = parse_formats(formats)
    if not dry_run:
        _check_free(out)
    pipe = load_pipeline(model, dtype)
    target = Target(sqnr_db=target_db)
    result = make_plan(pipe, prompts, target, formats=names, calibration_mode=calibration, settings=settings, show=True)
    console.print(summarize(denoiser(pipe), result.plan).table())
    console.print(_reached(result.plan))
    if dry_run:
        console.print("nothing was written")
        return
    quantize(pipe, result.plan)
    _save(pipe, model, out)


def _save(loaded: Any, model: Path, out: Path) -> None:
    to_stored_dtype(loaded, model)
    with whole_folder(out) as folder:
        loaded.save_pretrained(folder)
    console.print(f"written to {out}; load it with from_pretrained after `import ldmq_kernels`")


def run_analyze(
    model: Path,
    prompts: list[str],
    target_db: float,
    out: Path,
    formats: str | None,
    calibration_mode: str,
    settings: SamplingSettings,
    dtype: str,
) -> None:
    """Measure, plan, draw before and after, and write the page and the table of layers.

    Where the formats cannot reach the target, the page has no plan and says so.
    """
    from ldmq_kernels.report.page import write_report
    from ldmq_kernels.report.rows import layer_rows, schemes_of, to_csv

    names = parse_formats(formats)
    _check_free(out)
    pipe = load_pipeline(model, dtype)
    calibrated_on, verified_on = split_prompts(prompts)
    calibration = calibrate(pipe, calibrated_on, settings, mode=calibration_mode, show=True)
    analysis = analyze(pipe, calibration, parse_schemes(names), show=True)
    report = _report(pipe, model.resolve().name, analysis, verified_on, Target(sqnr_db=target_db), names)
    plan = None if report.result is None else report.result.plan
    rows = layer_rows(denoiser(pipe), analysis, plan)
    with whole_folder(out) as folder:
        write_report(folder / "report.html", denoiser(pipe), report)
        write_whole(folder / "layers.csv", to_csv(rows, schemes_of(analysis)))
        if plan is not None:
            plan.save(folder / "plan.json")
    console.print(f"open {out / 'report.html'} in a browser; the numbers are in {out / 'layers.csv'}")


def _report(
    pipe: Any, name: str, analysis: Analysis, verified_on: list[str], target: Target, formats: list[str]
) -> Report:
    """The page's content; the pipeline is quantized afterwards, if there is a plan."""
    from ldmq_kernels.report.measure import PicturePairs, draw_pictures, time_plan
    from ldmq_kernels.report.page import Report

    calibration: Calibration = analysis.calibration
    used = calibration.settings
    settings = SamplingSettings(used.num_inference_steps, used.guidance_scale, used.seed + HELD_OUT_SEED)
    held_out = record_trajectory(pipe, verified_on, settings, show=True)
    unet = denoiser(pipe)
    title = f"{name}: quantized, measured"
    lead = f"What quantizing each layer of its {type(unet).__name__} does to the output, and the plan that follows."
    notes = [f"{machine()}; torch {torch.__version__}, ldmq_kernels {ldmq_kernels.__version__}."]
    try:
        result = plan_from_analysis(unet, analysis, held_out, target, [str(s) for s in parse_schemes(formats)])
    except PlanError as error:
        return Report(title, lead, analysis, no_plan=f"With these formats there is none: {error}.", notes=notes)
    summary = summarize(unet, result.plan)
    timing = time_plan(unet, result.plan, held_out.calls[0])
    prompts = verified_on[:PICTURES]
    before = draw_pictures(pipe, prompts, settings, "float pictures", show=True)
    quantize(pipe, result.plan)
    after = draw_pictures(pipe, prompts, settings, "quantized pictures", show=True)
    seeds = range(settings.seed, settings.seed + len(prompts))
    pairs = PicturePairs(prompts, seeds, before, after)
    facts = headline(summary.bytes_after / summary.bytes_before, result.held_out.mean_db, pairs, timing.speedup)
    return Report(title, lead, analysis, result, summary, "", facts, pairs, [timing], notes)


def headline(size: float, sqnr_db: float, pairs: Any, speedup: float) -> list[Fact]:
    """The figures at the top of a page."""
    from ldmq_kernels.report.page import Fact

    return [
        Fact(f"{size:.2f}x", "bytes of UNet weights, of fp16"),
        Fact(f"{sqnr_db:.1f} dB", "SQNR of the UNet output, held-out prompts"),
        Fact(f"{pairs.pooled_psnr_db:.1f} dB", "PSNR of the pictures against float"),
        Fact(f"{speedup:.2f}x", "as fast as float, one UNet call"),
    ]


def machine() -> str:
    """The device that computed, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.backends.cpu.get_cpu_capability()} {platform.machine()} CPU, {torch.get_num_threads()} threads"
