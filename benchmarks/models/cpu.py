"""A UNet on a CPU at batch 1: float32, bfloat16 and W8A8 in turn, and their peak memory.

Weights are random, so these are speed figures and say nothing of quality. W8A8 keeps everything
that is not a linear or a convolution in bfloat16.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.tables import markdown
from benchmarks.harness.timing import Call, medians
from benchmarks.models.definitions import MODELS
from benchmarks.models.gpu import INPUT_SCALE
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES

UNETS = ("sd15", "sdxl")
BASELINES = ("fp32", "bf16")
VARIANTS = (*BASELINES, "w8a8")
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL"}


def _fill(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give one module's own parameters random values of the variance that keeps activations near 1."""
    for name, parameter in module.named_parameters(recurse=False):
        value = torch.empty(parameter.shape, dtype=dtype)
        if parameter.dim() > 1:
            value.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(1.0 if name == "weight" else 0.0)
        if value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        setattr(module, name, nn.Parameter(value, requires_grad=False))


def _quantized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """The layer in W8A8 with random integers, filled as a checkpoint's loader fills it."""
    kind = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
    layer = kind.empty(module, SCHEMES["w8a8-static"], smoothed=False)
    layer.fill("weight", torch.randint(-127, 128, layer.plain_weight.shape, dtype=torch.int8, generator=generator))
    deviation = 254 / 12**0.5
    channels = layer.weight_scale.shape[0]
    layer.weight_scale = torch.full((channels,), (layer.plain_weight.numel() / channels) ** -0.5 / deviation)
    layer.input_scale = torch.tensor([INPUT_SCALE])
    if module.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(channels, dtype=torch.bfloat16), requires_grad=False)
    layer.finish()
    return layer


def build(name: str, variant: str) -> nn.Module:
    """The UNet, made layer by layer, so that no more of it is ever in memory than the variant keeps."""
    with torch.device("meta"):
        unet = MODELS[name].make()
    generator = torch.Generator().manual_seed(0)
    for path, module in list(unet.named_modules()):
        if variant == "w8a8" and isinstance(module, nn.Linear | nn.Conv2d):
            unet.set_submodule(path, _quantized(module, generator))
        else:
            _fill(module, _dtype(variant), generator)
    return fuse(unet.eval())


def _dtype(variant: str) -> torch.dtype:
    return torch.float32 if variant == "fp32" else torch.bfloat16


def caller(name: str, variant: str) -> Call:
    """One step of a variant at batch 1."""
    unet = build(name, variant)
    torch.manual_seed(1)
    inputs = MODELS[name].inputs(torch.device("cpu"), _dtype(variant), batch=1)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return unet(**inputs)[0]

    return call


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_of(name: str, variant: str) -> dict[str, int]:
    """Peak bytes of a process that builds one variant and calls it twice, and what it held before.

    Raises:
        RuntimeError: the process failed, such as for want of memory.
    """
    code = f"from benchmarks.models.cpu import print_memory; print_memory({name!r}, {variant!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} in {variant} does not run on this CPU: {run.stderr[-500:] or run.returncode}")
    before, after = map(int, run.stdout.split()[-2:])
    return {"imports": before, "peak": after}


def print_memory(name: str, variant: str) -> None:
    """What `memory_of` asks of a new process."""
    before = peak_bytes()
    call = caller(name, variant)
    call(), call()
    print(before, peak_bytes())


def measure(name: str, rounds: int = 7, against: Collection[str] = BASELINES) -> Iterator[dict[str, Any]]:
    """A row for each variant: memory in processes of their own, then times in turn."""
    variants = [variant for variant in VARIANTS if variant == "w8a8" or variant in against]
    memory = {variant: memory_of(name, variant) for variant in variants}
    ms = medians({variant: caller(name, variant) for variant in variants}, rounds)
    key = f"unet_{name}_cpu"
    summary = {f"{key}/vs_{variant}": ms[variant] / ms["w8a8"] for variant in variants if variant != "w8a8"}
    if "fp32" in variants:
        summary[f"{key}/peak_memory_share"] = memory["w8a8"]["peak"] / memory["fp32"]["peak"]
    for variant in variants:
        row = {"op": f"unet_{name}", "name": variant, "backend": variant, "ms": ms[variant], "memory": memory[variant]}
        yield row | ({"summary": summary} if variant == "w8a8" else {})


def table(data: dict[str, Any]) -> str:
    """How much faster W8A8 is, and what memory it takes, for the pages."""
    name = data["rows"][0]["op"].removeprefix("unet_")
    words = {
        "vs_fp32": "W8A8 over float32, times as fast",
        "vs_bf16": "W8A8 over bfloat16, times as fast",
        "peak_memory_share": "peak memory, share of float32's",
    }
    found = {key.rpartition("/")[2]: value for key, value in data["summary"].items()}
    lines = [[text, f"{found[key]:.2f}"] for key, text in words.items() if key in found]
    return f"**A UNet of {NAMES[name]}'s size on a CPU** (random weights, batch 1)\n\n" + markdown(["", ""], lines)


def text(row: dict[str, Any]) -> str:
    """A row as lines for a terminal."""
    line = f"{row['name']:6} {row['ms']:8.0f} ms  peak {row['memory']['peak'] / 2**20:6.0f} MiB"
    return "\n".join([line, *(f"{key}: {value:.3f}" for key, value in row.get("summary", {}).items())])
