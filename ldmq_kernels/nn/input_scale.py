"""The scale of a quantized layer's input: calibrated, and of the current call where it follows the timestep."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldmq_kernels.nn.timestep_scales import TimestepScaleView


class InputScale(nn.Module):
    """Mixin of a layer with the buffers `input_scale` and `smoothing`, both of which may be None.

    Attributes:
        input_scale: float32 of calibrated activations: (1,), or (timestep groups,) of a timestep scheme.
        smoothing: (C,) float32, the inverse of the smoothing vector, which inputs are multiplied with.
    """

    input_scale: Any
    smoothing: Any
    _buffers: dict[str, Any]
    _view: TimestepScaleView | None = None  # of a timestep layer that follows the calls of its model
    _call_scale: Tensor | None = None
    _call_inv_scale: Tensor | None = None

    def scale_of_group(self, index: int) -> tuple[Tensor, Tensor]:
        """A timestep group's input scale (1,), and what an input of it is multiplied with, (1,) or (C,)."""
        scale = self.input_scale[index : index + 1]
        inverse = 1 / scale
        return scale, inverse if self.smoothing is None else self.smoothing * inverse

    def use_timestep_group(self, index: int) -> None:
        """Take a timestep group's input scale, until the next call of a model that it is attached to.

        Args:
            index: 0 for the noisiest steps, and for static schemes; of no meaning for dynamic ones.
        """
        if self.input_scale is None:
            return
        if self._view is not None:
            self._view.scales.is_stale = True
            self._view = None
        self._call_scale, self._call_inv_scale = self.scale_of_group(index)

    def follow(self, view: TimestepScaleView) -> None:
        """Take the input scale of each call from a model's table, until the layer is filled, loaded or moved."""
        self._view = view
        self._call_scale = self._call_inv_scale = None

    @property
    def call_scale(self) -> Tensor | None:
        """The calibrated input scale of the current call, (1,) float32; None where it is measured."""
        return self._beside_layer(self._call_scale if self._view is None else self._view.scale())

    @property
    def input_inv_scale(self) -> Tensor | None:
        """What a calibrated input of the current call is multiplied with to be rounded: (1,) or (C,) float32."""
        return self._beside_layer(self._call_inv_scale if self._view is None else self._view.inv_scale())

    def _beside_layer(self, values: Tensor | None) -> Tensor | None:
        """Values of the call on the device where the layer's buffers are: offloading moves those, and nothing else.

        Those of a layer that a loader has filled are on the meta device until `finish` makes them.
        """
        if values is None:
            return None
        held = self._buffers["input_scale"]  # not by its name, which is looked up in three places
        return values if values.is_meta or values.device == held.device else values.to(held.device)

    def _keep_call_scale(self, scale: Tensor | None, inv_scale: Tensor | None) -> None:
        """Stay at the timestep group of these values: a model may be moved between the choice of it and the call."""
        if scale is None or inv_scale is None or scale.is_meta or self.input_scale.is_meta:
            return
        device = self.input_scale.device
        self._call_scale, self._call_inv_scale = scale.to(device), inv_scale.to(device)
