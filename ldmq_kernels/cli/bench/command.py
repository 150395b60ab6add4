"""The options of `ldmq bench`, and which of its three measurements they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldmq_kernels.cli.options import at_home

OF_OPS = (
    "shape",
    "backend",
    "tile",
    "dtype",
    "epilogue",
    "kernel",
    "stride",
    "cache",
    "rounds",
    "json",
    "csv",
    "compare",
)
OF_TUNING = ("out", "seconds")
OPS_PANEL, TUNE_PANEL = "One op, with --op", "The tuner, with --tune"


def _of_op(
    text: str, name: str | None = None, metavar: str | None = None, *, is_path: bool = False
) -> typer.models.OptionInfo:
    names, callback = () if name is None else (name,), at_home if is_path else None
    found: typer.models.OptionInfo = typer.Option(
        *names, help=text, metavar=metavar, callback=callback, rich_help_panel=OPS_PANEL
    )
    return found


Op = Annotated[
    list[str] | None, _of_op("The op, such as linear_w8a8; several with commas, or the option again.", "--op", "NAME")
]
Shape = Annotated[
    list[str] | None,
    _of_op(
        "Linears: MxNxK (tokens, output features, input features). Convolutions: NxCxHxWxK (samples, input channels, "
        "height, width, output channels). Others: MxK or NxCxHxW. Several as with --op. Without it: a usual shape.",
        "--shape",
        "SIZES",
    ),
]
Backend = Annotated[
    list[str] | None,
    _of_op("The backend, several as with --op. Without it: all that serve this machine's device.", "--backend", "NAME"),
]
Tile = Annotated[
    str | None,
    _of_op(
        "The tile that the one --backend takes, or the beginning of its name; a wrong name lists them.", None, "NAME"
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    _of_op("What goes in or comes out as floats. Without it: float16 on a GPU, float32 on a CPU."),
]
Epilogue = Annotated[
    list[str] | None,
    _of_op("What is added to a product: bias, residual, sample-bias (of a convolution), with commas.", None, "NAMES"),
]
Kernel = Annotated[int, typer.Option(help="Of a convolution: an odd size.", min=1, rich_help_panel=OPS_PANEL)]
Stride = Annotated[int, typer.Option(help="Of a convolution.", min=1, rich_help_panel=OPS_PANEL)]
Cache = Annotated[
    Literal["cold", "warm"] | None,
    _of_op("What the caches hold before a call: nothing of it, or all. Without it: cold on a GPU, warm on a CPU."),
]
Rounds = Annotated[int, typer.Option(help="Samples of each backend, in turns.", min=1, rich_help_panel=OPS_PANEL)]
Json = Annotated[Path | None, _of_op("Write what was measured as JSON, for --compare.", "--json", "FILE", is_path=True)]
Csv = Annotated[Path | None, _of_op("Write what was measured as CSV.", "--csv", "FILE", is_path=True)]
Compare = Annotated[
    Path | None,
    _of_op("Show how many times as fast this run is as an earlier one's --json.", None, "FILE", is_path=True),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Measure kernels' tiles and backends on this GPU and keep the fastest.",
        rich_help_panel=TUNE_PANEL,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(help="The file, in place of the one that the ops read.", callback=at_home, rich_help_panel=TUNE_PANEL),
]
Seconds = Annotated[
    float | None, typer.Option(help="Stop after so many; the next run goes on.", rich_help_panel=TUNE_PANEL)
]


def _check_together(context: typer.Context) -> None:
    """Refuse options of one measurement beside those of another."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    if {"op", "tune"} <= given:
        raise typer.BadParameter("give either --op or --tune")
    for head, names in (("op", OF_OPS), ("tune", OF_TUNING)):
        stray = [f"--{name}" for name in names if name in given]
        if stray and head not in given:
            raise typer.BadParameter(f"{' and '.join(stray)} can only be given with --{head}")


def _names(texts: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for text in texts or () for name in text.split(",") if name.strip())


def bench(
    context: typer.Context,
    op: Op = None,
    shape: Shape = None,
    backend: Backend = None,
    tile: Tile = None,
    dtype: Dtype = None,
    epilogue: Epilogue = None,
    kernel: Kernel = 3,
    stride: Stride = 1,
    cache: Cache = None,
    rounds: Rounds = 25,
    json: Json = None,
    csv: Csv = None,
    compare: Compare = None,
    tune: Tune = False,
    out: Out = None,
    seconds: Seconds = None,
) -> None:
    """Time quantized layers against float ones, or one op at shapes of your own, or tune the kernels for this GPU.

    Without options: layers of common shapes, in float and in several schemes, in turns.

    With --op: that op by each backend that serves here: milliseconds and their noise, TOPS, GB/s, and the share of
    what torch reaches on this machine in the same run.

    With --tune: it keeps the fastest tiles and backends; it exits with 3 where --seconds left shapes for another run.

    ldmq bench --op linear_w8a8 --shape 4096x1280x1280,77x640x2048 --epilogue bias,residual

    ldmq bench --op conv2d_w8a8 --shape 2x320x64x64x320 --backend triton --json before.json
    """
    _check_together(context)
    if tune:
        _run_tune(out, seconds)
    elif op:
        from ldmq_kernels.cli.bench.run import BenchRequest, run_op_bench

        run_op_bench(
            BenchRequest(
                ops=_names(op),
                shapes=_names(shape),
                backends=_names(backend),
                tile=tile,
                dtype=dtype,
                epilogue=_names(epilogue),
                cache=cache,
                kernel=kernel,
                stride=stride,
                rounds=rounds,
                json=json,
                csv=csv,
                compare=compare,
            )
        )
    else:
        from ldmq_kernels.cli.bench.layer_times import run_bench

        run_bench()


def _run_tune(out: Path | None, seconds: float | None) -> None:
    import torch

    from ldmq_kernels.tuning import tune

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, left = tune(device, out, seconds=seconds)
    print(f"{path}: {f'{left} shapes are left, run it again to go on' if left else 'all shapes are measured'}")
    raise typer.Exit(3 if left else 0)
