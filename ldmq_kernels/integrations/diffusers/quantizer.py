"""What diffusers' loader calls while it fills a model.

A checkpoint of a quantized model: quantized layers are put into the empty model first, and take
their tensors as they are in the file. A float checkpoint: each layer is quantized when its weight
arrives, so the float model is never in memory as a whole.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ldmq_kernels.conversion.convert import ConversionError, quantize_layer, quantized_class, replace_modules
from ldmq_kernels.integrations.diffusers.config import LdmqConfig
from ldmq_kernels.nn import QuantizedLayer, name_layers, timestep_groups
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan
from ldmq_kernels.plans.weights import WeightsCheck

if TYPE_CHECKING:
    from diffusers import ModelMixin


class CheckpointError(ValueError):
    """A checkpoint that does not hold what its config.json says."""


class LdmqQuantizer(DiffusersQuantizer):
    """diffusers' side of `LdmqConfig`."""

    quantization_config: LdmqConfig
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True
    supports_parallel_loading = False  # a layer is replaced when its weight comes, its bias may come in another shard

    def __init__(self, quantization_config: LdmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._awaited: dict[str, LayerPlan] = {}
        self._corrections: dict[str, Tensor] = {}  # of biases, which come apart from the weights
        self._weights: WeightsCheck | None = None

    # -- before the weights --------------------------------------------------------------------------

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Refuse to leave layers on disk.

        Raises:
            ValueError: the device map says "disk" somewhere.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            where = ", ".join(name for name, device in device_map.items() if device == "disk")
            raise ValueError(
                f"device_map puts {where} on disk, quantized layers stay in memory: use cpu there, or max_memory"
            )

    def get_cuda_warm_up_factor(self) -> int:
        """One byte a weight: the loader counts them in 16 bit."""
        return 2

    def _process_model_before_weight_loading(
        self, model: ModelMixin, state_dict: dict[str, Tensor] | None = None, **_kwargs: Any
    ) -> None:
        plan = self.quantization_config.plan_for(model)
        self.quantization_config = LdmqConfig(plan=plan)
        layers = quantizable_layers(model)
        if state_dict is not None:  # from_single_file, which knows float checkpoints alone and does not say so
            self.pre_quantized = False
        if not self.pre_quantized:
            if plan.needs_inputs:
                raise ConversionError(
                    "this plan rounds weights by GPTQ, which takes the inputs of their layers: load the pipeline in "
                    "full precision and call `ldmq.quantize(pipe, plan)`; what it saves then loads as it is"
                )
            self._weights = WeightsCheck(plan, model)
            self._awaited = {
                name: layer_plan for name, layer_plan in plan.layers(model).items() if layer_plan.scheme.quantizes
            }
            return
        replacements: dict[nn.Module, nn.Module] = {
            layers[name]: quantized_class(layers[name]).empty(
                layers[name],
                layer_plan.scheme,
                smoothed=name in plan.smoothing,
                timestep_groups=len(layer_plan.scales),
                first_token=layer_plan.first_token,
                corrected=name in plan.bias_correction,
            )
            for name, layer_plan in plan.layers(model, vectors_elsewhere=True).items()
            if layer_plan.scheme.quantizes
        }
        replace_modules(model, replacements)

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a checkpoint that would leave a tensor unfilled.

        Raises:
            CheckpointError: a tensor is not in the checkpoint.
        """
        expected = model.state_dict()
        missing = sorted(name for name in missing_keys if expected[name].is_meta)
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise CheckpointError(
                f"the checkpoint has no {missing[0]}{more}: it is damaged or belongs to another model, save it again"
            )
        return missing_keys

    # -- each tensor ---------------------------------------------------------------------------------

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_kwargs: Any
    ) -> bool:
        """Whether this package fills the tensor, and not the loader."""
        name, _, leaf = param_name.rpartition(".")
        if not self.pre_quantized:
            return name in self._awaited and leaf == "weight"
        layer = model.get_submodule(name)
        return isinstance(layer, QuantizedLayer) and leaf in layer.scheme.dtypes

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Refuse a tensor of another shape.

        Raises:
            CheckpointError: always, since the loader asks only where the shapes differ.
        """
        raise CheckpointError(
            f"{param_name} has shape {tuple(loaded_param.shape)} in the checkpoint, {tuple(current_param.shape)} is "
            "needed: the checkpoint and its config.json do not belong together"
        )

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        *_args: Any,
        **_kwargs: Any,
    ) -> None:
        """Take a stored tensor bit for bit, or quantize a float weight.

        Raises:
            CheckpointError: a stored tensor has another dtype, or values that no quantized layer has.
            ConversionError: a float weight cannot be quantized.
        """
        name, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(name)
        if not self.pre_quantized:
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            layer.weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
            if self._weights is not None:
                self._weights.add(name, layer.weight)
            layer_plan = self._awaited.pop(name)
            if layer.bias is not None and layer_plan.bias_correction is not None:
                self._corrections[name] = layer_plan.bias_correction
                layer_plan = dataclasses.replace(layer_plan, bias_correction=None)
            model.set_submodule(name, quantize_layer(name, layer, layer_plan))
            return
        assert isinstance(layer, QuantizedLayer)
        stored: Tensor = state_dict[param_name]  # param_value is rounded to the model's dtype
        try:
            layer.scheme.check(leaf, stored)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
        layer.fill(leaf, stored.to(target_device))

    # -- after the weights ---------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: ModelMixin, **_kwargs: Any) -> None:
        name_layers(model)
        model.requires_grad_(False)  # as conversion leaves it
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                layer.finish()
        for name, correction in self._corrections.items():
            model.get_submodule(name).correct_bias(correction)
        self._corrections = {}
        if self._weights is not None:
            for name, layer in quantizable_layers(model).items():
                if not isinstance(layer, QuantizedLayer):  # the plan leaves it as it is
                    self._weights.add(name, layer.weight)
            self._weights.finish()
            self._weights = None
        plan = self.quantization_config.plan
        assert plan is not None
        timestep_groups.attach(model, plan.timestep_groups)
        self.attach(model)
        from ldmq_kernels.integrations.diffusers.fused import fuse  # not while diffusers is being imported

        fuse(model)

    def attach(self, model: ModelMixin) -> None:
        """Make `save_pretrained` write the plan and the quantized tensors."""
        model.hf_quantizer = self
        model.quantization_method = self.quantization_config.quant_method
        model.is_quantized = False  # True makes diffusers refuse .to(dtype), which quantized layers take
        set_beside = _attributes_beside_entries(model.config)
        model.register_to_config(quantization_config=self.quantization_config)
        vars(model.config).update(set_beside)


def _attributes_beside_entries(config: Any) -> dict[str, Any]:
    """What was set on a config after it was made, as IP-Adapter sets `encoder_hid_dim_type`; no entry tells."""
    unset = object()
    return {name: value for name, value in vars(config).items() if config.get(name, unset) is not value}
