"""The tensors of quantized layers are refused where float layers would take the integers for their weights.

torch lets a layer refuse what is loaded into it, and not where its own tensors go. So `load_state_dict` is wrapped,
once, when this package's layers are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import wrapt
from torch import Tensor, nn

from ldmq_kernels.nn.kinds import CLASSES, FloatLayer
from ldmq_kernels.nn.packed import SAVED_NAME
from ldmq_kernels.numerics.formats import FORMATS
from ldmq_kernels.numerics.formats.float8 import FLOAT8

INTEGERS = (torch.int8, torch.uint8)
LARGE_FLOAT8 = (0x78, 0x7E)  # the bits of 256 and 448, without the sign


def watch_loading() -> None:
    """Have torch's `load_state_dict` refuse what `refuse_integers` refuses."""
    wrapt.wrap_function_wrapper("torch.nn", "Module.load_state_dict", _load_state_dict)


def _load_state_dict(load: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    state_dict = args[0] if args else kwargs.get("state_dict")
    if isinstance(state_dict, Mapping):
        refuse_integers(module, state_dict)
    return load(*args, **kwargs)


def refuse_integers(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict that has the stored weights of a quantized layer where a module has a float one.

    Args:
        module: into which the state dict would be loaded.
        state_dict: of any module.

    Raises:
        ValueError: it has; the text names the first such layer.
    """
    leaves = {leaf for format in FORMATS.values() for leaf in format.weight.buffers((1, 1))} - {"weight"}
    for key in state_dict:
        name, _, leaf = key.rpartition(".")
        if leaf not in leaves:
            continue
        weight = state_dict.get(f"{name}.weight" if name else "weight")
        if not isinstance(weight, Tensor) or (weight.is_floating_point() and weight.dtype != FLOAT8):
            continue
        if _is_float(_layer(module, name), leaf):
            saved = getattr(state_dict, "_metadata", {}).get(name, {}).get(SAVED_NAME)
            raise ValueError(
                f"{saved or name or 'the layer'} is quantized in this state dict ({weight.dtype} and {leaf}) and a "
                f"float layer in this {type(module).__name__}, which would take the integers for weights: make it from "
                "the float model and quantize it then with ldmq.quantize, or load what was saved with from_pretrained"
            )
    for key, tensor in state_dict.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and isinstance(tensor, Tensor) and (tensor.dtype in INTEGERS or tensor.dtype == FLOAT8):
            layer = _layer(module, name)
            if type(layer) in CLASSES.values() and _is_float(layer, "") and _needs_a_scale(tensor):
                raise ValueError(
                    f"{key} is {tensor.dtype}, and {name or 'the layer'} is a float layer in this "
                    f"{type(module).__name__}: these are values of a quantized layer, without their scale; give it "
                    "that layer's `weight`, which is floating, or make it from the float model"
                )


def _needs_a_scale(weight: Tensor) -> bool:
    """Whether a weight is in units of a scale: integers, or FP8 most of whose channels reach 256.

    What is merely cast to FP8, as some checkpoints are, has the size of the float weight, far below that; by its
    scale a channel's largest value is 448, or a step or two lower after GPTQ.
    """
    if weight.dtype != FLOAT8:
        return True
    if weight.is_meta or not weight.numel():
        return False
    bits, (first, last) = weight.view(torch.uint8).flatten(1) & 127, LARGE_FLOAT8
    return bool(((bits >= first) & (bits <= last)).any(1).float().mean() > 0.5)


def _layer(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _is_float(layer: nn.Module | None, leaf: str) -> bool:
    """Whether a layer holds a floating weight, and knows nothing of what another package may call as we do."""
    if not isinstance(layer, FloatLayer) or layer._load_state_dict_pre_hooks:
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and weight.is_floating_point() and leaf not in {**layer._parameters, **layer._buffers}
