"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ldmq_kernels.calibration.settings import SamplingSettings

DEFAULT_FORMATS = "w8a8,w8a16,fp16"


def at_home(path: Path | None) -> Path | None:
    """A path with the user's home in place of "~", which a shell leaves in quotes and after "=".

    Raises:
        typer.BadParameter: there is no such user, or this one has no home.
    """
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: {error}; write ./~ for a file of that name") from None


Model = Annotated[Path, typer.Argument(help="A local diffusers directory.", metavar="MODEL", callback=at_home)]
_PROMPTS = typer.Option(
    help="Text file, one prompt a line, like those that the model will be used for.", callback=at_home
)
Prompts = Annotated[Path | None, _PROMPTS]
Calls = Annotated[
    Path | None,
    typer.Option(
        help="In place of --prompts: JSON Lines, an object a line with arguments of the pipeline's own call; pictures "
        "by their paths.",
        callback=at_home,
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        help="The part that is planned, such as transformer_2, vae or controlnet. [default: the first denoiser]",
        show_default=False,
    ),
]
OptionalPlan = Annotated[Path | None, typer.Option(help="A plan file that `ldmq plan` wrote.", callback=at_home)]


def on_the_hub(name: str | None) -> str | None:
    """A name that a model of the Hub could have.

    Raises:
        typer.BadParameter: the Hub has no names of that form.
    """
    if name is None:
        return None
    from ldmq_kernels.integrations.diffusers.origin import is_repo

    if not is_repo(name):
        raise typer.BadParameter(f"{name!r} is no name on the Hub: give OWNER/NAME")
    return name


BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Whom the model card names as base model, where MODEL's folder does not tell.",
        metavar="OWNER/NAME",
        callback=on_the_hub,
    ),
]
Pictures = Annotated[
    int, typer.Option(help="Held-out prompts that the model card shows, float and quantized.", metavar="N", min=0)
]
OptionalTarget = Annotated[
    float | None,
    typer.Option(help="Least SQNR of the UNet output in dB, averaged over steps.", metavar="DB"),
]
TargetLatent = Annotated[
    float | None,
    typer.Option(
        help="Least SQNR of the final latents in dB, as drawn, averaged over pictures; in place of --target-sqnr.",
        metavar="DB",
    ),
]
TargetPsnr = Annotated[
    float | None,
    typer.Option(
        help="Least PSNR of the pictures in dB against the float ones, as drawn, averaged over pictures; in place of "
        "--target-sqnr.",
        metavar="DB",
    ),
]
TargetBytes = Annotated[
    int | None,
    typer.Option(
        help="Most bytes of the UNet's weights. Alone: SQNR is then as high as they allow.", metavar="N", min=1
    ),
]
TargetMs = Annotated[
    float | None,
    typer.Option(
        help="Most milliseconds of one UNet call for one picture on this device, where the layers are then timed.",
        metavar="MS",
    ),
]
TargetLayers = Annotated[int | None, typer.Option(help="Most layers that may stay in 16 bit.", metavar="N", min=0)]
Signals = Annotated[
    str,
    typer.Option(
        help='What a plan without a target in dB keeps: "sqnr" of the UNet output, "latent" or "psnr" of what is '
        'drawn. "sqnr,ssim" keeps the structure of pictures too (cross-attention and feed-forward layers, judged by '
        "decoded pictures)."
    ),
]
Hybrid = Annotated[
    float,
    typer.Option(
        help="The paper's global step: blocks that make this share of the noise start in w8a16, fp16 or dynamic w8a8. "
        "0 leaves the choice to the solver.",
        min=0.0,
        max=1.0,
        metavar="SHARE",
    ),
]
Times = Annotated[
    bool,
    typer.Option("--times", help="Time the layers on this device; those that would get slower stay in 16 bit."),
]
TimesFor = Annotated[
    str | None,
    typer.Option(
        "--times-for",
        metavar="DEVICE",
        help="As --times for a GPU that is not there, such as h200: times are predicted from its data sheet, and the "
        "plan says so.",
    ),
]
Pareto = Annotated[
    bool,
    typer.Option(
        "--pareto",
        help="In place of one target: plans from the smallest to float, each run and measured. --out is then a "
        "folder for the plans, a table and a picture. With --times they are spaced by time.",
    ),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(
        "--work",
        help="Folder that keeps the analysis, so that the same command goes on after a kill. It is made private to "
        "you, and refused for another model, other settings or other versions.",
        callback=at_home,
    ),
]
Formats = Annotated[
    str,
    typer.Option(
        help="Formats or schemes to choose among, with commas: w8a8, w4a8 (each static, timestep, dynamic, rotated and "
        "split, w8a8x2), fp8 (static, dynamic), w8a16, w4a16, fp16, or w8a8-static and so on."
    ),
]
FormatsWithin = Annotated[
    str | None,
    typer.Option(
        help="Formats or schemes to choose among, as of `ldmq quantize`. [default: w8a8,w8a16,fp16, and w4a8,w4a16 "
        "too where the weights take more than --target-bytes by these]",
        show_default=False,
    ),
]
Calibration = Annotated[
    Literal["first-step", "sampled-steps", "drawn-steps", "all-steps"],
    typer.Option(help="Sampling steps that static scales are taken from."),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Sampling steps of each picture. [default: 20 with --prompts, as the pipeline has it with --calls]",
        min=1,
        show_default=False,
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Classifier-free guidance scale. [default: 7.5 with --prompts, as the pipeline has it with --calls]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")]
Height = Annotated[
    int | None, typer.Option(help="Of the pictures, in pixels. [default: the pipeline's]", min=8, show_default=False)
]
Width = Annotated[int | None, typer.Option(help="As --height.", min=8, show_default=False)]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Class of diffusers that the pipeline draws with, such as DPMSolverMultistepScheduler, with the "
        "configuration of its own one. [default: its own]",
        show_default=False,
    ),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        help="JSON Lines, an object a line with num_inference_steps, guidance_scale, scheduler, height and width, as "
        "far as they differ from these options: the plan is made for all of these settings at once.",
        callback=at_home,
    ),
]
PlanOut = Annotated[
    Path | None,
    typer.Option(
        "--out", help="The plan file to write, over an older plan; with --pareto, a new folder.", callback=at_home
    ),
]
ModelOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the quantized model; it must not hold anything yet.", callback=at_home),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="What to compute in; the result is stored in the dtype that MODEL is stored in."),
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Of the weights that are loaded, such as fp16 for *.fp16.safetensors; a part without it is loaded "
        "plain. What is written is plain. [default: plain weights, or the only variant that is there]",
        metavar="NAME",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be quantized and write nothing.")]


def sampling(
    steps: int | None,
    guidance: float | None,
    seed: int,
    height: int | None,
    width: int | None,
    prompts: Path | None,
    scheduler: str | None = None,
    file: Path | None = None,
) -> tuple[SamplingSettings, ...]:
    """The sampling options together; calls, which are given without prompts, may say themselves what is left out.

    Args:
        file: of several settings, each with what differs from the options.

    Raises:
        ValueError: the file does not hold settings.
    """
    from ldmq_kernels.calibration.settings import SamplingSettings, changed, each_of, with_defaults
    from ldmq_kernels.cli.calls import json_lines

    settings = SamplingSettings(steps, guidance, seed, height, width, scheduler)
    base = settings if prompts is None else with_defaults(settings)
    if file is None:
        return each_of(base)
    return changed(base, [change for _, change in json_lines(file, "setting", '{"num_inference_steps": 4}')])


def require_out(out: Path | None, *, dry_run: bool) -> Path:
    """The place to write to, which only a dry run does without.

    Raises:
        typer.BadParameter: --out is missing.
    """
    if out is None and not dry_run:
        raise typer.BadParameter("give --out, the place for the result, or --dry-run")
    return out or Path()


def names_in(text: str) -> tuple[str, ...]:
    """The names in an option that takes several, with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
