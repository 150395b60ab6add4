"""What transformers' loader calls while it fills a text or image encoder.

A checkpoint of a quantized encoder: each quantized layer is loaded into the float layer's place, its tensors as they
are in the file, and takes it when all are there. A float checkpoint is loaded as it is, and converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from ldmq_kernels.conversion.convert import ConversionError, convert, quantized_class, replace_modules
from ldmq_kernels.integrations.diffusers.config import LdmqConfig, refuse_disk
from ldmq_kernels.integrations.diffusers.integrity import (
    MARK,
    SAVE_AGAIN,
    CheckpointError,
    TensorChecks,
    checksums,
    without_adapters,
)
from ldmq_kernels.nn import QuantizedLayer, name_layers
from ldmq_kernels.nn.guard import guard_if_asked
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan


class LdmqEncoderQuantizer(HfQuantizer):
    """transformers' side of `LdmqConfig`."""

    quantization_config: LdmqConfig

    def __init__(self, quantization_config: LdmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._quantized: dict[str, QuantizedLayer] = {}  # on the meta device, by name, while a model is loaded
        self._layer_plans: Mapping[str, LayerPlan] = {}
        self._stored: set[str] = set()

    @property
    def is_trainable(self) -> bool:
        """Adapters are; the weights are not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True."""
        return True

    def is_serializable(self) -> bool:
        """True."""
        return True

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Refuse to leave layers on disk.

        Raises:
            ValueError: the device map says "disk" somewhere.
        """
        refuse_disk(device_map)

    # -- before and while the weights come -----------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        plan = self.quantization_config.plan
        if plan is None or self.quantization_config.checksums is None:
            raise CheckpointError(f"config.json has no plan with checksums: it is damaged: {SAVE_AGAIN}")
        layers = quantizable_layers(model)
        self._layer_plans = {
            name: layer_plan
            for name, layer_plan in plan.layers(model, vectors_elsewhere=True).items()
            if layer_plan.scheme.quantizes
        }
        in_float32 = model._get_dtype_plan(model.dtype)
        for name, layer_plan in self._layer_plans.items():
            layer = layers[name]
            if any(re.search(pattern.replace("*", ".*"), f"{name}.weight") for pattern in in_float32):
                layer.float()
            self._quantized[name] = quantized = _empty(layer, name, layer_plan, plan)
            _make_room(layer, quantized)
            self._stored |= {f"{name}.{leaf}" for leaf in quantized.state_dict() if leaf in layer_plan.scheme.dtypes}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Tensors of quantized layers keep the dtype that they have in the file."""
        if self._stored.intersection(getattr(converter, "target_patterns", ())):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **_kwargs: Any) -> bool:
        """Whether a tensor has another shape than the float layer's: packed, or with its channels last."""
        return self.pre_quantized and param_name in self._stored

    # -- after the weights ---------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        if self.pre_quantized:
            self._put_in(model)
            attach(model, self.quantization_config)
            return model
        plan = self.quantization_config.plan_for(model)
        if plan.needs_inputs:
            raise ConversionError(
                "this plan rounds weights by GPTQ, which takes the inputs of their layers: load the encoder in full "
                "precision and quantize it then; what it saves loads as it is"
            )
        del model.config.quantization_config, model.hf_quantizer  # it is a float model yet
        convert(model, plan)  # which attaches a quantizer of the plan
        return model

    def _put_in(self, model: Any) -> None:
        """The quantized layers in the places of those that hold their tensors, once all of these are checked."""
        layers = quantizable_layers(model)
        held: dict[str, Tensor] = {}
        for name, quantized in self._quantized.items():
            layer = layers[name]
            held |= {f"{name}.{leaf}": getattr(layer, leaf).detach() for leaf in quantized.state_dict()}
            quantized.bias = layer.bias
        replace_modules(model, {layers[name]: quantized for name, quantized in self._quantized.items()})
        said = (self.quantization_config.checksums or {}).get("tensors")
        loaded = {name: tensor for name, tensor in model.state_dict().items() if name not in held}
        TensorChecks(model, self._layer_plans, said, ["the checkpoint"]).check_file(loaded | held)
        for name, quantized in self._quantized.items():
            for leaf in quantized.scheme.dtypes:
                if f"{name}.{leaf}" in held:
                    quantized.fill(leaf, held[f"{name}.{leaf}"])
            quantized.finish()
        name_layers(model)
        model.requires_grad_(False)
        guard_if_asked(model)
        self._quantized, self._layer_plans, self._stored = {}, {}, set()

    # -- saving --------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is written: the tensors without adapters; config.json, which is written next, gets their checksums."""
        config = self.quantization_config
        config.checksums = checksums(model, config.to_dict()["plan"])
        return without_adapters(model.state_dict()), dict(MARK)


def _empty(layer: Any, name: str, layer_plan: LayerPlan, plan: Plan) -> QuantizedLayer:
    return quantized_class(layer).empty(
        layer,
        layer_plan.scheme,
        smoothed=name in plan.smoothing,
        timestep_groups=len(layer_plan.scales),
        first_token=layer_plan.first_token,
        corrected=name in plan.bias_correction,
    )


def _make_room(layer: nn.Module, quantized: QuantizedLayer) -> None:
    """Give a float layer, on the meta device, a place for each tensor of the quantized one."""
    for leaf, tensor in quantized.state_dict().items():
        if leaf == "bias" and layer.bias is None:
            layer.bias = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
        elif leaf not in ("weight", "bias"):
            layer.register_buffer(leaf, torch.empty_like(tensor))


def attach(model: Any, config: LdmqConfig) -> None:
    """Make `save_pretrained` write the plan and the quantized tensors."""
    model.hf_quantizer = LdmqEncoderQuantizer(config)
    model.quantization_method = config.quant_method
    model.is_quantized = False  # True makes transformers refuse half() and float(), which quantized layers take
    model.config.quantization_config = config
