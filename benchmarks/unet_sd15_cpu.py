"""A UNet of Stable Diffusion 1.5's size on a CPU: float32, bfloat16 and W8A8 in turn, and their peak memory.

Weights are random, so these are speed figures and say nothing of quality. W8A8 keeps everything
that is not a linear or a convolution in bfloat16. Run: python benchmarks/unet_sd15_cpu.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks import common
from benchmarks.models import SD15
from ldmq_kernels.integrations.diffusers.fused import fuse
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES

VARIANTS = ("fp32", "bf16", "w8a8")
INPUT_SCALE = 8 / 127  # of random activations after a norm, in place of a calibrated one
LATENTS, TEXT = (1, 4, 64, 64), (1, 77, 768)


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
    layer.weight = torch.randint(-127, 128, layer.weight.shape, dtype=torch.int8, generator=generator)
    deviation = 254 / 12**0.5
    channels = layer.weight_scale.shape[0]
    layer.weight_scale = torch.full((channels,), (layer.weight.numel() / channels) ** -0.5 / deviation)
    layer.input_scale = torch.tensor([INPUT_SCALE])
    if module.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(channels, dtype=torch.bfloat16), requires_grad=False)
    layer.finish()
    return layer


def build(variant: str) -> UNet2DConditionModel:
    """The UNet, made layer by layer, so that no more of it is ever in memory than the variant keeps."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if variant == "fp32" else torch.bfloat16
    for name, module in list(unet.named_modules()):
        if variant == "w8a8" and isinstance(module, nn.Linear | nn.Conv2d):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, _quantized(module, generator))
        else:
            _fill(module, dtype, generator)
    return fuse(unet.eval())


def caller(unet: UNet2DConditionModel) -> Callable[[], Tensor]:
    """One step at 64x64 latents, batch 1."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(unet.conv_norm_out.parameters()).dtype
    latents = torch.randn(LATENTS, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    text = torch.randn(TEXT, generator=generator).to(dtype)
    timestep = torch.tensor(500)

    def call() -> Tensor:
        with torch.inference_mode():
            return unet(latents, timestep, text, return_dict=False)[0]

    return call


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure_memory(variant: str) -> dict[str, int]:
    """Peak bytes of a process that builds one variant and calls it twice, above what it held before."""
    command = [sys.executable, __file__, "--memory-of", variant, "--threads", str(torch.get_num_threads())]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:])
    return {"imports": before, "peak": after}


def main() -> None:
    """Measure memory in processes of their own, then time the variants in turn, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=VARIANTS, help="print the peak memory of one variant, and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        before = peak_bytes()
        call = caller(build(options.memory_of))
        call(), call()
        print(before, peak_bytes())
        return
    memory = {variant: measure_memory(variant) for variant in VARIANTS}
    ms = common.interleaved_ms({variant: caller(build(variant)) for variant in VARIANTS}, options.rounds)
    rows = [
        {"op": "unet_sd15", "backend": variant, "ms": ms[variant], "memory": memory[variant]} for variant in VARIANTS
    ]
    summary = {
        "unet_sd15_cpu/vs_fp32": ms["fp32"] / ms["w8a8"],
        "unet_sd15_cpu/vs_bf16": ms["bf16"] / ms["w8a8"],
        "unet_sd15_cpu/peak_memory_share": memory["w8a8"]["peak"] / memory["fp32"]["peak"],
    }
    path = common.write_results("unet_sd15_cpu", rows, summary)
    for variant in VARIANTS:
        print(f"{variant}: {ms[variant]:8.0f} ms  peak {memory[variant]['peak'] / 2**20:6.0f} MiB")
    print("\n".join(f"{key}: {value:.3f}" for key, value in summary.items()), path, sep="\n")


if __name__ == "__main__":
    main()
