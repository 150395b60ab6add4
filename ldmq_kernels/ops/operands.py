"""Random operands of every op at a shape: what doctor, the tuner, the benchmarks and the tests call ops with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels.op_spec import OpSpec, spec_of
from ldmq_kernels.numerics.formats.float8 import FLOAT8, FLOAT8_MAX, round_to_float8
from ldmq_kernels.numerics.formats.int4 import group_count

EVERY_OPTION = frozenset(
    {"bias", "sample_bias", "residual", "inv_scale", "inv_smooth", "norm_weight", "norm_bias", "out_inv_scale"}
)
MODULATION = frozenset({"gate", "modulation_scale", "modulation_shift"})
NORM = frozenset({"norm_weight", "norm_bias"})


@dataclass(frozen=True)
class Shape:
    """The sizes of a call, of tokens for the ops on matrices and of pictures for the others, and what is there.

    Attributes:
        tokens: rows of the input.
        channels: of the input.
        out: channels of the output.
        picture: samples, height and width.
        kernel, stride, upsample: of a convolution, padded by kernel // 2 on all sides.
        norm_groups: of a group norm.
        options: the operands that are there of those that may be None. Beside an inv_scale there is no inv_smooth;
            with "q_dtype", what quantizes makes FP8, an output too.
        scale_per_row: whether activations have a scale for each token or sample, and calibrated ones for each channel.
        per_token: whether a norm over pictures measures a scale for each pixel.
        prefers_picture: whether an op that takes both is given a picture.
        has_normal_integers: whether int8 values are rounded normal ones with the largest at 127, as quantization makes
            them: the power that a GPU draws, and so its clock, depends on it. Without, they are uniform. FP8 values are
            always rounded normal ones, with the largest at 448.
    """

    tokens: int = 1
    channels: int = 1
    out: int = 1
    picture: tuple[int, int, int] = (1, 1, 1)
    kernel: int = 1
    stride: int = 1
    upsample: int = 1
    norm_groups: int = 4
    options: frozenset[str] = NORM
    scale_per_row: bool = False
    per_token: bool = False
    prefers_picture: bool = False
    has_normal_integers: bool = False


class Operands:
    """Operands by the names that arguments have in every op, from one seed."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: Shape, made_on: torch.device | None = None
    ) -> None:
        """Say what operands are made.

        Args:
            device: where they are.
            dtype: of the floating ones.
            shape: their sizes.
            made_on: where they are made: on the CPU every device gets the same; on `device` large ones are made faster.
        """
        self.device, self.dtype, self.shape = device, dtype, shape
        self.made_on = made_on or torch.device("cpu")
        self._random = torch.Generator(self.made_on).manual_seed(0)
        self._makers: dict[str, Callable[[OpSpec, bool], Any]] = {
            "x": lambda _, is_picture: self.input(is_picture),
            "x_q": lambda spec, is_picture: self._laid_out(
                self.quantized(spec, *self._input_sizes(is_picture)), is_picture
            ),
            "x_scale": lambda spec, is_picture: self.positive(self._scales(spec, is_picture)),
            "inv_scale": lambda *_: 1 / self.positive(shape.channels if shape.scale_per_row else 1),
            "inv_smooth": lambda *_: self.positive(shape.channels),
            "weight": self._weight,
            "weight_scale": lambda *_: self.positive(shape.out),
            "multiplier": lambda spec, _: self._integers(1, 19, self._groups(spec)).to(torch.uint8),
            "group_scale": lambda spec, _: self.positive(*self._groups(spec)),
            "bias": lambda *_: self.floating(shape.out),
            "sample_bias": lambda *_: self.floating(shape.picture[0], shape.out),
            "residual": lambda _, is_picture: self._residual(is_picture),
            "gate": lambda *_: self.floating(self._samples(), shape.out),
            "modulation_scale": lambda *_: self.floating(self._samples(), shape.channels),
            "modulation_shift": lambda *_: self.floating(self._samples(), shape.channels),
            "tanh": lambda *_: True,
            "norm_weight": lambda *_: self.floating(shape.channels),
            "norm_bias": lambda *_: self.floating(shape.channels),
            "num_groups": lambda *_: shape.norm_groups,
            "eps": lambda *_: 1e-5,
            "silu": lambda *_: not shape.per_token,  # before a linear, a norm has none
            "per_token": lambda *_: shape.per_token,
            "channel_dim": lambda _, is_picture: 1 if is_picture else -1,
            "kernel_size": lambda *_: (shape.kernel, shape.kernel),
            "stride": lambda *_: (shape.stride, shape.stride),
            "padding": lambda *_: (shape.kernel // 2,) * 4,
            "dilation": lambda *_: (1, 1),
            "groups": lambda *_: 1,
            "upsample": lambda *_: shape.upsample,
            "out_dtype": self._out_dtype,
            # of about the size that calibration gives it
            "out_inv_scale": lambda *_: self.positive(self._output_scales()) * 1e4 / shape.channels,
            "q_dtype": lambda *_: FLOAT8,
        }

    def of(self, spec: OpSpec, is_picture: bool) -> tuple[Any, ...]:
        """The arguments of an op.

        Args:
            spec: the op's.
            is_picture: whether its input is (N, C, H, W), and not (tokens, C).

        Raises:
            ValueError: an argument has a name that no other op's has: the specification needs an example of its own.
        """
        absent = spec.optional - self.shape.options
        if "q_dtype" in self.shape.options:
            absent -= {"out_inv_scale"}
        if "inv_scale" in spec.optional - absent:
            absent |= {"inv_smooth"}
        unknown = [name for name in spec.arguments if name not in self._makers]
        if unknown:
            raise ValueError(f"the example of {spec.name} must say what {', '.join(unknown)} is")
        return tuple(None if name in absent else self._makers[name](spec, is_picture) for name in spec.arguments)

    def input(self, is_picture: bool, widening: int = 1) -> Tensor:
        """A floating input of `widening` times as many channels."""
        return self._laid_out(self._normal(*self._input_sizes(is_picture, widening)).to(self.dtype), is_picture)

    def floating(self, *sizes: int) -> Tensor:
        """Normal values."""
        return self._normal(*sizes).to(self.device, self.dtype)

    def positive(self, *sizes: int) -> Tensor:
        """Scales around 0.01, float32."""
        return (torch.rand(sizes, generator=self._random, dtype=torch.float32, device=self.made_on) * 0.02 + 0.001).to(
            self.device
        )

    def quantized(self, spec: OpSpec, *sizes: int) -> Tensor:
        """Values over the range of the op's 8-bit operands, as the shape says."""
        if spec.operand_dtype == FLOAT8:
            values = self._normal(*sizes)
            return round_to_float8(values.mul_(FLOAT8_MAX / values.abs().amax())).to(self.device)
        if self.shape.has_normal_integers:
            values = self._normal(*sizes)
            return (values * (127 / values.abs().amax())).round_().to(torch.int8).to(self.device)
        return self._integers(-127, 128, sizes).to(torch.int8)

    def _normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self._random, dtype=torch.float32, device=self.made_on)

    def _integers(self, low: int, high: int, sizes: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, sizes, generator=self._random, device=self.made_on).to(self.device)

    def _input_sizes(self, is_picture: bool, widening: int = 1) -> tuple[int, ...]:
        samples, height, width = self.shape.picture
        channels = widening * self.shape.channels
        return (samples, channels, height, width) if is_picture else (self.shape.tokens, channels)

    def _laid_out(self, values: Tensor, is_picture: bool) -> Tensor:
        layout = torch.channels_last if is_picture else torch.contiguous_format
        return values.to(self.device).contiguous(memory_format=layout)

    def _samples(self) -> int:
        """Runs of tokens that a modulation has rows for."""
        return 2 if self.shape.tokens % 2 == 0 else 1

    def _output_scales(self) -> int:
        return self.shape.out // 2 if self.shape.scale_per_row else 1

    def _out_dtype(self, spec: OpSpec, _is_picture: bool) -> torch.dtype:
        """What an op writes: floats, or what is quantized where it can have an inverse scale for that."""
        if "out_inv_scale" in spec.optional and self.shape.options & {"q_dtype", "out_inv_scale"}:
            return FLOAT8 if "q_dtype" in self.shape.options else torch.int8
        return self.dtype

    def _scales(self, spec: OpSpec, is_picture: bool) -> int:
        if not self.shape.scale_per_row or "inv_scale" in spec.arguments:
            return 1
        return self.shape.picture[0] if is_picture else self.shape.tokens

    def _weight_sizes(self, spec: OpSpec) -> tuple[int, ...]:
        taps = (self.shape.kernel,) * 2 if "kernel_size" in spec.arguments else ()
        return (self.shape.out, *taps, self.shape.channels)

    def _groups(self, spec: OpSpec) -> tuple[int, ...]:
        *outer, channels = self._weight_sizes(spec)
        return (*outer, group_count(channels))

    def _weight(self, spec: OpSpec, _is_picture: bool) -> Tensor:
        *outer, channels = self._weight_sizes(spec)
        if not {"multiplier", "group_scale"} & set(spec.arguments):
            return self.quantized(spec, *outer, channels)
        low, high = (self._integers(-7, 8, (*outer, -(-channels // 2))) for _ in range(2))
        return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)

    def _residual(self, is_picture: bool) -> Tensor:
        shape = self.shape
        if not is_picture:
            return self.floating(shape.tokens, shape.out)
        samples, *lengths = shape.picture
        size = ((length * shape.upsample - 1) // shape.stride + 1 for length in lengths)
        return self._laid_out(self._normal(samples, shape.out, *size).to(self.dtype), is_picture)


def of_tokens(spec: OpSpec, operands: Operands) -> tuple[Any, ...]:
    """An input (tokens, C)."""
    return operands.of(spec, is_picture=False)


def of_picture(spec: OpSpec, operands: Operands) -> tuple[Any, ...]:
    """An input (N, C, H, W)."""
    return operands.of(spec, is_picture=True)


def of_either(spec: OpSpec, operands: Operands) -> tuple[Any, ...]:
    """An input of whichever the shape prefers."""
    return operands.of(spec, is_picture=operands.shape.prefers_picture)


def of_gated(spec: OpSpec, operands: Operands) -> tuple[Any, ...]:
    """An input (tokens, 2 C): values, then their gates."""
    return operands.input(False, widening=2), *operands.of(spec, is_picture=False)[1:]


def of_value_and_gate(spec: OpSpec, operands: Operands) -> tuple[Any, ...]:
    """An input (tokens, C), and a weight of as many gates as values: an odd number of columns is one more."""
    shape = replace(operands.shape, out=operands.shape.out + operands.shape.out % 2)
    return Operands(operands.device, operands.dtype, shape, operands.made_on).of(spec, is_picture=False)


def example(
    op: str, shape: Shape, device: torch.device, dtype: torch.dtype, made_on: torch.device | None = None
) -> tuple[Any, ...]:
    """The arguments of a call of an op; what they are is as in `Operands`.

    Raises:
        ValueError: there is no such op.
    """
    spec = spec_of(op)
    return spec.example(spec, Operands(device, dtype, shape, made_on))
