"""What ops and models are measured beside, by the names that `--against` takes."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness.machine import device
from benchmarks.harness.timing import Call

FP8_CAPABILITY = (8, 9)


def _always() -> str | None:
    return None


def _no_fp8() -> str | None:
    least = ".".join(map(str, FP8_CAPABILITY))
    if device().type != "cuda":
        return f"torch._scaled_mm in FP8 needs a GPU of compute capability {least} or newer, and this is a CPU"
    have = torch.cuda.get_device_capability()
    if have < FP8_CAPABILITY:
        return (
            f"torch._scaled_mm in FP8 needs compute capability {least} or newer, and this GPU has {have[0]}.{have[1]}"
        )
    return None


def not_installed(package: str, listed: str = "requirements-peers.txt") -> Callable[[], str | None]:
    """Why another tool cannot be measured: what to install, of the file in this folder that lists it."""

    def why() -> str | None:
        if importlib.util.find_spec(package) is not None:
            return None
        option = "--no-deps " if listed == "requirements-peers.txt" else ""
        return f"{package} is not installed: pip install {option}-r benchmarks/{listed}"

    return why


def _no_torchao_fp8() -> str | None:
    return not_installed("torchao")() or _no_fp8()


@dataclass(frozen=True)
class Baseline:
    """One way to compute what an op computes.

    Attributes:
        what: in words, for the help.
        usual_on: device types on which it is measured without being asked for.
        missing: says why it cannot be measured here; None where it can.
    """

    what: str
    usual_on: tuple[str, ...]
    missing: Callable[[], str | None] = _always


BASELINES = {
    "ldmq_with_quantize": Baseline("our op, and the quantization of its input before it", ("cpu", "cuda")),
    "ldmq_w8a8": Baseline("our op for int8 weights on the same input", ("cpu", "cuda")),
    "two_ops": Baseline("our linear, then our GEGLU and quantization", ("cpu", "cuda")),
    "two_launches": Baseline("our quantization of the input, then our int8 linear", ("cpu", "cuda")),
    "fp32": Baseline("torch's layer in float32", ("cpu",)),
    "bf16": Baseline("torch's layer in bfloat16", ("cpu",)),
    "fp16": Baseline("torch's layer in float16: cuBLAS, or the fastest algorithm of cuDNN", ("cuda",)),
    "eager": Baseline("the same steps in eager torch", ("cpu", "cuda")),
    "compiled": Baseline("the same by torch.compile with Inductor's defaults", ("cuda",)),
    "copy": Baseline("a copy of the input", ("cpu", "cuda")),
    "int_mm": Baseline("torch._int_mm, its epilogue by Inductor", ("cuda",)),
    "fp8": Baseline("torch._scaled_mm in FP8 e4m3, a scale a row", ("cuda",), _no_fp8),
    "torchao": Baseline("torchao, int8 dynamic", ("cuda",), not_installed("torchao")),
    "torchao_fp8": Baseline("torchao, FP8 e4m3 dynamic", ("cuda",), _no_torchao_fp8),
    "sdnq": Baseline("SDNQ, int8 dynamic", ("cuda",), not_installed("sdnq")),
}


def lazily(build: Callable[[], Call]) -> Call:
    """A call that is built when it is first made, so that what is not measured costs nothing."""
    built: list[Call] = []

    def call() -> Any:
        if not built:
            built.append(build())
        return built[0]()

    return call


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by Inductor, compiled once for all shapes; more than a few compilations are an error, not eager."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=True)


# -- other tools, on a whole model -------------------------------------------------------------------------


def by_torchao(model: nn.Module) -> nn.Module:
    """A copy with its linears by torchao: int8 weights and activations, a scale a token; it has no convolution."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    clone = copy.deepcopy(model)
    # or it changes Inductor's settings for the whole process, other baselines included
    quantize_(clone, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return clone


def by_torchao_fp8(model: nn.Module) -> nn.Module:
    """A copy with its linears by torchao: FP8 weights and activations, multiplied by torch._scaled_mm.

    Scales are per tensor: those per row it takes for bfloat16 alone.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    clone = copy.deepcopy(model)
    quantize_(clone, Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False))
    return clone


def by_sdnq(model: nn.Module) -> nn.Module:
    """A copy with all linears and convolutions by SDNQ, multiplied in int8."""
    from sdnq.quantizer import sdnq_post_load_quant

    return sdnq_post_load_quant(
        copy.deepcopy(model),
        weights_dtype="int8",
        quant_conv=True,
        use_quantized_matmul=True,
        use_quantized_matmul_conv=True,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
        add_skip_keys=False,
    )


TOOLS = {"torchao": by_torchao, "torchao_fp8": by_torchao_fp8, "sdnq": by_sdnq}
