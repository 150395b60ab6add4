"""Merging adapters of PEFT into quantized layers: dequantize, add, quantize again; and back to the same bits.

PEFT's own `merge` computes the merged weight, of whatever method, on a float layer that stands in for the quantized
one. `unmerge` brings the integers back that were there before, which the adapter's layer keeps in main memory. A
layer whose plan rounds it by GPTQ is rounded to nearest meanwhile, since its inputs are not kept, and is named.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch import Tensor, nn

from ldmq_kernels.nn import QuantizedLayer

BEFORE = "_ldmq_before_merging"
Call = Callable[..., Any]


def watch_merging(module: ModuleType) -> None:
    """Have every adapter's layer of PEFT merge into quantized layers.

    Args:
        module: `peft.tuners.tuners_utils`, which is complete.
    """
    base = module.BaseTunerLayer
    init_subclass = base.__init_subclass__

    def wrap_subclass(cls: type, **kwargs: Any) -> None:
        init_subclass(**kwargs)
        _wrap(cls)

    base.__init_subclass__ = classmethod(wrap_subclass)
    there = [*base.__subclasses__()]
    while there:
        cls = there.pop()
        _wrap(cls)
        there.extend(cls.__subclasses__())


class RoundedToNearestWarning(UserWarning):
    """Layers that a plan rounds by GPTQ, and that are rounded to nearest while an adapter is fused into them."""


def watch_model_fusing(module: ModuleType) -> None:
    """Have a model whose adapters are fused name the layers that GPTQ rounded.

    Args:
        module: `diffusers.loaders.peft`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "PeftAdapterMixin.fuse_lora", _fuse_model)


def watch_encoder_fusing(module: ModuleType) -> None:
    """The same for a pipeline's text encoders.

    Args:
        module: `diffusers.loaders.lora_base`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "fuse_text_encoder_lora", _fuse_encoder)


def _fuse_model(fuse: Call, model: Any, args: Any, kwargs: Any) -> Any:
    fused = fuse(*args, **kwargs)
    _name_rounded(model)
    return fused


def _fuse_encoder(fuse: Call, _none: object, args: Any, kwargs: Any) -> Any:
    fused = fuse(*args, **kwargs)
    _name_rounded(args[0] if args else kwargs["text_encoder"])
    return fused


def _name_rounded(model: nn.Module) -> None:
    plan = getattr(getattr(vars(model).get("hf_quantizer"), "quantization_config", None), "plan", None)
    if plan is None:
        return
    merged = [name for name, module in model.named_modules() if BEFORE in vars(module)]
    rounded = [name for name in merged if plan.details.get(name, {}).get("rounding", "nearest") != "nearest"]
    if rounded:
        warnings.warn(
            f"{len(rounded)} layers that the plan rounds by GPTQ are rounded to nearest with the adapter in them, as "
            f"the inputs that GPTQ takes are not kept: {', '.join(rounded)}. unfuse_lora brings their bits back; for "
            "GPTQ with the adapter, fuse it into the float pipeline, unload it, and plan and quantize that",
            RoundedToNearestWarning,
            stacklevel=4,
        )


def _wrap(cls: type) -> None:
    for name, wrapper in (("merge", _merge), ("unmerge", _unmerge)):
        own = vars(cls).get(name)
        if own is not None and not isinstance(own, wrapt.FunctionWrapper):
            wrapt.wrap_function_wrapper(cls, name, wrapper)


def _merge(merge: Call, tuner: Any, args: Any, kwargs: Any) -> Any:
    holder, layer = _quantized(tuner)
    if layer is None:
        return merge(*args, **kwargs)
    merged = list(tuner.merged_adapters)
    before = vars(tuner).get(BEFORE) or _Stored(layer)
    stand_in = _float_layer(layer)
    try:
        _call_on(merge, args, kwargs, holder, layer, stand_in)
        if tuner.merged_adapters == merged:  # there was nothing to merge
            return None
        layer.requantize(stand_in.weight.data, None if stand_in.bias is None else stand_in.bias.data)
    except ValueError as error:
        tuner.merged_adapters = merged
        raise ValueError(f"{layer.name or 'a layer'}: {error}; its adapters are not merged") from None
    except Exception:
        tuner.merged_adapters = merged
        raise
    vars(tuner)[BEFORE] = before
    return None


def _unmerge(unmerge: Call, tuner: Any, args: Any, kwargs: Any) -> Any:
    holder, layer = _quantized(tuner)
    before: _Stored | None = vars(tuner).get(BEFORE)
    if layer is None or before is None:
        return unmerge(*args, **kwargs)
    _call_on(unmerge, args, kwargs, holder, layer, _float_layer(layer))  # what it computes is not needed
    if not tuner.merged_adapters:
        layer.refill(before.tensors, before.bias)
        del vars(tuner)[BEFORE]
    return None


class _Stored:
    """What a layer held."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.tensors = {name: tensor.cpu() for name, tensor in layer.stored_tensors().items()}
        self.bias: Tensor | None = None if layer.bias is None else layer.bias.detach().cpu()


def _quantized(tuner: Any) -> tuple[Any, QuantizedLayer | None]:
    """The quantized layer below an adapter, or adapters upon adapters, and who holds it."""
    holder = tuner
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    layer = holder.base_layer
    return holder, layer if isinstance(layer, QuantizedLayer) and layer.scheme.quantizes else None


def _float_layer(layer: QuantizedLayer) -> Any:
    """A float layer of the weight that the integers stand for, and of the bias, both its own.

    Raises:
        RuntimeError: the layer is not in memory.
    """
    if any(tensor.is_meta for tensor in layer.stored_tensors().values()):
        raise RuntimeError(f"{layer.name or 'a layer'} is not in memory: merge its adapters before it is offloaded")
    made = layer.structure_of(layer)
    weight = layer.from_channels_last(layer.real_weight()).clone(memory_format=torch.contiguous_format)
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return made


def _call_on(call: Call, args: Any, kwargs: Any, holder: Any, layer: QuantizedLayer, stand_in: nn.Module) -> None:
    holder.base_layer = stand_in
    try:
        with torch.no_grad():
            call(*args, **kwargs)
    finally:
        holder.base_layer = layer
