"""`ldmq plan`, `ldmq quantize` and `ldmq analyze`: calibrate, analyse, plan, convert, write."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console

import ldmq_kernels
from ldmq_kernels.calibration.denoisers import chosen, denoiser
from ldmq_kernels.calibration.drawings import described
from ldmq_kernels.cli.fitted import say
from ldmq_kernels.cli.models import Loading, is_pipeline, load, load_pipeline, load_structure, to_stored_dtype
from ldmq_kernels.conversion import Summary, quantize, summarize
from ldmq_kernels.conversion.left_in_float import lines_of
from ldmq_kernels.files import output_folder, printable, write_whole
from ldmq_kernels.files.variants import chosen_variant
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.formats import FLOAT, parse_schemes
from ldmq_kernels.planning.assignment import MOST_DB
from ldmq_kernels.planning.drawn import spread_in_words
from ldmq_kernels.planning.pareto import Axis, ParetoPoint, pareto_front
from ldmq_kernels.planning.planner import held_out_settings, make_plan, open_session
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import MEASURES, Measure, Target
from ldmq_kernels.plans.cost import time_in_words, weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers, refusal
from ldmq_kernels.plans.plan import Plan, PlanError, plan_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from ldmq_kernels.files import Fill
    from ldmq_kernels.report.measure import PicturePairs
    from ldmq_kernels.report.page import Fact, Report

PICTURES = 8

console = Console()


def target_of(
    sqnr_db: float | None,
    size: int | None = None,
    milliseconds: float | None = None,
    layers: int | None = None,
    latent_db: float | None = None,
    psnr_db: float | None = None,
    *,
    pareto: bool = False,
) -> Target | None:
    """The target of the limits that were given, or None for a Pareto front.

    Raises:
        typer.BadParameter: none was given, or several in dB, or one beside a Pareto front.
    """
    limits = (sqnr_db, size, milliseconds, layers, latent_db, psnr_db)
    if pareto:
        if any(limit is not None for limit in limits):
            raise typer.BadParameter("give either --pareto or targets: a Pareto front holds plans for all of them")
        return None
    if all(limit is None for limit in limits):
        raise typer.BadParameter(
            "give a target: --target-sqnr, --target-latent or --target-psnr DB, --target-bytes N, --target-ms MS or "
            "--target-layers N, or several; or --pareto for plans of all sizes"
        )
    try:
        return Target(*limits)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def preview(model: Path, request: PlanRequest, how: Loading) -> None:
    """Print what each scheme would make of the model; nothing runs and nothing is written."""
    from rich.table import Table
    from rich.text import Text

    chosen_variant(model, how.variant)
    structure = load_structure(model, request.part)
    schemes = [s for s in parse_schemes(request.with_room(structure).schemes) if s.quantizes]
    layers = quantizable_layers(structure).values()
    what = "prompts" if all(isinstance(call, str) for call in request.drawn) else "calls"
    counted = f"weights of all quantizable layers, before planning on {len(request.drawn)} {what}"
    table = Table(title=Text(f"{printable(model)}: {counted}"))
    table.add_column("every layer in")
    for column in ("convolutions", "linears", "bytes before", "bytes after"):
        table.add_column(column, justify="right")
    for scheme in schemes:
        fitting = [layer for layer in layers if not refusal(layer, scheme)]
        linears = sum(kind_of(layer) == "linear" for layer in fitting)
        counts = [len(fitting) - linears, linears]
        before = sum(weight_bytes(layer, FLOAT) for layer in layers)
        after = sum(weight_bytes(layer, scheme if layer in fitting else FLOAT) for layer in layers)
        table.add_row(str(scheme), *map(str, counts), f"{before:,}", f"{after:,}")
    console.print(table)
    console.print("A plan mixes these to meet the target; nothing was written.")


def run_plan(model: Path, request: PlanRequest, out: Path, how: Loading) -> None:
    """Make a plan and write it."""
    with plan_output(out) as write:
        pipe = load_pipeline(model, how)
        result = make_plan(pipe, request)
        write(result.plan)
    _print_summary(summarize(denoiser(chosen(pipe, request.part)), result.plan))
    say(f"{_reached(result.plan)}\nwritten to {printable(out)}")


def run_pareto(model: Path, request: PlanRequest, out: Path, how: Loading) -> None:
    """Make plans of all sizes, print them as a table, and write them with a table of numbers and a picture."""
    from ldmq_kernels.report.pareto import pareto_csv, pareto_picture

    def fill(folder: Path) -> None:
        for number, point in enumerate(points, 1):
            point.result.plan.save(folder / plan_name(number))
        write_whole(folder / "pareto.csv", pareto_csv(points))
        write_whole(folder / "pareto.svg", pareto_picture(points).encode())

    with output_folder(out) as write:
        session = open_session(load_pipeline(model, how), request)
        axis: Axis = "milliseconds" if request.time_layers or request.times_for else "bytes"
        points = pareto_front(session, axis=axis, show=request.show)
        write(fill)
    console.print(_pareto_table(points, session.measure, session.verified_on))
    say(f"plans, pareto.csv and pareto.svg are in {printable(out)}")


def plan_name(number: int) -> str:
    """The file name of a plan of a Pareto front."""
    return f"plan_{number:02}.json"


def _pareto_table(points: list[ParetoPoint], measure: Measure, verified_on: str) -> Table:
    from rich.table import Table

    first = points[0].result.plan.measured
    key = next((key for key in ("milliseconds", "predicted_milliseconds") if key in first), "")
    unit = {"": [], "milliseconds": ["ms"], "predicted_milliseconds": ["predicted ms"]}[key]
    table = Table(title=f"{MEASURES[measure]}, measured on {verified_on}")
    for column in ("plan", "bytes", "of fp16", *unit, "predicted dB", "measured dB", ""):
        table.add_column(column, justify="left" if column in ("plan", "") else "right")
    for number, point in enumerate(points, 1):
        measured = point.result.plan.measured
        size, full = measured["weight_bytes"], measured["weight_bytes_fp16"]
        time = [f"{measured[key]:.2f}"] if key else []
        decibels = [f"{db:.2f}" if db < MOST_DB else "exact" for db in (point.predicted_db, point.measured_db)]
        remark = "dominated" if point.dominated else ""
        table.add_row(plan_name(number), f"{size:,}", f"{size / full:.3f}x", *time, *decibels, remark)
    return table


def _reached(plan: Plan) -> str:
    measured = plan.measured
    words = f"SQNR on {measured['verified_on']}: {measured['held_out_sqnr_db']:.2f} dB{spread_in_words(measured)}"
    time = time_in_words(measured)
    return f"{words}; {time}" if time else words


def _print_summary(summary: Summary) -> None:
    """What is quantized, and by name what stays in float."""
    console.print(summary.table())
    for line in lines_of(summary.in_float):
        say(line)


def quantize_by_plan(
    model: Path, plan_file: Path, out: Path, how: Loading, *, dry_run: bool, base_model: str | None = None
) -> None:
    """Quantize a pipeline or a model alone as a plan file says."""
    plan = Plan.load(plan_file)
    structure = load_structure(model, plan.model.get("part") if is_pipeline(model) else None)
    _print_summary(summarize(structure, plan))
    if dry_run:
        chosen_variant(model, how.variant)
        console.print("nothing was written")
        return
    with output_folder(out) as write:
        loaded = load(model, how)
        quantize(loaded, plan)
        _save(loaded, model, how, out, write, base_model)


def quantize_by_prompts(
    model: Path,
    request: PlanRequest,
    out: Path,
    how: Loading,
    *,
    dry_run: bool,
    base_model: str | None = None,
    pictures: int = 0,
) -> None:
    """Make a plan and quantize the pipeline by it; the card shows so many held-out prompts, float and quantized."""
    if dry_run:
        _planned(model, request, how)
        console.print("nothing was written")
        return
    with output_folder(out) as write:
        pipe, plan = _planned(model, request, how)
        pairs = _quantize_between_pictures(pipe, request, plan, pictures) if pictures else None
        if pairs is None:
            _quantize(pipe, request, plan)
        _save(pipe, model, how, out, write, base_model, pairs)


def _planned(model: Path, request: PlanRequest, how: Loading) -> tuple[Any, Plan]:
    """The float pipeline and its plan, which is shown."""
    pipe = load_pipeline(model, how)
    result = make_plan(pipe, request)
    _print_summary(summarize(denoiser(chosen(pipe, request.part)), result.plan))
    console.print(_reached(result.plan))
    return pipe, result.plan


def _quantize(pipe: Any, request: PlanRequest, plan: Plan) -> None:
    """Quantize by a plan that was just made, from what it was made from."""
    calls = [call for call in request.drawn if isinstance(call, Mapping)]
    quantize(pipe, plan, calls=calls or None)


def _quantize_between_pictures(pipe: Any, request: PlanRequest, plan: Plan, count: int) -> PicturePairs:
    """Draw held-out calls, quantize, and draw them again from the same noise."""
    from ldmq_kernels.report.measure import PicturePairs, draw_pictures

    calls, settings = request.held_out_calls[:count], held_out_settings(request.settings)[0]
    before = draw_pictures(pipe, calls, settings, "float pictures", show=request.show)
    _quantize(pipe, request, plan)
    after = draw_pictures(pipe, calls, settings, "quantized pictures", show=request.show)
    each = before.shape[0] // len(calls)  # a call may draw several
    named = [(described(call, place), settings.seed + place) for place, call in enumerate(calls) for _ in range(each)]
    return PicturePairs([name for name, _ in named], [seed for _, seed in named], before, after)


def _save(
    loaded: Any,
    model: Path,
    how: Loading,
    out: Path,
    write: Callable[[Fill], None],
    base_model: str | None,
    pairs: PicturePairs | None = None,
) -> None:
    from ldmq_kernels.integrations.diffusers.origin import origin_of
    from ldmq_kernels.integrations.diffusers.publishing import write_card

    png = None
    if pairs is not None:
        from ldmq_kernels.report.side_by_side import side_by_side

        png = side_by_side(pairs)
    to_stored_dtype(loaded, model, how.variant)

    def fill(folder: Path) -> None:
        loaded.save_pretrained(folder)
        write_card(loaded, folder, base_model=base_model, pictures=png, name=out.resolve().name)

    write(fill)
    say(f"written to {printable(out)}; load it with from_pretrained after `import ldmq_kernels`")
    if base_model is None and origin_of(loaded).repo is None:
        say("its README.md names no base model: give --base-model OWNER/NAME, or write it there before publishing")


def run_analyze(model: Path, request: PlanRequest, out: Path, how: Loading, *, with_pareto: bool) -> None:
    """Measure, plan, draw before and after, and write the page and the table of layers.

    Where the formats cannot reach the target, the page has no plan and says so.
    """
    from ldmq_kernels.cli.tables import noise_of_blocks, rows_of_pairs, rows_of_plan, write_blocks, write_sqnr
    from ldmq_kernels.report.page import write_report
    from ldmq_kernels.report.rows import layer_rows, schemes_of, to_csv

    def fill(folder: Path) -> None:
        write_report(folder / "report.html", denoiser(planned), report)
        write_whole(folder / "layers.csv", to_csv(rows, schemes_of(analysis)))
        write_sqnr(folder / "sqnr.csv", analysis, measured)
        write_blocks(folder / "blocks.csv", *blocks)
        if plan is not None:
            plan.save(folder / "plan.json")

    with output_folder(out) as write:
        pipe = load_pipeline(model, how)
        planned = chosen(pipe, request.part)
        session = open_session(pipe, request)
        analysis = session.analysis
        points = pareto_front(session, show=request.show) if with_pareto else []
        blocks = noise_of_blocks(denoiser(planned), analysis, show=request.show)
        report = _report(pipe, printable(model.resolve().name), session, request, points)
        plan = None if report.result is None else report.result.plan
        measured = []
        if report.result is not None and report.pictures is not None:
            settings = held_out_settings(request.settings)
            whole = rows_of_plan(pipe, request.held_out_calls, settings, report.result, session.held_out)
            measured = [*whole, *rows_of_pairs(report.pictures)]
        rows = layer_rows(denoiser(planned), analysis, plan)
        write(fill)
    page = printable(out / "report.html")
    say(f"open {page} in a browser; the numbers are in layers.csv, sqnr.csv and blocks.csv beside it")


def _report(pipe: Any, name: str, session: Session, request: PlanRequest, points: list[ParetoPoint]) -> Report:
    """The page's content; the pipeline is quantized afterwards, if there is a plan."""
    from ldmq_kernels.report.measure import time_plan
    from ldmq_kernels.report.page import Report

    analysis, held_out, unet = session.analysis, session.held_out, session.model
    assert request.target is not None
    report = Report(
        f"{name}: quantized, measured",
        f"What quantizing each layer of its {type(unet).__name__} does to the output, and the plan that follows.",
        analysis,
        pareto=points,
        notes=[f"{machine()}; torch {torch.__version__}, ldmq_kernels {ldmq_kernels.__version__}."],
    )
    try:
        result = session.plan(request.target)
    except PlanError as error:
        return replace(report, no_plan=f"With these formats there is none: {error}.")
    summary = summarize(unet, result.plan)
    timing = time_plan(unet, result.plan, held_out.calls[0])
    pairs = _quantize_between_pictures(pipe, request, result.plan, PICTURES)
    facts = headline(summary.bytes_after / summary.bytes_before, result.held_out.mean_db, pairs, timing.speedup)
    return replace(report, result=result, summary=summary, facts=facts, pictures=pairs, timings=[timing])


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
