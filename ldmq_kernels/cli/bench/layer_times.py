"""`ldmq bench`: quantized layers of common shapes against float ones, in turns, on this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.ranges import channel_absmax, static_scale
from ldmq_kernels.cli.fitted import Column, output_console, print_fitted
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.plan import LayerPlan
from ldmq_kernels.progress import track
from ldmq_kernels.timing import interleaved, wall_ms

# Layers that carry a Stable Diffusion 1.5 UNet: (rows, in, out) and (batch, in, height, width, out), 3x3.
LINEARS = ((8192, 320, 320), (2048, 640, 640), (512, 1280, 1280), (2048, 640, 5120))
CONVOLUTIONS = ((2, 320, 64, 64, 320), (2, 640, 32, 32, 640), (2, 1280, 16, 16, 1280))
GAINING = "w8a8-static"  # what is compared with the narrow float
TESTED = (GAINING, "w8a8-dynamic", "w8a16")
ROUNDS = 5


def _cases() -> list[tuple[str, Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]]:
    linears = [(f"linear {m}x{k} -> {n}", lambda k=k, n=n: nn.Linear(k, n), (m, k)) for m, k, n in LINEARS]
    convolutions = [
        (f"conv 3x3 {n}x{c}x{h}x{w} -> {k}", lambda c=c, k=k: nn.Conv2d(c, k, 3, padding=1), (n, c, h, w))
        for n, c, h, w, k in CONVOLUTIONS
    ]
    return [*linears, *convolutions]


def _float_dtypes(device: torch.device) -> list[torch.dtype]:
    """float16 convolutions on a CPU take seconds: nobody would use them."""
    both = [torch.float32, torch.bfloat16]
    return [*both, torch.float16] if device.type == "cuda" else both


@torch.no_grad()
def time_layer(
    make: Callable[[], nn.Linear | nn.Conv2d], shape: tuple[int, ...], device: torch.device
) -> dict[str, float]:
    """Median seconds of one layer by dtype ("float32" ...) and by scheme, on 16-bit inputs."""
    torch.manual_seed(0)
    layer, x = make().to(device), torch.randn(shape, dtype=torch.float32, device=device)
    works: dict[str, Callable[[], Tensor]] = {}
    narrow = torch.float16 if device.type == "cuda" else torch.bfloat16

    def as_image(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    def work(module: nn.Module, given: Tensor) -> Callable[[], Tensor]:
        return lambda: module(given)

    for dtype in _float_dtypes(device):
        clone = make().to(device, dtype)
        if x.dim() == 4:
            clone = clone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        works[str(dtype).removeprefix("torch.")] = work(clone, as_image(x.to(dtype)))
    absmax = channel_absmax(layer, x).amax(0)
    for name in TESTED:
        scheme = SCHEMES[name]
        layer_plan = LayerPlan(scheme, "", static_scale(absmax, None, scheme) if scheme.is_static else None)
        works[name] = work(quantize_layer(name, layer.to(narrow), layer_plan), as_image(x.to(narrow)))
    samples = interleaved(works, device, rounds=ROUNDS, warm_up=2, clock=wall_ms)
    return {name: taken.median / 1e3 for name, taken in samples.items()}


def run_bench() -> None:
    """Time all shapes and print them as a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, cases = output_console(), _cases()
    dispatch.reset_dispatch_report()
    times = [time_layer(make, shape, device) for _, make, shape in track(cases, "shapes", len(cases), show=True)]
    narrow = "float16" if device.type == "cuda" else "bfloat16"
    columns = [Column("layer", is_number=False)]
    for name in times[0]:
        columns.append(
            Column(name.replace("-", "\n").replace("float", "fp"), rank=0 if name in (narrow, GAINING) else 1)
        )
    rows = [
        [label, *(f"{seconds * 1000:.2f}" for seconds in taken.values()), f"{taken[narrow] / taken[GAINING]:.2f}x"]
        for (label, _, _), taken in zip(cases, times, strict=True)
    ]
    title = f"milliseconds on {device}, medians of {ROUNDS} rounds in turns"
    print_fitted(console, title, [*columns, Column("gain")], rows)
    console.print(f"gain: {narrow} over {GAINING}; quantized layers take {narrow} activations. Who served them:")
    console.print(dispatch.dispatch_report(), markup=False)
