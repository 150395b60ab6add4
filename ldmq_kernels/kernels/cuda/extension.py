"""The compiled extension, and what its functions take: addresses, sizes, a device and its stream."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels import dependent_launch
from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.gpu import FLOAT8_FROM, gpu_of
from ldmq_kernels.kernels.operands import check_float8, eight_bit
from ldmq_kernels.numerics.formats.float8 import FLOAT8

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
QUANTIZED = {torch.int8: "int8", FLOAT8: "float8_e4m3fn"}


@functools.cache
def load() -> ModuleType | None:
    """The extension, or None where the package was built without it; one that does not load warns."""
    try:
        return importlib.import_module("ldmq_kernels.kernels.cuda._binding")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(f"the CUDA extension does not load, build the package again: {error}", stacklevel=2)
        return None


def binding() -> ModuleType:
    """The loaded extension.

    Raises:
        Unsupported: the package was built without it.
    """
    module = load()
    if module is None:
        raise Unsupported("the package was built without its CUDA extension: install it with LDMQ_CUDA_ARCHS set")
    return module


def _driver_runs(module: ModuleType) -> bool:
    """Whether the driver serves the CUDA version that the extension was built with; one that is too old warns."""
    driver, build = (version // 1000 for version in module.versions())
    if driver < build:
        warnings.warn(
            f"the CUDA extension was built with CUDA {build} and the driver serves CUDA {driver}: the next backend "
            "serves its ops. Update the driver, or build the package again with an older CUDA",
            stacklevel=2,
        )
    return driver >= build


@functools.cache
def runs_on(capability: tuple[int, int]) -> bool:
    """Whether the extension runs on this compute capability: the driver takes it, and it holds code."""
    module = load()
    if module is None or not _driver_runs(module):
        return False
    return holds_code(module, capability[0] * 10 + capability[1])


def holds_code(module: ModuleType, capability: int, family: int = 0) -> bool:
    """Whether an extension has code for a GPU, of the kernels that are compiled from an architecture on.

    The code is the capability's own, or PTX of an older one; code with an "a" in its architecture's name runs on that
    one alone.

    Args:
        module: the extension.
        capability: of the GPU; 9.0 is 90.
        family: the lowest architecture that the kernels are compiled for, such as 89 for those of FP8.
    """
    names = [name for name in module.architectures().split(";") if int(name.rstrip("a")) >= family]
    return any(capability == int(name.rstrip("a")) or (name.isdigit() and capability > int(name)) for name in names)


def has_hopper_kernels() -> bool:
    """Whether the extension is there and has the kernels of sm_90a, with wgmma and TMA."""
    module = load()
    return module is not None and "90a" in module.architectures().split(";")


def target(x: Tensor) -> dict[str, Any]:
    """The arguments that say where to run: the device of `x` and its current stream.

    Raises:
        Unsupported: `x` is not on a CUDA device.
    """
    if x.device.type != "cuda":
        raise Unsupported(f"x is on {x.device}, must be on a CUDA device")
    return {"device": x.device.index, "stream": torch.cuda.current_stream(x.device).cuda_stream}


def dependent_target(x: Tensor) -> dict[str, Any]:
    """The same, and whether a kernel may be launched before the one in front of it has ended.

    Raises:
        Unsupported: `x` is not on a CUDA device.
    """
    return target(x) | {"dependent": dependent_launch.is_on(x.device)}


def source(x: Tensor, memory_format: torch.memory_format) -> dict[str, Any]:
    """The arguments that say what to read.

    Raises:
        Unsupported: the dtype or the memory format is not one that the kernels read.
    """
    if x.dtype not in DTYPES:
        raise Unsupported(f"x is {x.dtype}, must be float32, float16 or bfloat16")
    if not x.is_contiguous(memory_format=memory_format):
        raise Unsupported(f"x has strides {x.stride()}, must be {str(memory_format).removeprefix('torch.')}")
    return {"x": x.data_ptr(), "dtype": DTYPES[x.dtype]}


def quantized(x: Tensor, q_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that an op that quantizes stores beside `x`, int8 where none is asked for.

    Raises:
        Unsupported: neither int8 nor float8_e4m3fn, or FP8 for a GPU that has none or that the extension has no such
            kernels for.
    """
    stored = eight_bit(q_dtype)
    if stored == FLOAT8:
        check_float8(x.device)
        if not holds_code(binding(), gpu_of(x.device).capability, FLOAT8_FROM):
            raise Unsupported(
                f"the extension is built for {binding().architectures()}, its FP8 kernels need 89 or newer"
            )
    return stored


def stored_in(q: Tensor) -> dict[str, Any]:
    """The arguments that say where the quantized values go."""
    return {"q": q.data_ptr(), "q_dtype": QUANTIZED[q.dtype]}


def check_factors(factors: Tensor, name: str, x: Tensor, channels: int) -> None:
    """Accept one float32 factor for each channel, or one for all where it is an inverse scale.

    Raises:
        Unsupported: another dtype, device, layout or count.
    """
    counts = (1, channels) if name == "inv_scale" else (channels,)
    if factors.dtype != torch.float32 or factors.device != x.device or not factors.is_contiguous():
        raise Unsupported(f"{name} is {factors.dtype} on {factors.device}, must be contiguous float32 on {x.device}")
    if factors.numel() not in counts:
        raise Unsupported(f"{name} has {factors.numel()} elements, must have {' or '.join(map(str, counts))}")
