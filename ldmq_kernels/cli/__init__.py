"""`ldmq`: the command line. Commands import what they need when they run, so that help is quick."""

from __future__ import annotations

import errno
import io
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ldmq_kernels.cli.bench.command import bench as bench_command
from ldmq_kernels.cli.exporting import export as export_command
from ldmq_kernels.cli.options import (
    DEFAULT_FORMATS,
    BaseModel,
    Calibration,
    Calls,
    DryRun,
    Dtype,
    Formats,
    FormatsWithin,
    Guidance,
    Height,
    Hybrid,
    Model,
    ModelOut,
    OptionalPlan,
    OptionalTarget,
    Pareto,
    Part,
    Pictures,
    PlanOut,
    Prompts,
    Scheduler,
    Seed,
    SettingsFile,
    Signals,
    Steps,
    TargetBytes,
    TargetLatent,
    TargetLayers,
    TargetMs,
    TargetPsnr,
    Times,
    TimesFor,
    Variant,
    Width,
    WorkDir,
    at_home,
    names_in,
    require_out,
    sampling,
)
from ldmq_kernels.cli.serving import serve as serve_command
from ldmq_kernels.files import MisplacedError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
VERBOSE = "--verbose"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize latent diffusion models to int8, FP8 and int4, each layer in the precision that keeps the pictures.",
    epilog=f"{VERBOSE}, anywhere, shows the traceback of an error.",
)


def error_line(error: BaseException) -> str:
    """One line for people: what was found and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MisplacedError):
        return text
    if (isinstance(error, OSError) and error.errno in DISK_FULL) or "No space left on device" in text:
        return f"the disk is full, nothing was written: free some space, or choose another place ({text})"
    if isinstance(error, OSError | ValueError | TypeError):
        return text
    return f"{type(error).__name__}: {text} ({VERBOSE} shows where)"


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


@contextmanager
def _termination_as_exception() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit inside, so that half-written files go away; the handlers are put back after.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _leave)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _print_any_name() -> None:
    """Let names that standard output has no letters for be printed as \\xff and the like, and not end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    SIGTERM ends it with 143 and SIGHUP with 129.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbose = VERBOSE in given
    _print_any_name()
    try:
        with _termination_as_exception():
            app([argument for argument in given if argument != VERBOSE], prog_name="ldmq")
    except Exception as error:
        if verbose:
            traceback.print_exc()
        print(f"ldmq: {error_line(error)}", file=sys.stderr)
        sys.exit(1)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the page, the plan, the figures and the model.", callback=at_home)
    ] = Path("demo_output"),
    captions: Annotated[int, typer.Option(help="Held-out captions that are drawn and scored.", min=4)] = 100,
) -> None:
    """Quantize the small model that ships with the package, and show that it draws the same pictures."""
    from ldmq_kernels.cli.quiet import quiet_libraries

    quiet_libraries()
    from ldmq_kernels.demo.run import run_demo

    run_demo(out, captions)


@app.command()
def plan(
    model: Model,
    prompts: Prompts = None,
    calls: Calls = None,
    out: PlanOut = None,
    target_sqnr: OptionalTarget = None,
    target_latent: TargetLatent = None,
    target_psnr: TargetPsnr = None,
    target_bytes: TargetBytes = None,
    target_ms: TargetMs = None,
    target_layers: TargetLayers = None,
    pareto: Pareto = False,
    times: Times = False,
    times_for: TimesFor = None,
    signals: Signals = "sqnr",
    hybrid: Hybrid = 0.0,
    formats: FormatsWithin = None,
    calibration: Calibration = "first-step",
    part: Part = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    scheduler: Scheduler = None,
    settings: SettingsFile = None,
    dtype: Dtype = "float32",
    variant: Variant = None,
    work: WorkDir = None,
    dry_run: DryRun = False,
) -> None:
    """Choose a precision for every layer of MODEL, verified on prompts that it was not made from.

    Targets may be combined. The first of noise, bytes and time that has no limit is made as small as the others
    allow: with a target in dB the fewest bytes, with --target-bytes or --target-ms alone the highest SQNR
    of the UNet output, or of what --signals names. With --dry-run nothing is measured: it prints what each format
    would make of the model.
    """
    from ldmq_kernels.cli.calls import drawn
    from ldmq_kernels.cli.method import preview, run_pareto, run_plan, target_of
    from ldmq_kernels.cli.models import Loading
    from ldmq_kernels.planning.request import PlanRequest

    target = target_of(target_sqnr, target_bytes, target_ms, target_layers, target_latent, target_psnr, pareto=pareto)
    place, how = require_out(out, dry_run=dry_run), Loading(dtype, variant)
    request = PlanRequest(
        drawn(model, prompts, calls),
        target,
        formats=None if formats is None else names_in(formats),
        calibration_mode=calibration,
        settings=sampling(steps, guidance, seed, height, width, prompts, scheduler, settings),
        part=part,
        signals=names_in(signals),
        hybrid=hybrid,
        time_layers=times,
        times_for=times_for,
        work_dir=work,
        show=True,
    )
    if dry_run:
        preview(model, request, how)
    else:
        (run_pareto if pareto else run_plan)(model, request, place, how)


@app.command()
def quantize(
    model: Model,
    out: ModelOut = None,
    plan: OptionalPlan = None,
    prompts: Prompts = None,
    calls: Calls = None,
    target_sqnr: OptionalTarget = None,
    target_latent: TargetLatent = None,
    target_psnr: TargetPsnr = None,
    formats: Formats = DEFAULT_FORMATS,
    calibration: Calibration = "first-step",
    part: Part = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    scheduler: Scheduler = None,
    settings: SettingsFile = None,
    dtype: Dtype = "float32",
    variant: Variant = None,
    work: WorkDir = None,
    base_model: BaseModel = None,
    pictures: Pictures = 0,
    dry_run: DryRun = False,
) -> None:
    """Write MODEL quantized to --out, by a plan file, or by one that is made now from prompts and a target.

    The result loads with diffusers' own from_pretrained after `import ldmq_kernels`, and its README.md is a model
    card for the Hub. With --dry-run the plan is made all the same, and nothing is written.
    """
    from ldmq_kernels.cli.calls import drawn
    from ldmq_kernels.cli.method import quantize_by_plan, quantize_by_prompts, target_of
    from ldmq_kernels.cli.models import Loading
    from ldmq_kernels.planning.request import PlanRequest

    place, how = require_out(out, dry_run=dry_run), Loading(dtype, variant)
    has_target = any(db is not None for db in (target_sqnr, target_latent, target_psnr))
    if plan is not None:
        if prompts is not None or calls is not None or has_target:
            raise typer.BadParameter("give either --plan, or --prompts or --calls and --target-sqnr or the like")
        if work is not None:
            raise typer.BadParameter("--work keeps an analysis, and --plan needs none: leave --work out")
        if pictures:
            raise typer.BadParameter("--pictures draws held-out prompts, and --plan has none: leave --pictures out")
        quantize_by_plan(model, plan, place, how, dry_run=dry_run, base_model=base_model)
        return
    if (prompts is None and calls is None) or not has_target:
        raise typer.BadParameter("give --plan FILE, or --prompts or --calls FILE with --target-sqnr DB or the like")
    request = PlanRequest(
        drawn(model, prompts, calls),
        target_of(target_sqnr, latent_db=target_latent, psnr_db=target_psnr),
        formats=names_in(formats),
        calibration_mode=calibration,
        settings=sampling(steps, guidance, seed, height, width, prompts, scheduler, settings),
        part=part,
        work_dir=work,
        show=True,
    )
    quantize_by_prompts(model, request, place, how, dry_run=dry_run, base_model=base_model, pictures=pictures)


@app.command()
def analyze(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(help="Folder for report.html and layers.csv; it must not hold anything yet.", callback=at_home),
    ],
    prompts: Prompts = None,
    calls: Calls = None,
    target_sqnr: Annotated[
        float | None,
        typer.Option(
            help="SQNR of the UNet output in dB that the plan on the page must reach. [default: 38, without another "
            "target]",
            metavar="DB",
            show_default=False,
        ),
    ] = None,
    target_latent: TargetLatent = None,
    target_psnr: TargetPsnr = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Show plans of all sizes too, each run and measured.")
    ] = False,
    formats: Formats = DEFAULT_FORMATS,
    calibration: Calibration = "first-step",
    part: Part = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    scheduler: Scheduler = None,
    settings: SettingsFile = None,
    dtype: Dtype = "float32",
    variant: Variant = None,
    work: WorkDir = None,
) -> None:
    """Measure what quantizing each layer of MODEL does to its output, and show it on a page."""
    from ldmq_kernels.cli.calls import drawn
    from ldmq_kernels.cli.method import run_analyze, target_of
    from ldmq_kernels.cli.models import Loading
    from ldmq_kernels.planning.request import PlanRequest

    if target_sqnr is None and target_latent is None and target_psnr is None:
        target_sqnr = 38.0
    request = PlanRequest(
        drawn(model, prompts, calls),
        target_of(target_sqnr, latent_db=target_latent, psnr_db=target_psnr),
        formats=names_in(formats),
        calibration_mode=calibration,
        settings=sampling(steps, guidance, seed, height, width, prompts, scheduler, settings),
        part=part,
        work_dir=work,
        show=True,
    )
    run_analyze(model, request, out, Loading(dtype, variant), with_pareto=pareto)


@app.command()
def check(
    model: Model,
    plan: Annotated[Path, typer.Option(help="The plan file that is checked.", callback=at_home)],
    prompts: Prompts = None,
    calls: Calls = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the plan that does not clip, over an older plan.", callback=at_home),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    height: Height = None,
    width: Width = None,
    scheduler: Scheduler = None,
    settings: SettingsFile = None,
    dtype: Dtype = "float32",
    variant: Variant = None,
) -> None:
    """Find which layers' calibrated ranges clip where MODEL draws at other settings than --plan was made for.

    The float model draws the prompts once at these settings. Printed is each layer that loses 1 dB or more of its
    input, and the SQNR of the UNet's output with the plan, and with a scale that is measured in
    each call for these layers.
    """
    from ldmq_kernels.cli.calls import drawn
    from ldmq_kernels.cli.clipping import run_check
    from ldmq_kernels.cli.models import Loading

    given = sampling(steps, guidance, seed, height, width, prompts, scheduler, settings)
    run_check(model, plan, drawn(model, prompts, calls), given, out, Loading(dtype, variant))


app.command("export")(export_command)
app.command("bench")(bench_command)
app.command("serve")(serve_command)


@app.command()
def doctor() -> None:
    """Check this installation: versions, devices, backends, and every op against its definition.

    An op that is wrong on this device with some backend is switched off there, until doctor finds it right again.
    """
    from ldmq_kernels.cli.checks import run_doctor

    raise typer.Exit(0 if run_doctor() else 1)
