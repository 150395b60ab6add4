"""Replaces the layers of a float model by quantized ones: all of the plan, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ldmq_kernels.nn import QuantizedLayer, name_layers, quantized_class, timestep_groups
from ldmq_kernels.nn.guard import guard_if_asked
from ldmq_kernels.nn.kinds import FloatLayer, has_own_convolution, own_computation
from ldmq_kernels.numerics.gptq import Hessian
from ldmq_kernels.plans.layers import ADAPTED, modules_below_adapters, quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan
from ldmq_kernels.plans.weights import WeightsCheck

_listeners: list[Callable[[nn.Module, Plan], None]] = []


class ConversionError(ValueError):
    """A model that cannot be quantized as the plan says; it was left as it was."""


def on_conversion(listener: Callable[[nn.Module, Plan], None]) -> None:
    """Call `listener(model, plan)` after each conversion: how an integration learns what to save."""
    if listener not in _listeners:
        _listeners.append(listener)


def convert(
    model: nn.Module, plan: Plan, hessians: Mapping[str, Hessian] | Callable[[str], Hessian] | None = None
) -> None:
    """Replace every layer that the plan quantizes, in place; the others stay as they are, but frozen.

    Trainable parameters would make every call build a graph: `requires_grad_` thaws what is to be trained. Adapters,
    such as LoRA, stay upon the layers, and as trainable as they are.

    All quantized layers are built before the first one is put in, so an error leaves the model untouched. A plan that
    was made from other weights is applied with an `OtherWeightsWarning`.

    Args:
        hessians: layer -> (K, K) float32, or a `KroneckerHessian`, for the layers that the plan rounds by GPTQ,
            asked for in the model's order; see `calibration.hessian`. `ldmq.quantize` makes them of a pipeline.

    Raises:
        PlanError: the plan does not fit the model.
        ConversionError: the model is quantized already, has adapters fused that are not unloaded, is not called with
            the time step that timestep layers need, or one of its layers cannot be quantized.
    """
    check_convertible(model)
    layers = quantizable_layers(model)
    layer_plans = {name: p for name, p in plan.layers(model).items() if p.scheme.quantizes}
    if any(layer_plan.scheme.has_timestep_scales for layer_plan in layer_plans.values()):
        try:
            timestep_groups.timestep_place(model)
        except ValueError as error:
            raise ConversionError(str(error)) from None
    hessian_of = hessians.get if isinstance(hessians, Mapping) else hessians
    built: dict[nn.Module, nn.Module] = {}
    for name, layer_plan in layer_plans.items():
        hessian = hessian_of(name) if hessian_of is not None and layer_plan.needs_inputs else None
        built[layers[name]] = quantize_layer(name, layers[name], layer_plan, hessian)
    check = WeightsCheck(plan, model)
    for name, layer in layers.items():
        check.add(name, layer.weight)
    check.finish()
    replace_modules(model, built)
    name_layers(model)
    for module in {module: None for _, module in modules_below_adapters(model)}:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    timestep_groups.attach(model, plan.timestep_groups)
    guard_if_asked(model)
    for listener in _listeners:
        listener(model, plan)


def check_convertible(model: nn.Module) -> None:
    """Refuse a model that this package or another one has quantized, or whose adapters are fused and still there.

    Raises:
        ConversionError: it is.
    """
    for name, module in model.named_modules():
        if isinstance(module._modules.get(ADAPTED), nn.Module) and getattr(module, "merged_adapters", None):
            raise ConversionError(
                f"{name} has an adapter fused into its weight, which could not be taken out of the integers again: "
                "call `pipe.unload_lora_weights()` to keep it fused, or `pipe.unfuse_lora()`, then quantize"
            )
        if isinstance(module, QuantizedLayer) and module.scheme.quantizes:
            raise ConversionError(
                f"this {type(model).__name__} is quantized already ({name} is {module.scheme}): "
                "load the float model to quantize it in another way"
            )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ConversionError(
            f"this {type(model).__name__} is quantized already, with {getattr(method, 'value', method)}: "
            "load the float model instead"
        )


def dequantize(model: nn.Module) -> None:
    """Put float layers, of the weights that the integers stand for, in place of a model's quantized ones, in place."""
    made: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer) and layer.scheme.quantizes:
            plain = layer.structure_of(layer)
            weight = layer.weight.clone()
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            made[layer] = plain.train(layer.training)
    replace_modules(model, made)


def quantize_layer(
    name: str, layer: FloatLayer, layer_plan: LayerPlan, hessian: Hessian | None = None
) -> QuantizedLayer:
    """The quantized layer that takes the place of `layer`; see `QuantizedLayer.from_float`.

    Args:
        hessian: (K, K) float32, the second moments of the layer's inputs, or with what its outputs weigh a
            `KroneckerHessian`, where the plan rounds it by GPTQ.

    Raises:
        ConversionError: the layer computes something of its own, has hooks or a convolution that would be lost, holds
            no weight yet, its weight is not finite, or GPTQ rounding has no Hessian.
    """
    keep = "give it fp16 in the plan's exceptions to leave it as it is"
    own = "" if isinstance(layer, QuantizedLayer) else own_computation(layer)
    if own:
        raise ConversionError(f"{name}: {own}: {keep}")
    if not isinstance(layer, nn.Linear) and has_own_convolution(layer):
        raise ConversionError(
            f"{name}: its _conv_forward is replaced, as for tiling, and a quantized layer would lose that: quantize "
            'first and replace it then, or set padding_mode="circular" where both axes are tiled'
        )
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise ConversionError(
            f"{name}: its forward is hooked, and a quantized layer would lose that: quantize before "
            "offloading or adding hooks"
        )
    if layer.weight.is_meta:
        raise ConversionError(f"{name}: its weight is not in memory (meta device): quantize before offloading")
    if not layer.weight.is_floating_point():
        raise ConversionError(f"{name}: its weight is {layer.weight.dtype}, a floating dtype is needed: {keep}")
    needs_hessian = layer_plan.needs_inputs
    if needs_hessian and hessian is None:
        raise ConversionError(
            f"{name}: the plan rounds it by GPTQ, which takes the layer's inputs: quantize it within its pipeline, "
            "`ldmq.quantize(pipe, plan)`, or set its rounding to nearest in the plan's details"
        )
    device = layer.weight.device
    # a plan keeps the scales of schemes that it did not choose
    scales = layer_plan.scales if layer_plan.scheme.is_static else ()
    try:
        return quantized_class(layer).from_float(
            layer,
            layer_plan.scheme,
            input_scale=torch.tensor(scales, dtype=torch.float32, device=device) if scales else None,
            smoothing=None if layer_plan.smoothing is None else layer_plan.smoothing.to(device),
            first_token=layer_plan.first_token,
            bias_correction=layer_plan.bias_correction,
            hessian=hessian if needs_hessian else None,
        )
    except ValueError as error:
        raise ConversionError(f"{name}: {error}") from None


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the replacement wherever in the model its key is held, also more than once."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
