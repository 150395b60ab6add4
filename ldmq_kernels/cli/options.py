"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ldmq_kernels.calibration.trajectory import SamplingSettings

DEFAULT_FORMATS = "w8a8,w8a16,fp16"

Model = Annotated[Path, typer.Argument(help="A local diffusers directory.", metavar="MODEL")]
_PROMPTS = typer.Option(help="Text file, one prompt a line, like those that the model will be used for.")
Prompts = Annotated[Path, _PROMPTS]
OptionalPrompts = Annotated[Path | None, _PROMPTS]
OptionalPlan = Annotated[Path | None, typer.Option(help="A plan file that `ldmq plan` wrote.")]
OptionalTarget = Annotated[
    float | None,
    typer.Option(help="SQNR of the UNet output in dB, averaged over steps, to reach with fewest bytes.", metavar="DB"),
]
TargetBytes = Annotated[
    int | None,
    typer.Option(help="Or bytes for the UNet's weights, within which SQNR is to be highest.", metavar="N", min=1),
]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Formats or schemes to choose among, with commas: w8a8, w4a8 (each static, stepped, dynamic and paired), w8a16, "
        f"fp16, or w8a8-static and so on. [default: {DEFAULT_FORMATS}]",
        show_default=False,
    ),
]
Calibration = Annotated[
    Literal["first-step", "all-steps"], typer.Option(help="Sampling steps that static scales are taken from.")
]
Steps = Annotated[int, typer.Option(help="Sampling steps of each picture.", min=1)]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; the others count up.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="What to compute in; the result is stored in the dtype that MODEL is stored in."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be quantized and write nothing.")]


def sampling(steps: int, guidance: float, seed: int) -> SamplingSettings:
    """The sampling options together."""
    from ldmq_kernels.calibration.trajectory import SamplingSettings

    return SamplingSettings(steps, guidance, seed)


def needed(out: Path | None, *, dry_run: bool) -> Path:
    """Where to write; a dry run writes nothing and needs no place.

    Raises:
        typer.BadParameter: --out is missing.
    """
    if out is None and not dry_run:
        raise typer.BadParameter("give --out, the place for the result, or --dry-run")
    return out or Path()


def parse_formats(text: str | None) -> list[str]:
    """The names in --formats.

    Raises:
        ValueError: one of them is not a format, or there is none.
    """
    from ldmq_kernels.numerics.formats import parse_schemes

    names = [name.strip() for name in (text or DEFAULT_FORMATS).split(",") if name.strip()]
    if not names:
        raise ValueError(f"--formats {text!r} names no format: leave it out for {DEFAULT_FORMATS}")
    parse_schemes(names)
    return names
