"""`ldmq serve`: the options of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldmq_kernels import extras
from ldmq_kernels.cli.options import Variant, at_home

Models = Annotated[
    list[Path],
    typer.Argument(help="Quantized diffusers directories; the first is drawn where a request names none."),
]
Compare = Annotated[
    Path | None, typer.Option(help="The float model, served as `float`, for the page at /.", callback=at_home)
]
Names = Annotated[list[str] | None, typer.Option(help="A model's name for requests. [default: its folder's]")]
Devices = Annotated[
    list[str] | None, typer.Option(help="A lane of work for each. [default: all GPUs, or cpu]", show_default=False)
]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="What the models compute in.")]
Loras = Annotated[list[str] | None, typer.Option(help="An adapter that requests may name.", metavar="NAME=FILE")]
Keys = Annotated[list[str] | None, typer.Option(help="A key that requests must bear.", envvar="LDMQ_API_KEY")]
Megapixels = Annotated[float, typer.Option(help="Megapixels x steps that may wait; more is answered with 429.", min=0)]
MB = 2**20


def _named(models: list[Path], names: list[str] | None) -> list[tuple[Path, str]]:
    folders = [at_home(folder) or folder for folder in models]
    given = names or [folder.resolve().name for folder in folders]
    if len(given) != len(folders):
        raise typer.BadParameter(f"{len(given)} names for {len(folders)} models: give one --name for each")
    return list(zip(folders, given, strict=True))


def _loras(given: list[str] | None) -> dict[str, Path]:
    pairs = [text.partition("=") for text in given or []]
    wrong = [name for name, _, place in pairs if not (name and place)]
    if wrong:
        raise typer.BadParameter(f"--lora {wrong[0]}: give NAME=FILE")
    return {name: at_home(Path(place)) or Path(place) for name, _, place in pairs}


def serve(
    models: Models,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Names = None,
    compare: Compare = None,
    serve_float: Annotated[bool, typer.Option("--float", help="Serve models with no quantized layer.")] = False,
    device: Devices = None,
    dtype: Dtype = "float32",
    variant: Variant = None,
    steps: Annotated[int | None, typer.Option(help="Of requests that give none.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Of requests that give none.", min=0)] = None,
    lora: Loras = None,
    api_key: Keys = None,
    max_batch: Annotated[int, typer.Option(help="Pictures drawn at once.", min=1)] = 8,
    batch_wait: Annotated[float, typer.Option(help="Milliseconds without another one that begin a batch.", min=0)] = 5,
    max_pixels: Annotated[int, typer.Option(help="Of one picture.", min=64)] = 1024 * 1024,
    max_steps: Annotated[int, typer.Option(help="Of one picture.", min=1)] = 200,
    max_waiting: Megapixels = 1000.0,
    max_body: Annotated[int, typer.Option(help="MB of an upload.", min=1)] = 32,
    deadline: Annotated[float, typer.Option(help="Seconds from a request to its answer.", min=1)] = 600.0,
    drain_seconds: Annotated[int, typer.Option(help="Seconds that SIGTERM leaves to what runs.", min=0)] = 60,
    allow_unknown: Annotated[bool, typer.Option("--allow-unknown", help="Ignore unknown arguments.")] = False,
) -> None:
    """Serve quantized models by OpenAI's images API, with a page at / to try them."""
    from ldmq_kernels.cli.quiet import quiet_libraries

    quiet_libraries()
    with extras.explained("ldmq serve"):
        from ldmq_kernels.serving.run import serve as run
        from ldmq_kernels.serving.settings import Limits, ServedModel, ServerSettings
    served = [ServedModel(folder, called, serve_float) for folder, called in _named(models, name)]
    if compare is not None:
        served.append(ServedModel(compare, "float", may_be_float=True))
    limits = Limits(
        max_batch=max_batch,
        batch_wait_s=batch_wait / 1e3,
        max_pixels=max_pixels,
        max_steps=max_steps,
        max_waiting=max_waiting * 1e6,
        deadline_s=deadline,
        max_form=max_body * MB,
    )
    settings = ServerSettings(
        served,
        device or (),
        dtype,
        steps,
        guidance,
        [key for key in api_key or [] if key],
        _loras(lora),
        allow_unknown,
        limits,
        variant,
    )
    run(settings, host, port, drain_seconds)
