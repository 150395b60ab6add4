"""Tensor-parallel sharding of a quantized model is refused: it would split biases, and leave the integers whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from ldmq_kernels.nn import QuantizedLayer


def watch_sharding(module: ModuleType) -> None:
    """Have torch's `parallelize_module` refuse quantized layers.

    Args:
        module: `torch.distributed.tensor.parallel.api`, which is complete.
    """
    original = module.parallelize_module
    wrapt.wrap_function_wrapper(module, "parallelize_module", _refuse)
    package = sys.modules.get("torch.distributed.tensor.parallel")
    if getattr(package, "parallelize_module", None) is original:  # it was imported before
        package.parallelize_module = module.parallelize_module  # type: ignore[union-attr]


def _refuse(parallelize: Callable[..., Any], _none: object, args: Any, kwargs: Any) -> Any:
    model = args[0] if args else kwargs.get("module")
    if model is not None:
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLayer) and layer.scheme.quantizes:
                raise ValueError(
                    f"{layer.name or name or 'the layer'} is quantized ({layer.scheme}), and tensor parallelism splits "
                    "float weights alone: split the latents or the two halves of guidance over the processes, use "
                    "fully_shard, or leave the model in float"
                )
    return parallelize(*args, **kwargs)
