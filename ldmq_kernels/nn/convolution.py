"""What quantized convolutions over 1, 2 and 3 axes share: their geometry, and being made of a float one."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import grad

from ldmq_kernels import ops
from ldmq_kernels.nn.kinds import ORIGINAL_CONVOLUTIONS
from ldmq_kernels.nn.quantized import ACTIVATION_DTYPES, QuantizedLayer

GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")


class QuantConvolution(QuantizedLayer):
    """Mixin over nn.Conv1d, nn.Conv2d or nn.Conv3d, whose attributes count as they are when the layer is called."""

    float_kind: ClassVar[Any]
    in_channels: int
    groups: int
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    padding_mode: Any
    _reversed_padding_repeated_twice: Any

    @classmethod
    def structure_of(cls, module: Any) -> Self:
        """A float layer of this class on the meta device, shaped as `module`."""
        layer: Any = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            groups=module.groups,
            bias=module.bias is not None,
            device="meta",
            dtype=module.weight.dtype if module.weight.is_floating_point() else None,
        )
        for name in GEOMETRY:  # as they are now: they may have been set after construction
            setattr(layer, name, getattr(module, name))
        made: Self = layer
        return made

    def along_axes(self, value: Any) -> tuple[int, ...]:
        """An attribute that is an integer or has one for each axis, for each axis."""
        return (value,) * len(self.kernel_size) if isinstance(value, int) else tuple(value)

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a linear over positions."""
        return (
            max(self.kernel_size) == 1  # first, since it tells most apart
            and self.groups == 1
            and max(self.along_axes(self.stride)) == 1
            and (self.padding in ("same", "valid") or not any(self.along_axes(self.padding)))
        )

    @property
    def zeros(self) -> tuple[tuple[int, int], ...]:
        """Zeros (before, after) along each axis; other modes than zeros pad the input by themselves."""
        if self.padding_mode != "zeros" or self.padding == "valid":
            return ((0, 0),) * len(self.kernel_size)
        if self.padding != "same":
            return tuple((pad, pad) for pad in self.along_axes(self.padding))
        spans = [d * (size - 1) for d, size in zip(self.along_axes(self.dilation), self.kernel_size, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)

    @property
    def weight_channels(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.groups

    @property
    def has_own_convolution(self) -> bool:
        """Whether someone has replaced `_conv_forward`, of this layer or of every one of its kind."""
        kind = self.float_kind
        return "_conv_forward" in self.__dict__ or kind._conv_forward is not ORIGINAL_CONVOLUTIONS[kind]

    def checked(self, x: Tensor) -> bool:
        """Whether an input has a batch axis.

        Raises:
            ValueError: it has neither form that a layer of this kind takes, or another dtype or number of channels.
        """
        axes = len(self.kernel_size)
        has_channels = x.dim() > axes and x.shape[-axes - 1] == self.in_channels
        if not has_channels or x.dim() > axes + 2 or x.dtype not in ACTIVATION_DTYPES:
            self.refuse(x, self.in_channels)
        return x.dim() == axes + 2

    def padded(self, x: Tensor) -> Tensor:
        """x (N, C, ...) padded by another mode than zeros, which the product pads by itself."""
        if self.padding_mode == "zeros":
            return x
        return nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """(N, K, ...) to (N, C, ...)."""
        size = [length + before + after for length, (before, after) in zip(shape[2:], self.zeros, strict=True)]
        gradient_of = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)[len(size) - 1]
        none = (0,) * len(size)
        geometry = self.along_axes(self.stride), none, self.along_axes(self.dilation), self.groups
        padded = gradient_of((*shape[:2], *size), weight, gradient, *geometry)
        inner = (slice(before, end - after) for end, (before, after) in zip(size, self.zeros, strict=True))
        return padded[(..., *inner)]

    def linear(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        out_dtype: Any,
        residual: Tensor | None = None,
        *,
        second: bool = False,
    ) -> Tensor:
        """A pointwise layer's product over (..., C) int8, as QuantLinear.linear."""
        scale, bias = self.scale_and_bias(x_scale, second)
        operands = [operand.flatten(1) if operand.dim() > 1 else operand for operand in self.operands()]
        product = getattr(ops, self.scheme.format.products["linear"])
        return product(x_q, scale, self.kernel_weight(True), *operands, bias, residual, out_dtype)
