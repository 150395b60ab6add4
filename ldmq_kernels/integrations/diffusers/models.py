"""What diffusers' models tell and offer, where their layers are quantized."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from torch import nn

from ldmq_kernels.files import NotJsonError
from ldmq_kernels.files.variants import VariantError, check_variant, variants_in
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.nn.packed import hold_plain
from ldmq_kernels.plans.layers import layer_shape

Call = Callable[..., Any]
LDMQ = b'"quant_method": "ldmq"'  # as it is in config.json


def wrap_models(module: ModuleType) -> None:
    """Have models count the weights of quantized layers, offload them plain, and refuse to cast to 8-bit floats.

    A variant that a quantized model's folder does not hold is refused with those that it does.

    Args:
        module: `diffusers.models.modeling_utils`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "ModelMixin.num_parameters", _num_parameters)
    wrapt.wrap_function_wrapper(module, "ModelMixin.enable_layerwise_casting", _enable_layerwise_casting)
    wrapt.wrap_function_wrapper(module, "ModelMixin.enable_group_offload", _offload_plain)
    wrapt.wrap_function_wrapper(module, "ModelMixin.from_pretrained", _from_pretrained)


def wrap_pipelines(module: ModuleType) -> None:
    """Have pipelines offload the weights of quantized layers plain, and refuse variants as models do.

    Args:
        module: `diffusers.pipelines.pipeline_utils`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "DiffusionPipeline.enable_sequential_cpu_offload", _offload_plain)
    wrapt.wrap_function_wrapper(module, "DiffusionPipeline.from_pretrained", _from_pretrained)


def _offload_plain(offload: Call, owner: Any, args: Any, kwargs: Any) -> Any:
    """Offloading moves tensors one by one, to disk or another device, where packed ones cannot go."""
    parts = [owner] if isinstance(owner, nn.Module) else owner.components.values()
    for part in parts:
        if isinstance(part, nn.Module):
            hold_plain(part)
    return offload(*args, **kwargs)


def _from_pretrained(load: Call, _kind: Any, args: Any, kwargs: Any) -> Any:
    """What diffusers makes of a folder; where that fails for want of the variant, which variants are there."""
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError) as error:
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if isinstance(error, VariantError) or not isinstance(place, str | os.PathLike):
            raise
        try:
            _check_variant(Path(place, kwargs.get("subfolder") or ""), kwargs)
        except VariantError as why:
            raise VariantError(f"{error} {why}") from None
        raise


def _check_variant(folder: Path, given: Mapping[str, Any]) -> None:
    try:
        parts = {name: variants for name, variants in variants_in(folder).items() if name not in given}
    except NotJsonError:
        return
    configs = [folder / "config.json", *(folder / name / "config.json" for name in parts)]
    is_quantized = any(LDMQ in file.read_bytes() for file in configs if file.is_file())
    if is_quantized or given.get("quantization_config") is not None:
        check_variant(folder, given.get("variant"), parts)


def wrap_registry(module: ModuleType) -> None:
    """Have the caches of diffusers, which know blocks by their class, take a fused block for what it was.

    Args:
        module: `diffusers.hooks._helpers`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "TransformerBlockRegistry.get", _metadata_of_block)


def _metadata_of_block(get: Call, _registry: Any, args: Any, kwargs: Any) -> Any:
    from ldmq_kernels.integrations.diffusers.fused import PLAIN  # not while diffusers is being imported

    (model_class,) = args or kwargs.values()
    return get(PLAIN.get(model_class, model_class))


def wrap_single_files(module: ModuleType) -> None:
    """Have `from_single_file` refuse a file of a quantized model, whose plan is in the config.json beside it.

    Args:
        module: `diffusers.loaders.single_file_model`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "FromOriginalModelMixin.from_single_file", _from_single_file)


def _from_single_file(load: Call, _model: Any, args: Any, kwargs: Any) -> Any:
    from ldmq_kernels.integrations.diffusers.integrity import CheckpointError, is_marked

    file = args[0] if args else kwargs.get("pretrained_model_link_or_path_or_dict")
    if isinstance(file, str | os.PathLike) and os.path.isfile(file) and is_marked(os.fspath(file)):
        raise CheckpointError(
            f"{os.path.basename(file)} is of a quantized model, and says what its tensors are in the config.json that "
            "was saved with it: load their folder with from_pretrained"
        )
    return load(*args, **kwargs)


def _quantized(model: nn.Module) -> list[QuantizedLayer]:
    return [m for m in model.modules() if isinstance(m, QuantizedLayer) and m.scheme.quantizes]


def _num_parameters(count: Call, model: Any, args: Any, kwargs: Any) -> int:
    """The number of the float model: a weight of integers is as many parameters, and none that is trained."""
    counted: int = count(*args, **kwargs)
    if args[0] if args else kwargs.get("only_trainable", False):
        return counted
    layers: list[Any] = _quantized(model)
    added = sum(layer.bias.numel() for layer in layers if layer.adds_bias)
    return counted - added + sum(math.prod(layer_shape(layer)) for layer in layers)


def _enable_layerwise_casting(enable: Call, model: Any, args: Any, kwargs: Any) -> Any:
    layers = _quantized(model)
    if layers:
        raise ValueError(
            f"this {type(model).__name__} is quantized ({len(layers)} layers, such as {layers[0].name}), and layerwise "
            "casting would store its norms, biases and scales in fewer bits, for noise and next to no bytes: quantize "
            "more of its layers instead, or enable it on the float model"
        )
    return enable(*args, **kwargs)
