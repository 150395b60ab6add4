"""A model on a CPU: float, other tools and W8A8 in turn, and their peak memory.

Weights are random but for the demo model's, so these are speed figures and say nothing of quality. W8A8 keeps all that
is not a linear or a convolution in bfloat16 where the processor multiplies it, else in float32.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import ldmq_kernels as ldmq
from benchmarks.harness.tables import markdown
from benchmarks.harness.timing import Call, medians
from benchmarks.models import cpu_rivals
from benchmarks.models.cpu_rivals import RIVALS, WORDS, by_torch, multiplies_bf16
from benchmarks.models.definitions import MODELS, Model, decoder_of_512, demo, pixart
from benchmarks.models.gpu import INPUT_SCALE
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES

OURS = "w8a8"


class Subject(NamedTuple):
    """What is measured: its results' name, its words for the pages, the model and the batch of a call."""

    key: str
    words: str
    model: Model
    batch: int = 1


SUBJECTS = {
    "sd15": Subject("unet_sd15_cpu", "A UNet of SD 1.5's size on a CPU", MODELS["sd15"]),
    "sdxl": Subject("unet_sdxl_cpu", "A UNet of SDXL's size on a CPU", MODELS["sdxl"]),
    "vae_decoder": Subject("vae_decoder_cpu", "The VAE's decoder on a CPU, 512x512", decoder_of_512()),
    "pixart": Subject("pixart_cpu", "Eight of PixArt's 28 blocks on a CPU, 512x512", pixart()),
    "demo": Subject("demo_cpu", "The demo model's UNet on a CPU", demo(), 2),
    "demo_batch16": Subject("demo_batch16_cpu", "The demo model's UNet on a CPU", demo(), 16),
}


def _fill(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Give one module's own parameters and buffers random values of the variance that keeps activations near 1."""
    for name, parameter in module.named_parameters(recurse=False):
        value = torch.empty(parameter.shape, dtype=dtype)
        if parameter.dim() > 1:
            value.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(1.0 if name == "weight" else 0.0)
        if value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):  # such as PixArt's places of its tokens
        setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype).normal_(generator=generator))


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
        layer.bias = nn.Parameter(torch.zeros(channels, dtype=_dtype(OURS)), requires_grad=False)
    layer.finish()
    return layer


def build(name: str, variant: str) -> nn.Module:
    """The model, made layer by layer, so that no more of it is ever in memory than the variant keeps."""
    made = SUBJECTS[name].model.make
    if name.startswith("demo"):
        unet = made()
        return ldmq.quantize(unet, scheme="w8a8-dynamic") if variant == OURS else unet
    with torch.device("meta"):
        model = made()
    generator = torch.Generator().manual_seed(0)
    for path, module in list(model.named_modules()):
        if variant == OURS and isinstance(module, nn.Linear | nn.Conv2d):
            model.set_submodule(path, _quantized(module, generator))
        else:
            _fill(module, _dtype(variant), generator)
    return model.eval()


def _dtype(variant: str) -> torch.dtype:
    is_narrow = variant == "bf16" or (variant in (OURS, "compiled") and multiplies_bf16())
    return torch.bfloat16 if is_narrow else torch.float32


def caller(name: str, variant: str) -> Call:
    """One step of a variant."""
    model, subject = build(name, variant), SUBJECTS[name]
    torch.manual_seed(1)
    dtype = torch.float32 if name.startswith("demo") else _dtype(variant)
    inputs = subject.model.inputs(torch.device("cpu"), dtype, batch=subject.batch)
    return by_torch(fuse(model), inputs) if variant == OURS else RIVALS[variant](model, inputs)


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


def measure(name: str, rounds: int = 7, against: Collection[str] = ("fp32", "bf16")) -> Iterator[dict[str, Any]]:
    """A row for each variant: memory in processes of their own, then times in turn."""
    variants = [*against, OURS]
    memory = {variant: memory_of(name, variant) for variant in variants}
    ms = medians({variant: caller(name, variant) for variant in variants}, rounds)
    key = SUBJECTS[name].key
    summary = {f"{key}/vs_{variant}": ms[variant] / ms[OURS] for variant in against}
    if "fp32" in variants:
        summary[f"{key}/peak_memory_share"] = memory[OURS]["peak"] / memory["fp32"]["peak"]
    for variant in variants:
        row = {"op": key, "name": variant, "backend": variant, "ms": ms[variant], "memory": memory[variant]}
        yield row | ({"summary": summary} if variant == OURS else {})


def usual_rivals() -> list[str]:
    """What a model is measured beside if nothing else is asked for: all that is there."""
    return [name for name in RIVALS if cpu_rivals.missing(name) is None]


def table(data: dict[str, Any]) -> str:
    """Milliseconds and peak memory of each, for the pages."""
    of_key = {subject.key: subject for subject in SUBJECTS.values()}
    first = next(iter(data["summary"])).partition("/")[0]
    subject, rows = of_key[first], {row["backend"]: row for row in data["rows"]}
    lines = [
        [
            WORDS[name],
            f"{row['ms']:.0f}" if row["ms"] >= 100 else f"{row['ms']:.1f}",
            f"{row['ms'] / rows[OURS]['ms']:.2f}",
            f"{row['memory']['peak'] / 2**20:.0f}",
        ]
        for name, row in rows.items()
    ]
    weights = "its own weights" if subject.key.startswith("demo") else "random weights"
    title = f"**{subject.words}** ({weights}, batch {subject.batch}, {data['threads']} threads)"
    return f"{title}\n\n" + markdown(["", "ms", "times W8A8's", "peak MiB"], lines)


def text(row: dict[str, Any]) -> str:
    """A row as lines for a terminal."""
    line = f"{WORDS[row['name']]:30} {row['ms']:8.1f} ms  peak {row['memory']['peak'] / 2**20:6.0f} MiB"
    return "\n".join([line, *(f"{key}: {value:.3f}" for key, value in row.get("summary", {}).items())])
