"""Convolutions over one axis, or over time and space, that the 2-D convolution ops compute.

Activations are quantized in the layer's own form, then arranged as pictures: by a view where one axis of the kernel is
enough, else by one copy of the int8 values for each temporal tap. So every output is one int32 accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.nn.convolution import QuantConvolution
from ldmq_kernels.nn.straight_through import is_differentiated, straight_through


class FoldedConvolution(QuantConvolution):
    """Mixin of a convolution that is computed as one 2-D convolution of pictures."""

    # -- to be given by the layer ------------------------------------------------------------------

    def at_single_taps(self, x: Tensor) -> Tensor:
        """x strided and padded along axes where the kernel has one tap and the 2-D convolution has no axis."""
        return x

    def samples(self, x: Tensor) -> Tensor:
        """x (N, C, ...) as (n, C, h, w), where each of the n has a dynamic scale of its own."""
        raise TypeError("a folded convolution says what its samples are")

    def pictures(self, samples: Tensor, like: Tensor) -> Tensor:
        """What the 2-D convolution reads, (n, c, h, w) channels_last, of such samples of an input like that."""
        raise TypeError("a folded convolution says what its pictures are")

    def whole(self, output: Tensor, like: Tensor) -> Tensor:
        """The layer's output (N, K, ...) of the pictures' (n, k, h, w)."""
        raise TypeError("a folded convolution says what its output is")

    def geometry(self) -> tuple[Any, ...]:
        """What the convolution ops take, from the kernel's size to the enlargement of the input."""
        raise TypeError("a folded convolution knows its geometry")

    # -- computing -----------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """Quantize the input as the scheme says, convolve in integers, scale back.

        Where `_conv_forward` is replaced, as tiling does, that is called with the dequantized weight.
        """
        if not self.scheme.quantizes or self.has_own_convolution:
            result: Tensor = self.float_kind.forward(self, input)
            return result
        is_batch = self.checked(input)
        x = self.padded(input if is_batch else input.unsqueeze(0))
        output = straight_through(self, x) if is_differentiated(self, x) else self.compute(x)
        return output if is_batch else output.squeeze(0)

    def compute(self, x: Tensor) -> Tensor:
        """The convolution by its integers, of an input (N, C, ...) that is padded where padding is not of zeros."""
        x = self.at_single_taps(x)
        if self.is_pointwise and self.scheme.quantizes_activations:
            return self._project(x)
        samples = self.samples(x)
        if not self.scheme.quantizes_activations:
            product = getattr(ops, self.scheme.format.products["conv2d"])
            weight = self.as_picture(self.plain_weight)
            out = product(self.pictures(samples, x), weight, *self._operands(), self.bias, *self.geometry())
            return self.whole(out, x)
        activations, op_dtype = self.scheme.activations, self.scheme.activations.op_dtype
        if activations.is_calibrated:
            x_q, scale = getattr(ops, activations.quantize_static)(samples, self.input_inv_scale, 1, *op_dtype), None
        else:
            x_q, scale = getattr(ops, activations.quantize_per_sample)(samples, self.smoothing, *op_dtype)
        low = None
        if self.scheme.is_split:
            low = self._product(self.low_part(samples, x_q, 1), None, x, second=True)
        return self.whole(self._product(x_q, scale, x, low), x)

    def _product(
        self, x_q: Tensor, x_scale: Tensor | None, x: Tensor, residual: Tensor | None = None, second: bool = False
    ) -> Tensor:
        """The integer convolution of quantized samples, of the pictures' form."""
        pictures = self.pictures(x_q, x)
        scale, bias = self.scale_and_bias(x_scale, second)
        if x_scale is not None and x_scale.numel() != pictures.shape[0]:
            assert scale is not None
            scale = scale.repeat_interleave(pictures.shape[0] // x_scale.numel())
        product = getattr(ops, self.scheme.format.products["conv2d"])
        operands = (self.kernel_weight(False), *self._operands(), bias, None, residual)
        return product(pictures, scale, *operands, *self.geometry(), x.dtype)

    def _operands(self) -> list[Tensor]:
        return [self.as_picture(operand) if operand.dim() > 1 else operand for operand in self.operands()]

    def _project(self, x: Tensor) -> Tensor:
        """A pointwise layer: a linear over positions."""
        tokens, activations, op_dtype = x.movedim(1, -1), self.scheme.activations, self.scheme.activations.op_dtype
        if activations.is_calibrated:
            x_q, scale = getattr(ops, activations.quantize_static)(tokens, self.input_inv_scale, -1, *op_dtype), None
        else:
            x_q, scale = getattr(ops, activations.quantize_per_token)(tokens, self.smoothing, *op_dtype)
        low = None
        if self.scheme.is_split:
            low = self.linear(self.low_part(tokens, x_q, -1), None, x.dtype, second=True)
        return self.linear(x_q, scale, x.dtype, low).movedim(-1, 1)


class QuantConv1d(FoldedConvolution, nn.Conv1d):
    """Drop-in for nn.Conv1d. Constructed directly it is an ordinary float layer; see `from_float`.

    Shape: (N, C, L) or (C, L) -> the same rank with K channels, in the input's dtype, channels last in memory. It is
    computed as a 2-D convolution of pictures that are one row high, with a scale for each sample where activations are
    dynamic, and where it is pointwise as a linear, with one for each position.
    """

    kind = "conv1d"
    channel_axis = -2
    float_kind = nn.Conv1d

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """(K, C, R) to (K, R, C)."""
        return weight.permute(0, 2, 1).contiguous()

    @staticmethod
    def from_channels_last(weight: Tensor) -> Tensor:
        """(K, R, C) to (K, C, R)."""
        return weight.permute(0, 2, 1)

    @property
    def taps(self) -> tuple[int, ...]:
        """(R,)."""
        return self.kernel_size

    def as_picture(self, stored: Tensor) -> Tensor:
        """(K, R, c) to (K, 1, R, c)."""
        return stored.unsqueeze(1)

    def samples(self, x: Tensor) -> Tensor:
        """(N, C, 1, L)."""
        return x.unsqueeze(2)

    def pictures(self, samples: Tensor, like: Tensor) -> Tensor:
        """The samples themselves."""
        return samples

    def whole(self, output: Tensor, like: Tensor) -> Tensor:
        """(N, K, 1, P) to (N, K, P)."""
        return output.squeeze(2)

    def geometry(self) -> tuple[Any, ...]:
        """What the convolution ops take, from the kernel's size to the enlargement of the input."""
        (stride,), (dilation,) = self.along_axes(self.stride), self.along_axes(self.dilation)
        return ((1, *self.kernel_size), (1, stride), (0, 0, *self.zeros[0]), (1, dilation), self.groups, 1)


class QuantConv3d(FoldedConvolution, nn.Conv3d):
    """Drop-in for nn.Conv3d. Constructed directly it is an ordinary float layer; see `from_float`.

    Shape: (N, C, D, H, W) or (C, D, H, W) -> the same rank with K channels, in the input's dtype, channels_last_3d in
    memory. With a kernel (1, R, S) each frame is a picture; with (T, 1, 1) the frames are rows of a picture that is as
    wide as a frame has pixels; both are views. With any other kernel the T frames that an output frame reads lie side
    by side along the channels, a copy of T bytes for each value of the input: products stay as many as in float.
    Dynamic activations have a scale for each position where the layer is pointwise, for each frame with a kernel
    (1, R, S), and else for each sample, since an output mixes frames.
    """

    kind = "conv3d"
    channel_axis = -4
    float_kind = nn.Conv3d

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """(K, C, T, R, S) to (K, R, S, T, C): the taps in time beside the channels that they are folded into."""
        return weight.permute(0, 3, 4, 2, 1).contiguous()

    @staticmethod
    def from_channels_last(weight: Tensor) -> Tensor:
        """(K, R, S, T, C) to (K, C, T, R, S)."""
        return weight.permute(0, 4, 3, 1, 2)

    @property
    def taps(self) -> tuple[int, ...]:
        """(R, S, T)."""
        frames, rows, columns = self.kernel_size
        return (rows, columns, frames)

    @property
    def is_temporal(self) -> bool:
        """Whether the kernel extends in time alone."""
        frames, rows, columns = self.kernel_size
        return frames > 1 and rows == columns == 1

    @property
    def folds_time(self) -> int:
        """How many temporal taps are folded into the channels: 1 where there is no need to."""
        return 1 if self.is_temporal else self.kernel_size[0]

    def as_picture(self, stored: Tensor) -> Tensor:
        """(K, R, S, T, c) to (K, T, 1, c) of a kernel in time alone, else to (K, R, S, T c)."""
        out, rows, columns, frames, channels = stored.shape
        if self.is_temporal:
            return stored.view(out, frames, 1, channels)
        return stored.view(out, rows, columns, frames * channels)

    def at_single_taps(self, x: Tensor) -> Tensor:
        """x strided and padded in time for a kernel (1, R, S), in space for one in time alone."""
        stride, zeros = self.along_axes(self.stride), self.zeros
        single = [axis for axis in range(3) if (axis > 0) == self.is_temporal]
        if self.folds_time > 1 or all(stride[axis] == 1 and not any(zeros[axis]) for axis in single):
            return x
        pads = [pad for axis in (2, 1, 0) for pad in (zeros[axis] if axis in single else (0, 0))]
        steps = (slice(None, None, stride[axis] if axis in single else None) for axis in range(3))
        return nn.functional.pad(x, pads)[(..., *steps)]

    def samples(self, x: Tensor) -> Tensor:
        """(N D, C, H, W) of a kernel (1, R, S), else (N, C, D H, W)."""
        if self.kernel_size[0] == 1:
            return x.transpose(1, 2).flatten(0, 1)
        return x.flatten(2, 3)

    def pictures(self, samples: Tensor, like: Tensor) -> Tensor:
        """(N D, C, H, W), or of a kernel in time alone (N, C, D, H W), or else (N P, T C, H, W) of P output frames."""
        if self.kernel_size[0] == 1:
            return samples
        number, channels, frames, height, width = like.shape
        values = samples.permute(0, 2, 3, 1)
        if self.is_temporal:
            return values.reshape(number, frames, height * width, channels).permute(0, 3, 1, 2)
        values = values.reshape(number, frames, height, width, self.groups, channels // self.groups)
        values = nn.functional.pad(values, (0,) * 8 + self.zeros[0]) if any(self.zeros[0]) else values
        step, apart = self.along_axes(self.stride)[0], self.along_axes(self.dilation)[0]
        taps = self.kernel_size[0]
        last = step * (self._frames_of(frames) - 1) + 1
        read = [values[:, tap * apart : tap * apart + last : step] for tap in range(taps)]
        stacked = torch.stack(read, 5)  # (N, P, H, W, groups, T, C / groups)
        return stacked.flatten(4).flatten(0, 1).permute(0, 3, 1, 2)

    def whole(self, output: Tensor, like: Tensor) -> Tensor:
        """(N, K, P, Q, R) of the pictures' output, channels_last_3d."""
        number, _, frames, height, width = like.shape
        values = output.permute(0, 2, 3, 1)
        size = (values.shape[1], height, width)
        if not self.is_temporal:
            size = (self._frames_of(frames) if self.folds_time > 1 else frames, *values.shape[1:3])
        return values.reshape(number, *size, values.shape[3]).permute(0, 4, 1, 2, 3)

    def _frames_of(self, frames: int) -> int:
        """Frames of the output for so many of the input, where temporal taps are folded into the channels.

        Raises:
            ValueError: they are fewer than the kernel reads.
        """
        reach = self.along_axes(self.dilation)[0] * (self.kernel_size[0] - 1) + 1
        padded = frames + sum(self.zeros[0])
        if padded < reach:
            raise ValueError(
                f"{self.name or 'a layer'}: its kernel reads {reach} frames, and {frames} are given, {padded} with "
                "their padding"
            )
        return (padded - reach) // self.along_axes(self.stride)[0] + 1

    def geometry(self) -> tuple[Any, ...]:
        """What the convolution ops take, from the kernel's size to the enlargement of the input."""
        stride, dilation, zeros = self.along_axes(self.stride), self.along_axes(self.dilation), self.zeros
        if self.is_temporal:
            kernel = (self.kernel_size[0], 1)
            return (kernel, (stride[0], 1), (*zeros[0], 0, 0), (dilation[0], 1), self.groups, 1)
        return (self.kernel_size[1:], stride[1:], (*zeros[1], *zeros[2]), dilation[1:], self.groups, 1)
