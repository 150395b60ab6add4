"""The one registry of formats, and the schemes made from it: a format and one of its ways to scale activations."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ldmq_kernels.numerics.formats.base import ActivationFormat, Buffer, Format
from ldmq_kernels.numerics.formats.rounding import not_positive


class Scheme:
    """A format, and for quantized activations where their scale comes from; one object for each, of the registry.

    The text form is "w8a8-static", "w4a8-dynamic", "w8a16", "fp16" and so on.

    Attributes:
        format: the format.
        activations: one of the format's.
        quantizes: whether anything is quantized at all.
        quantizes_activations: whether activations are.
        is_static: whether calibrated activation scales are needed, one or one a timestep group: none is measured in
            a call.
        has_timestep_scales: whether there is an activation scale for each group of sampling steps.
        is_split: whether each activation is two int8 values: as exact as 16 bits, at the price of two products.
        is_rotated: whether the channels of the input and of the weight are rotated by a Hadamard matrix.
        is_precise: whether it is of those that sensitive blocks of a model start with.
        takes_quantized: whether activations are one 8-bit value each, as the ops that end in a quantization make them;
            none of these rotates.
    """

    def __init__(self, format: Format, activations: ActivationFormat) -> None:
        self.format = format
        self.activations = activations
        self.quantizes = format.weight.is_quantized
        self.quantizes_activations = activations.dtype is not None
        self.is_static = activations.is_calibrated
        self.has_timestep_scales = activations.name == "timestep"
        self.is_split = activations.name == "split"
        self.is_rotated = activations.is_rotated
        self.is_precise = format.weight.is_precise and activations.is_precise
        self.takes_quantized = self.quantizes_activations and not self.is_split and not self.is_rotated
        self._name = format.name + activations.suffix

    def __str__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"<scheme {self}>"

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return scheme_of, (str(self),)

    def with_activations(self, name: str) -> Scheme | None:
        """The scheme of the same format with other activations, "static" and so on; None where there is none."""
        return next((s for s in SCHEMES.values() if s.format is self.format and s.activations.name == name), None)

    @property
    def finer(self) -> Scheme | None:
        """The scheme of the same activations and a finer weight, of the format that this one's is like."""
        activations = self.activations.name
        return next(
            (s for s in SCHEMES.values() if s.format.name == self.format.like and s.activations.name == activations),
            None,
        )

    @cached_property
    def operation_cost(self) -> float:
        """What a multiply-accumulate costs, relative to int8 by int8 with a static scale."""
        return self.format.operation_cost * self.activations.operation_cost

    @cached_property
    def colours(self) -> tuple[str, str]:
        """The colours of the scheme in a report, on light and on dark ground, as "#rrggbb"."""
        given = self.format.colours.get(self.activations.name)
        if given is not None:
            return given
        red, green, blue = hashlib.sha256(str(self).encode()).digest()[:3]
        light, dark = ([start + value % 96 for value in (red, green, blue)] for start in (48, 128))
        return "#" + bytes(light).hex(), "#" + bytes(dark).hex()

    def buffers(self, shape: Sequence[int], *, smoothed: bool = False, timestep_groups: int = 1) -> dict[str, Buffer]:
        """The tensors that a layer stores, by name.

        Args:
            shape: (out, C), or (out, ..., C) of a convolution's float weight.
            smoothed: whether the input is smoothed, which only quantized activations are.
            timestep_groups: of a timestep scheme.
        """
        stored = dict(self.format.weight.buffers(shape))
        if self.is_static:
            stored["input_scale"] = Buffer((timestep_groups if self.has_timestep_scales else 1,), torch.float32)
        if smoothed and self.quantizes_activations:
            stored["smoothing"] = Buffer((shape[-1],), torch.float32)
        return stored

    def bytes(self, shape: Sequence[int], *, smoothed: bool = False, timestep_groups: int = 1) -> int:
        """Bytes of a layer's weight and scales in a checkpoint; see `buffers`."""
        stored = self.buffers(shape, smoothed=smoothed, timestep_groups=timestep_groups)
        return sum(buffer.bytes for buffer in stored.values())

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each tensor that a quantized layer of this scheme may store, by name."""
        if not self.quantizes:
            return {}
        return {name: buffer.dtype for name, buffer in self.buffers((1, 1), smoothed=True).items()}

    def check(self, name: str, stored: Tensor | None) -> None:
        """Refuse a tensor that a layer of this scheme never stores; None and meta tensors hold nothing to check.

        Args:
            name: of `dtypes`.
            stored: its tensor in a checkpoint.

        Raises:
            ValueError: it has another dtype, a scale is not finite and positive, or integers are out of range.
        """
        if stored is None or stored.is_meta:
            return
        expected = self.dtypes[name]
        if stored.dtype != expected:
            raise ValueError(f"{name} is {stored.dtype}, {expected} is needed: is this a checkpoint of another plan?")
        of_input = name in ("input_scale", "smoothing")
        wrong, accepted = not_positive(stored) if of_input else self.format.weight.wrong_values(name, stored)
        if bool(wrong.any()):
            raise ValueError(f"{name} holds a value that is not {accepted}: the checkpoint is damaged")


FORMATS: dict[str, Format] = {}
SCHEMES: dict[str, Scheme] = {}
FORMER_NAMES = {  # in plans of versions 1 and 2
    "w8a8-stepped": "w8a8-timestep",
    "w8a8-paired": "w8a8x2",
    "w4a8-stepped": "w4a8-timestep",
    "w4a8-paired": "w4a8x2",
}


def register(format: Format) -> None:
    """Make a format known: plans, layers, the command line and reports take its schemes from now on.

    Raises:
        ValueError: there is a format or a scheme of this name.
    """
    made = {str(scheme): scheme for scheme in (Scheme(format, activations) for activations in format.activations)}
    taken = sorted({format.name, *made} & {*FORMATS, *SCHEMES})
    if taken:
        raise ValueError(f"there is a format or scheme {taken[0]!r} already: choose another name")
    FORMATS[format.name] = format
    SCHEMES.update(made)


def unregister(name: str) -> None:
    """Forget a format and its schemes.

    Raises:
        KeyError: there is no format of this name.
    """
    format = FORMATS.pop(name)
    for scheme in [scheme for scheme, made in SCHEMES.items() if made.format is format]:
        del SCHEMES[scheme]


def scheme_of(name: str) -> Scheme:
    """The scheme of a name, today's or a former one.

    Raises:
        ValueError: there is none.
    """
    scheme = SCHEMES.get(FORMER_NAMES.get(name, name))
    if scheme is None:
        raise ValueError(f"unknown scheme {name!r}: choose among {', '.join(SCHEMES)}")
    return scheme


def schemes_of(kind: str) -> list[str]:
    """The schemes that a kind of layer can have: a "linear", a "conv1d", a "conv2d" or a "conv3d"."""
    return [name for name, scheme in SCHEMES.items() if kind in scheme.format.layers]


def no_groups(scheme: Scheme, channels: int) -> str:
    """Why a convolution over time and space with so many input channels cannot have a scheme, in words."""
    return (
        f"{scheme} has groups of {scheme.format.weight.channel_groups} input channels, which the {channels} of a "
        "conv3d over time and space cannot be folded into: choose an 8-bit scheme"
    )


def parse_schemes(names: list[str] | tuple[str, ...]) -> list[Scheme]:
    """Schemes by name; "w8a8" stands for all its forms. Former names are taken too.

    Raises:
        ValueError: a name is neither a format nor a scheme.
    """
    found: dict[str, Scheme] = {}
    for name in (FORMER_NAMES.get(name, name) for name in names):
        matching = [s for s in SCHEMES.values() if name in (str(s), s.format.name)]
        if not matching:
            known = ", ".join([*FORMATS, *(n for n in SCHEMES if n not in FORMATS)])
            raise ValueError(f"unknown format {name!r}: choose among {known}")
        found |= {str(s): s for s in matching}
    return list(found.values())
