"""What diffusers' loader calls while it fills a model.

A checkpoint of a quantized model: quantized layers are put into the empty model first, and take
their tensors as they are in the file. A float checkpoint: each layer is quantized when its weight
arrives, so the float model is never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ldmq_kernels.conversion.convert import ConversionError, dequantize, quantize_layer, replace_modules
from ldmq_kernels.integrations.diffusers.config import LdmqConfig, refuse_disk
from ldmq_kernels.integrations.diffusers.integrity import (
    MARK,
    CheckpointError,
    TensorChecks,
    checksums,
    refuse_marked,
    without_adapters,
)
from ldmq_kernels.nn import QuantizedLayer, name_layers, quantized_class, timestep_groups
from ldmq_kernels.nn.guard import guard_if_asked
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, Plan
from ldmq_kernels.plans.weights import WeightsCheck

if TYPE_CHECKING:
    from diffusers import ModelMixin


class LdmqQuantizer(DiffusersQuantizer):
    """diffusers' side of `LdmqConfig`."""

    quantization_config: LdmqConfig
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = True  # adapters; not the weights
    is_compileable = True
    supports_parallel_loading = False  # a layer is replaced when its weight comes, its bias may come in another shard

    def __init__(self, quantization_config: LdmqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._awaited: dict[str, LayerPlan] = {}
        self._corrections: dict[str, Tensor] = {}  # of biases, which come apart from the weights
        self._weights: WeightsCheck | None = None
        self._files: list[str] = []
        self._checks: TensorChecks | None = None  # while a model is loaded

    # -- before the weights --------------------------------------------------------------------------

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Refuse to leave layers on disk.

        Raises:
            ValueError: the device map says "disk" somewhere.
        """
        refuse_disk(device_map)

    def get_cuda_warm_up_factor(self) -> int:
        """One byte a weight: the loader counts them in 16 bit."""
        return 2

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Take note of the files.

        Raises:
            CheckpointError: their config.json should have checksums, and has none.
        """
        self._files = [str(file) for file in checkpoint_files]
        if self.pre_quantized and self.quantization_config.checksums is None:
            refuse_marked(self._files)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: ModelMixin, state_dict: Mapping[str, Tensor] | None = None, **_kwargs: Any
    ) -> None:
        said = (self.quantization_config.checksums or {}).get("tensors")
        plan = self.quantization_config.plan_for(model)
        self.quantization_config = LdmqConfig(plan=plan)
        if state_dict is not None:  # from_single_file, which knows float checkpoints alone and does not say so
            self.pre_quantized = False
        layer_plans = self._prepare(model, plan)
        own = [f"{name}.weight" for name in self._awaited]
        self._checks = TensorChecks(model, layer_plans, said, self._files, own)
        if state_dict is not None:
            self._checks.check_file(state_dict)

    def _prepare(self, model: ModelMixin, plan: Plan) -> Mapping[str, LayerPlan]:
        """Put the quantized layers in, or await the weights that become some."""
        layers = quantizable_layers(model)
        layer_plans = plan.layers(model, vectors_elsewhere=self.pre_quantized)
        planned = {name: layer_plan for name, layer_plan in layer_plans.items() if layer_plan.scheme.quantizes}
        if not self.pre_quantized:
            if plan.needs_inputs:
                raise ConversionError(
                    "this plan rounds weights by GPTQ, which takes the inputs of their layers: load the pipeline in "
                    "full precision and call `ldmq.quantize(pipe, plan)`; what it saves then loads as it is"
                )
            self._weights = WeightsCheck(plan, model)
            self._awaited = planned
            return planned
        replacements: dict[nn.Module, nn.Module] = {
            layers[name]: quantized_class(layers[name]).empty(
                layers[name],
                layer_plan.scheme,
                smoothed=name in plan.smoothing,
                timestep_groups=len(layer_plan.scales),
                first_token=layer_plan.first_token,
                corrected=name in plan.bias_correction,
            )
            for name, layer_plan in planned.items()
        }
        replace_modules(model, replacements)
        return planned

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

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check a file's tensors, before one of them is taken.

        Raises:
            CheckpointError: one is not what the model, its plan or its checksum says.
        """
        if self._checks is not None:
            self._checks.check_file(state_dict)
        return state_dict

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
            ConversionError: a float weight cannot be quantized.
        """
        name, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(name)
        if not self.pre_quantized:
            assert isinstance(layer, FloatLayer)
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
        layer.fill(leaf, stored.to(target_device))

    # -- after the weights ---------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: ModelMixin, **_kwargs: Any) -> None:
        self._checks = None
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
        guard_if_asked(model)
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

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        """The model with float layers; its blocks are diffusers' own again, and it is saved as a float model."""
        from ldmq_kernels.integrations.diffusers.fused import unfuse

        dequantize(unfuse(model))
        timestep_groups.detach(model)
        set_beside = _attributes_beside_entries(model.config)
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        vars(model.config).update(set_beside)
        return model

    # -- saving --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def announcing(self, model: ModelMixin) -> Iterator[None]:
        """Have config.json say, inside this block, what the tensors are that the model holds now."""
        config = self.quantization_config
        if model.config.quantization_config is not config:  # but its JSON: an entry was registered after a save
            self.attach(model)
        config.checksums = checksums(model, config.to_dict()["plan"])
        try:
            yield
        finally:
            config.checksums = None

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is written: the tensors of the model without adapters, and that config.json has their checksums."""
        return without_adapters(state_dict), dict(MARK)


def _attributes_beside_entries(config: Any) -> dict[str, Any]:
    """What was set on a config after it was made, as IP-Adapter sets `encoder_hid_dim_type`; no entry tells."""
    unset = object()
    return {name: value for name, value in vars(config).items() if config.get(name, unset) is not value}
