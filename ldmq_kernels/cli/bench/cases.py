"""What `ldmq bench --op` measures: an op at a shape, as it is written on the command line, its work and its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmq_kernels.kernels.geometry import conv2d_output_size
from ldmq_kernels.ops import spec_of, specs
from ldmq_kernels.ops.operands import NORM, Shape, example, of_either, of_gated, of_picture, of_value_and_gate

EPILOGUES = ("bias", "residual", "sample-bias")
NORM_GROUPS = 32


@dataclass(frozen=True)
class ShapeKind:
    """How a shape is written.

    Attributes:
        letters: the sizes in their order.
        meaning: the letters in words.
        usual: the shape that is measured where none is given.
    """

    letters: str
    meaning: str
    usual: str

    def __str__(self) -> str:
        return f"{self.letters} ({self.meaning}), such as {self.usual}"

    @property
    def count(self) -> int:
        """How many sizes there are."""
        return self.letters.count("x") + 1


LINEAR = ShapeKind("MxNxK", "tokens, output features, input features", "4096x1280x1280")
CONVOLUTION = ShapeKind("NxCxHxWxK", "samples, input channels, height, width, output channels", "2x320x64x64x320")
TOKENS = ShapeKind("MxK", "tokens, input features", "4096x1280")
FEATURE_MAP = ShapeKind("NxCxHxW", "samples, channels, height, width", "2x320x64x64")


def shape_kinds(op: str) -> tuple[ShapeKind, ...]:
    """How a shape of an op may be written, the usual way first.

    Raises:
        ValueError: there is no such op.
    """
    spec = spec_of(op)
    if spec.is_product:
        return (CONVOLUTION if spec.shape.takes_pictures else LINEAR,)
    if spec.example is of_either:
        return TOKENS, FEATURE_MAP
    return (FEATURE_MAP if spec.example is of_picture else TOKENS,)


def parse_shape(op: str, text: str) -> tuple[int, ...]:
    """The sizes in a text such as "4096x1280x1280".

    Raises:
        ValueError: it is no shape of the op.
    """
    parts, kinds = text.lower().split("x"), shape_kinds(op)
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) not in [kind.count for kind in kinds]:
        raise ValueError(f"--shape {text}: {op} takes {' or '.join(map(str, kinds))}")
    sizes = tuple(map(int, parts))
    if spec_of(op).example is of_gated and sizes[-1] % 2:
        raise ValueError(f"--shape {text}: {op} takes values and their gates side by side: K must be even")
    if spec_of(op).example is of_value_and_gate and sizes[1] % 2:
        raise ValueError(f"--shape {text}: {op} makes values and their gates side by side: N must be even")
    return sizes


def epilogues_of(op: str) -> tuple[str, ...]:
    """What an op can add to its product, as --epilogue names it."""
    return tuple(name for name in EPILOGUES if name.replace("-", "_") in spec_of(op).optional)


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
        op: its name.
        sizes: as one of `shape_kinds` has them.
        dtype: of floats that go in or come out.
        epilogue: of `EPILOGUES`, what is added to a product.
        kernel, stride: of a convolution, which is padded by kernel // 2 on all sides.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    epilogue: tuple[str, ...] = ()
    kernel: int = 3
    stride: int = 1

    @property
    def label(self) -> str:
        """The shape in one word: "4096x1280x1280", or "2x320x64x64x320k3s1" of a convolution."""
        sizes = "x".join(map(str, self.sizes))
        return f"{sizes}k{self.kernel}s{self.stride}" if len(self.sizes) == CONVOLUTION.count else sizes

    @property
    def product(self) -> tuple[int, int, int] | None:
        """m, n and k of the product; None of an op without one."""
        if len(self.sizes) == LINEAR.count:
            m, n, k = self.sizes
            return m, n, k
        if len(self.sizes) == CONVOLUTION.count:
            samples, channels, *size, out = self.sizes
            window = (self.kernel,) * 2, (self.stride,) * 2, (self.kernel // 2,) * 4, (1, 1)
            height, width = conv2d_output_size(size, *window, 1)
            return samples * height * width, out, self.kernel**2 * channels
        return None

    @property
    def operations(self) -> int:
        """The multiplications and additions of the product, 0 of an op without one."""
        return 2 * self.product[0] * self.product[1] * self.product[2] if self.product else 0

    def operands(self, device: torch.device) -> tuple[Any, ...]:
        """Random arguments of the op, from one seed; scales are calibrated where the op takes them."""
        return example(self.op, self._shape(), device, self.dtype, made_on=device)

    def _shape(self) -> Shape:
        options = NORM | {"inv_scale"} | {name.replace("-", "_") for name in self.epilogue}
        if len(self.sizes) == LINEAR.count:
            m, n, k = self.sizes
            return Shape(m, k, n, options=options)
        if len(self.sizes) == TOKENS.count:
            tokens, features = self.sizes
            return Shape(tokens, features // 2 if spec_of(self.op).example is of_gated else features, options=options)
        samples, channels, height, width, *out = self.sizes
        return Shape(
            channels=channels,
            out=out[0] if out else 1,
            picture=(samples, height, width),
            kernel=self.kernel,
            stride=self.stride,
            norm_groups=NORM_GROUPS if channels % NORM_GROUPS == 0 else 1,
            options=options,
            prefers_picture=True,
        )


def tensor_bytes(values: Sequence[Any]) -> int:
    """The bytes of the tensors among some values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def cases_of(
    op: str,
    shapes: Sequence[str],
    dtype: torch.dtype,
    epilogue: Sequence[str],
    kernel: int,
    stride: int,
) -> list[Case]:
    """The cases that a command line asks for.

    Args:
        op: its name.
        shapes: as `shape_kinds` writes them; the usual one where there is none.
        dtype: of floats.
        epilogue: of `EPILOGUES`.
        kernel, stride: of convolutions.

    Raises:
        ValueError: there is no such op, it takes no such shape or kernel, or it cannot add what is asked for.
    """
    if op not in specs():
        raise ValueError(f"--op {op}: there is no such op: choose among {', '.join(specs())}")
    if kernel % 2 == 0:
        raise ValueError(f"--kernel {kernel}: it must be odd, since as much is padded on all sides")
    accepted = epilogues_of(op)
    for name in epilogue:
        if name not in accepted:
            known = f"it can add {', '.join(accepted)}" if accepted else "it has no epilogue: leave --epilogue out"
            raise ValueError(f"--epilogue {name}: {op} cannot add that; {known}")
    sizes = [parse_shape(op, text) for text in shapes or [shape_kinds(op)[0].usual]]
    return [Case(op, found, dtype, tuple(epilogue), kernel, stride) for found in sizes]
