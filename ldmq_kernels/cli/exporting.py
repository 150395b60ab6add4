"""`ldmq export`: the options of a file for another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldmq_kernels.cli.options import Model, Variant, at_home


def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(help="Where to write the safetensors file, over an older one of this command.", callback=at_home),
    ],
    comfyui: Annotated[
        bool, typer.Option("--comfyui", help="For ComfyUI: its int8 linears, and all else in floating point.")
    ] = False,
    own_layers: Annotated[
        bool,
        typer.Option("--own-layers", help="All layers as they are, convolutions too, for the nodes in comfyui/."),
    ] = False,
    variant: Variant = None,
) -> None:
    """Write the UNet of MODEL, which `ldmq quantize` made, for another program."""
    from ldmq_kernels.cli.export import run_export

    if not comfyui:
        raise typer.BadParameter("say for which program: --comfyui")
    run_export(model, out, own_layers=own_layers, variant=variant)
