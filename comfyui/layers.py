"""ComfyUI's linears and convolutions, which become this package's where a file says so."""

from typing import Any

import comfy.ops
from torch import Tensor, nn

from ldmq_kernels.integrations.comfyui.reading import read_layer
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.nn.timestep_groups import TimestepGroups


class _Either:
    """Mixin over a layer of ComfyUI, which is asked as long as there is no quantized layer.

    Attributes:
        kind: the quantized class.
        pending: the quantized layer between loading and `adopt`: as a module, torch would look for tensors of its own.
        quantized: the quantized layer.
    """

    kind: type
    pending: Any = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        layer = read_layer(self.kind, self, state_dict, prefix)
        if layer is None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        self.weight = self.bias = None
        self.__dict__["pending"] = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the quantized layer computes it, or ComfyUI's."""
        layer = self._modules.get("quantized")
        if layer is None:
            return super().forward(x, *args, **kwargs)
        if layer.kernel_weight(layer.is_pointwise).device != x.device:  # ComfyUI moves layers that have a bias
            layer.to(x.device)
        return layer(x)


class LdmqOps(comfy.ops.manual_cast):
    """For `model_options["custom_operations"]`."""

    class Linear(_Either, comfy.ops.manual_cast.Linear):
        """A linear."""

        kind = QuantLinear

    class Conv2d(_Either, comfy.ops.manual_cast.Conv2d):
        """A convolution."""

        kind = QuantConv2d


def adopt(model: nn.Module) -> None:
    """Once a model is loaded, make its quantized layers modules: what moves or counts it finds them."""
    for module in list(model.modules()):
        if isinstance(module, _Either) and module.pending is not None:
            module.quantized = module.__dict__.pop("pending")


def follow_timesteps(model: nn.Module, boundaries: list[float]) -> None:
    """Have the timestep layers follow the `timesteps` that ComfyUI calls its UNet with."""
    groups = TimestepGroups(boundaries, "timesteps", 1)
    if groups.find_layers(model):
        model.register_forward_pre_hook(groups.before, with_kwargs=True)
        model.register_forward_hook(groups.after)
