"""What one op is, in one place: everything that the package knows of an op is read from its specification, by name.

`ldmq_kernels.ops` makes the specifications; dispatch, the measurements, doctor, the tuner and the tests read them here.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ldmq_kernels.kernels.agreement import Agreement

Arguments = tuple[Any, ...]
Key = tuple[Any, ...]
SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
    "tuple[int, int]": "int[2]",
    "tuple[int, int, int, int]": "int[4]",
}
TENSORS = ("Tensor", "Tensor | None")
_TENSOR: set[Any] = {Tensor, Parameter}
_NONE: set[Any] = {type(None)}
_SIZES: set[Any] = {tuple, list, torch.Size}
TYPES: dict[str, set[Any]] = {  # of values that need no conversion: a subclass of Tensor is torch's to handle
    "Tensor": _TENSOR,
    "Tensor | None": _TENSOR | _NONE,
    "int": {int},
    "float": {float},
    "bool": {bool},
    "torch.dtype": {torch.dtype},
    "torch.dtype | None": {torch.dtype} | _NONE,
    "tuple[int, int]": _SIZES,
    "tuple[int, int, int, int]": _SIZES,
}
RETURN_TYPES = {"Tensor": "Tensor", "tuple[Tensor, Tensor]": "(Tensor, Tensor)"}


def _x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


class CallShape(ABC):
    """What makes two calls of an op the same shape to whoever measures them.

    Attributes:
        takes_pictures: whether a 4-D input is written in full; the rows of any other are one number.
    """

    takes_pictures: bool = False

    @abstractmethod
    def key(self, names: Sequence[str]) -> Callable[[Arguments], Key]:
        """What tells the shapes of calls apart, quick to make and to hash; `names` are the op's arguments."""

    @abstractmethod
    def text(self, key: Key) -> str:
        """A key as people read it, and as it stands in the file of measurements."""

    def _input(self, shape: Sequence[int]) -> str:
        if self.takes_pictures and len(shape) == 4:
            return _x(shape)
        return _x((torch.Size(shape[:-1]).numel(), *shape[-1:]))


@dataclass(frozen=True)
class InputShape(CallShape):
    """The sizes of the input alone."""

    takes_pictures: bool = False

    def key(self, names: Sequence[str]) -> Callable[[Arguments], Key]:
        """The input's shape."""
        return lambda a: (a[0].shape,)

    def text(self, key: Key) -> str:
        """Such as "17x68"."""
        return self._input(key[0])


@dataclass(frozen=True)
class ProducerShape(CallShape):
    """The sizes of the input, and where the scale of the output comes from."""

    takes_pictures: bool = False

    def key(self, names: Sequence[str]) -> Callable[[Arguments], Key]:
        """The input's shape, whether the scale is measured, and for each token if the op can be told so."""
        scale = names.index("inv_scale")
        if "per_token" not in names:
            return lambda a: (a[0].shape, a[scale] is None)
        per_token = names.index("per_token")
        return lambda a: (a[0].shape, a[scale] is None, a[per_token])

    def text(self, key: Key) -> str:
        """Such as "17x68, per token"."""
        shape, is_measured, *per_token = key
        scale = "static" if not is_measured else "per token" if all(per_token) else "per sample"
        return f"{self._input(shape)}, {scale}"


@dataclass(frozen=True)
class LinearShape(CallShape):
    """The rows and channels of the input, and the columns of the output.

    Attributes:
        columns: the argument with an element, or a row, for each of them.
    """

    columns: str = "weight_scale"

    def key(self, names: Sequence[str]) -> Callable[[Arguments], Key]:
        """The input's shape and the number of columns."""
        columns = names.index(self.columns)
        return lambda a: (a[0].shape, a[columns].shape[0])

    def text(self, key: Key) -> str:
        """Such as "17x68 to 37"."""
        return f"{self._input(key[0])} to {key[1]}"


@dataclass(frozen=True)
class Conv2dShape(CallShape):
    """The sizes of the input, the channels of the output and the geometry; padding is no part of it."""

    takes_pictures: bool = True

    def key(self, names: Sequence[str]) -> Callable[[Arguments], Key]:
        """The input's shape, the output's channels, kernel size, stride, dilation, groups and upsampling."""
        wanted = ("weight_scale", "kernel_size", "stride", "dilation", "groups", "upsample")
        scale, kernel, stride, dilation, groups, upsample = map(names.index, wanted)
        return lambda a: (
            a[0].shape,
            a[scale].shape[0],
            *a[kernel],
            *a[stride],
            *a[dilation],
            a[groups],
            a[upsample],
        )

    def text(self, key: Key) -> str:
        """Such as "2x68x9x7 to 37, kernel 3x3, stride 1x1, upsample 1"."""
        shape, columns, r, s, stride_y, stride_x, *dilation, groups, upsample = key
        text = f"{_x(shape)} to {columns}, kernel {_x((r, s))}, stride {_x((stride_y, stride_x))}, upsample {upsample}"
        unusual = {"dilation": _x(dilation)} if dilation != [1, 1] else {}
        unusual |= {"groups": groups} if groups != 1 else {}
        return text + "".join(f", {name} {value}" for name, value in unusual.items())


@dataclass(frozen=True)
class OpSpec:
    """The specification of an op.

    Attributes:
        function: the typed Python function that calls it; its name, annotations and docstring are the op's.
        fake: (call) -> the result's metadata; the call's arguments are attributes.
        shape: what makes two calls the same shape.
        agreement: how near backends' results must come to each other.
        example: (spec, operands) -> arguments, of `ops.operands.Operands`.
        rounds: whether it rounds activations or takes rounded ones: it has no gradients. The definition of any other
            op is differentiable.
        operand_dtype: of the quantized activations and of the 8-bit weight that it takes.
    """

    function: Callable[..., Any]
    fake: Callable[[Any], Any]
    shape: CallShape
    agreement: Agreement
    example: Callable[[OpSpec, Any], Arguments]
    rounds: bool = True
    operand_dtype: torch.dtype = torch.int8

    @property
    def name(self) -> str:
        """The op's name, as in torch.ops.ldmq."""
        return self.function.__name__

    @functools.cached_property
    def arguments(self) -> list[str]:
        """The names of the arguments, in the order of the schema."""
        return list(inspect.signature(self.function).parameters)

    @functools.cached_property
    def types(self) -> list[set[Any]]:
        """The types that each argument may have where torch's dispatcher is not asked."""
        return [TYPES[self.function.__annotations__[name]] for name in self.arguments]

    @functools.cached_property
    def optional(self) -> set[str]:
        """The arguments that may be None."""
        of = self.function.__annotations__
        return {name for name in self.arguments if of.get(name) in ("Tensor | None", "torch.dtype | None")}

    @functools.cached_property
    def may_be_left_out(self) -> set[str]:
        """The last arguments, which are None where a call does not give them; torch leaves out what is None there."""
        parameters = inspect.signature(self.function).parameters
        return {name for name, parameter in parameters.items() if parameter.default is None}

    @functools.cached_property
    def floating(self) -> list[int]:
        """The places of the arguments that may require gradients."""
        integers = {"x_q", "weight", "multiplier"}
        of = self.function.__annotations__
        return [i for i, name in enumerate(self.arguments) if of[name] in TENSORS and name not in integers]

    @property
    def is_product(self) -> bool:
        """Whether it multiplies by a weight."""
        return isinstance(self.shape, LinearShape | Conv2dShape)

    @property
    def schema(self) -> str:
        """The schema that torch.library takes.

        Raises:
            ValueError: an annotation is missing, or is none that a schema has.
        """
        annotations = self.function.__annotations__
        for name in self.arguments:
            if annotations.get(name) not in SCHEMA_TYPES:
                found = annotations.get(name, "not annotated")
                raise ValueError(f"{self.name}: {name} is {found}, must be one of {', '.join(SCHEMA_TYPES)}")
        if annotations.get("return") not in RETURN_TYPES:
            raise ValueError(f"{self.name}: its result must be annotated as one of {', '.join(RETURN_TYPES)}")
        default = {name: "=None" if name in self.may_be_left_out else "" for name in self.arguments}
        arguments = ", ".join(f"{SCHEMA_TYPES[annotations[name]]} {name}{default[name]}" for name in self.arguments)
        return f"{self.name}({arguments}) -> {RETURN_TYPES[annotations['return']]}"

    def call(self, *arguments: Any) -> SimpleNamespace:
        """Arguments by name."""
        left_out = (None,) * (len(self.arguments) - len(arguments))
        return SimpleNamespace(**dict(zip(self.arguments, arguments + left_out, strict=True)))

    def shape_text(self, arguments: Arguments) -> str:
        """The shapes of a call as the file of measurements has them: "8192x640 to 5120" for a linear of so many rows.

        Data types and what the epilogue adds are no part of it.
        """
        return self.shape.text(self.shape.key(self.arguments)(arguments))

    def check(self) -> None:
        """Accept a specification that is whole.

        Raises:
            ValueError: a part is missing or does not fit; the text names the op and the part.
        """
        for part in fields(self):
            if getattr(self, part.name) is None:
                raise ValueError(f"the specification of {self.name} has no {part.name}")
        schema = self.schema
        lines = (self.function.__doc__ or "").splitlines()
        described = {line.strip().partition(":")[0] for line in lines}
        undescribed = [name for name in self.arguments if name not in described]
        if not lines or undescribed or not any(line.strip() == "Returns:" for line in lines):
            missing = ", ".join(undescribed) or "what it returns"
            raise ValueError(f"the docstring of {self.name} does not describe {missing}: {schema}")
        try:
            self.shape.key(self.arguments)
        except ValueError as error:
            raise ValueError(f"the shape of {self.name} does not fit its arguments: {error}") from None


_SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> None:
    """Add a specification that is whole to the table.

    Raises:
        ValueError: a part is missing or does not fit; the text names the op and the part.
    """
    spec.check()
    _SPECS[spec.name] = spec


def specs() -> dict[str, OpSpec]:
    """The specifications by name, in the order in which the ops are defined."""
    return _SPECS


def spec_of(op: str) -> OpSpec:
    """The specification of an op.

    Raises:
        ValueError: there is no such op.
    """
    if op not in _SPECS:
        raise ValueError(f"there is no op {op!r}: choose one of {', '.join(_SPECS)}")
    return _SPECS[op]
