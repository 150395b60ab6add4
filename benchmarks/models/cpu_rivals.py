"""What a model on a CPU is measured beside: torch eager and compiled, OpenVINO, torchao and SDNQ.

Each makes a call from the float model and its inputs. OpenVINO's int8 is NNCF's, static, calibrated on these inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import by_openvino
from benchmarks.harness.baselines import TOOLS, not_installed
from benchmarks.harness.timing import Call

Inputs = dict[str, Any]


def multiplies_bf16() -> bool:
    """Whether this processor has bfloat16 products; without, torch's take many times as long as float32's."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def by_torch(model: nn.Module, inputs: Inputs) -> Call:
    """A call without gradients."""

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs)[0]

    return call


def _compiled(model: nn.Module, inputs: Inputs) -> Call:
    return by_torch(torch.compile(model), inputs)  # type: ignore[arg-type]


def _by_tool(tool: str, model: nn.Module, inputs: Inputs) -> Call:
    quantized = TOOLS[tool](model)
    return by_torch(torch.compile(quantized), inputs)  # type: ignore[arg-type]


def _by_openvino(is_int8: bool, model: nn.Module, inputs: Inputs) -> Call:
    graph, tensors = by_openvino.converted(model, (), inputs), by_openvino.tensors_of((), inputs)
    request = by_openvino.request(by_openvino.quantized(graph, [tensors]) if is_int8 else graph)
    arrays = [tensor.numpy() for tensor in tensors]
    return lambda: request.infer(arrays)


RIVALS: dict[str, Callable[[nn.Module, Inputs], Call]] = {
    "fp32": by_torch,
    "bf16": by_torch,
    "compiled": _compiled,
    "openvino": partial(_by_openvino, False),
    "openvino_int8": partial(_by_openvino, True),
    "torchao": partial(_by_tool, "torchao"),
    "sdnq": partial(_by_tool, "sdnq"),
}
WORDS = {
    "fp32": "torch in float32",
    "bf16": "torch in bfloat16",
    "compiled": "torch.compile",
    "openvino": "OpenVINO",
    "openvino_int8": "OpenVINO int8 (NNCF, static)",
    "torchao": "torchao int8, compiled",
    "sdnq": "SDNQ int8, compiled",
    "w8a8": "this package, W8A8",
}


def missing(name: str) -> str | None:
    """Why a rival cannot be measured here; None where it can."""
    if name == "bf16" and not multiplies_bf16():
        return "this processor has no bfloat16 products"
    packages = {"openvino": ["openvino"], "openvino_int8": ["openvino", "nncf"]}
    listed = "requirements-openvino.txt" if name in packages else "requirements-peers.txt"
    needed = packages.get(name, [name] if name in TOOLS else [])
    return next((why for package in needed if (why := not_installed(package, listed)())), None)
