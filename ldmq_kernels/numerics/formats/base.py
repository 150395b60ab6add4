"""What a format is: how weights are stored, how activations are, which ops multiply the two, and what that costs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldmq_kernels.numerics.gptq import Hessian

FLOAT_BYTES = 2  # of a value in 16 bit
PRODUCTS = ("linear", "conv2d")
KINDS = ("linear", "conv2d", "conv1d", "conv3d")


def product_of(kind: str) -> str:
    """The kind of product that computes a kind of layer: 2-D convolution computes those over 1 and 3 axes."""
    return "linear" if kind == "linear" else "conv2d"


@dataclass(frozen=True)
class Buffer:
    """A tensor that a layer stores: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes in a checkpoint."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFormat(ABC):
    """How a weight is stored. Weights are (out, C), or (out, R, S, C) of a convolution: input channels are last.

    Attributes:
        is_quantized: whether anything but the model's own floating weight is stored.
        is_precise: whether its rounding is fine enough for the blocks of a model that are most sensitive.
        is_coarse: whether its rounding is so coarse that GPTQ's is worth a trial.
        channel_groups: how many neighbouring input channels share something.
    """

    is_quantized: bool = True
    is_precise: bool = False
    is_coarse: bool = False
    channel_groups: int = 1

    @abstractmethod
    def buffers(self, shape: Sequence[int]) -> dict[str, Buffer]:
        """The tensors that stand for a weight of this shape, by name; the one called "weight" is among them."""

    @abstractmethod
    def quantize(self, weight: Tensor, hessian: Hessian | None = None) -> dict[str, Tensor]:
        """Round a floating weight.

        Args:
            weight: (out, ..., C) floating.
            hessian: for GPTQ rounding, (K, K) float32, K = weight[0].numel(): the sum of x x^T over the layer's inputs;
                or with what the outputs weigh, too.

        Returns:
            A tensor for each name of `buffers`.

        Raises:
            ValueError: the weight or the hessian is not finite, or the hessian does not fit.
        """

    @abstractmethod
    def dequantize(self, stored: Mapping[str, Tensor], channels: int) -> Tensor:
        """The float32 weight (out, ..., channels) that stored tensors stand for."""

    @abstractmethod
    def wrong_values(self, name: str, stored: Tensor) -> tuple[Tensor, str]:
        """Which elements of a stored tensor no quantized weight has, as booleans, and what is accepted, in words."""

    def bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight of this shape in a checkpoint."""
        return sum(buffer.bytes for buffer in self.buffers(shape).values())

    def group_scale(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The scale that the weight-only op of `Format.first_token_op` takes beside the stored weight."""
        raise TypeError(f"{type(self).__name__} is in no weight-only product")


@dataclass(frozen=True)
class ActivationFormat:
    """How activations are stored, and where their scale comes from.

    Attributes:
        name: "static" is one calibrated scale, "timestep" a calibrated one for each group of sampling steps, "dynamic"
            is measured in each call; "split" is static with two values for each activation, the second for what the
            first leaves; "rotated" is dynamic with the channels rotated first; "float" is the model's own dtype.
        suffix: what a scheme's name ends with, such as "-static".
        dtype: of the quantized values; None for the model's own.
        largest: the largest quantized value.
        is_calibrated: whether the scale comes from a calibration; it is stored then.
        operation_cost: of a multiply-accumulate, relative to a static scale.
        is_precise: whether the most sensitive blocks of a model may have it.
        is_rotated: whether the channels of the input, and so those of the weight, are rotated by a Hadamard matrix.
        quantize_static: the op that quantizes with a calibrated scale; "" where none is calibrated.
        quantize_per_token: the op that measures a scale for each token; "" where scales are calibrated.
        quantize_per_sample: the op that measures a scale for each sample; "" where scales are calibrated.
    """

    name: str
    suffix: str = ""
    dtype: torch.dtype | None = None
    largest: float = math.inf
    is_calibrated: bool = False
    operation_cost: float = 1.0
    is_precise: bool = False
    is_rotated: bool = False
    quantize_static: str = ""
    quantize_per_token: str = ""
    quantize_per_sample: str = ""

    @property  # not a cached one: torch's compiler cannot enter its lock
    def op_dtype(self) -> tuple[torch.dtype, ...]:
        """What an op that ends in a quantization takes last: nothing for int8, which it makes without being told."""
        return () if self.dtype in (None, torch.int8) else (self.dtype,)


FLOAT_ACTIVATIONS = ActivationFormat("float", is_precise=True)


@dataclass(frozen=True)
class Format:
    """A weight format with the activations that it is multiplied with, and the ops that do it.

    With quantized activations an op takes the input, its scale, the weight, the operands, the bias, of a convolution
    the bias of each sample, the residual, of a convolution its geometry, and the dtype of the output. Without, it takes
    the input, the weight, the operands, the bias, and of a convolution its geometry.

    Attributes:
        name: such as "w8a8"; a scheme is called by it and by the activations' suffix.
        weight: how weights are stored.
        activations: the ways to scale activations, in the order in which they are listed.
        products: the op's name for each kind of product that the format has, "linear" or "conv2d". A 1x1 convolution
            is computed as a linear, one over 1 or 3 axes as a 2-D one.
        operands: the names of the stored tensors that the op takes after the weight, in its order; each has a row for
            each output.
        operation_cost: of a multiply-accumulate, relative to int8 by int8.
        fused_linear: the op that also quantizes the input of a linear with a calibrated scale, or None.
        geglu_linear: the op of a linear whose outputs are values and gates, with GEGLU in its epilogue: it takes what
            the product of linears does up to the bias, then the inverse scale and the dtype of the output; or None.
        first_token_op: the weight-only op for the 16-bit input of a first token, (x, weight, scale, bias); or None.
        like: the name of a format with the same activations and a finer weight: what a search finds of the activations
            there serves here too.
        colours: for each activation format by name the colours (on light, on dark ground) of its scheme in a report;
            those that are left out are derived from the scheme's name.
    """

    name: str
    weight: WeightFormat
    activations: tuple[ActivationFormat, ...]
    products: Mapping[str, str]
    operands: tuple[str, ...]
    operation_cost: float
    fused_linear: str | None = None
    geglu_linear: str | None = None
    first_token_op: str | None = None
    like: str | None = None
    colours: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = []
        if not isinstance(self.weight, WeightFormat):
            missing.append(f"weight must be a WeightFormat that stores and rounds weights, this is {self.weight!r}")
        activations = self.activations if isinstance(self.activations, tuple) else ()
        if not activations or not all(isinstance(a, ActivationFormat) for a in activations):
            missing.append(f"activations must be a tuple of ActivationFormats, this is {self.activations!r}")
        quantizes = isinstance(self.weight, WeightFormat) and self.weight.is_quantized
        if quantizes and not self.products:
            missing.append("products must name the op that multiplies a linear or a conv2d")
        if "conv2d" in self.products and "linear" not in self.products:
            missing.append("products must name the linear's op too, which computes 1x1 convolutions")
        if missing:
            raise TypeError(f"format {self.name!r} has no implementation: {'; '.join(missing)}")
        unknown = set(self.products) - set(PRODUCTS)
        if unknown:
            raise ValueError(
                f"format {self.name!r} has products for {', '.join(sorted(unknown))}: known are {PRODUCTS}"
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """The kinds of layers that can have the format."""
        if not self.weight.is_quantized:
            return KINDS
        return tuple(kind for kind in KINDS if product_of(kind) in self.products)
