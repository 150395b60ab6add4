"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer; on a CPU, in Triton's interpreter.

Neither this package nor `serves` imports triton: the ops do, when one is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

import torch

OPS = (
    "conv2d_w4a8",
    "conv2d_w8a8",
    "conv2d_w8a16",
    "geglu_quantize",
    "group_norm_silu_quantize",
    "layer_norm_quantize",
    "linear_static_w8a8",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "quantize_per_sample",
    "quantize_per_token",
    "quantize_static",
    "silu_quantize",
)


class _Backend(ModuleType):
    """This package: an op's name is its function, also once something has imported the op's module."""

    def __getattr__(self, name: str) -> Any:
        if name not in OPS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{name}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if name in OPS and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Backend


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_new_enough(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def serves(device: torch.device) -> bool:
    """Whether these kernels run on `device`; on a CPU only where TRITON_INTERPRET=1 is set."""
    if not _is_installed():
        return False
    if device.type == "cuda":
        return _is_new_enough(device)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
