"""The precisions that a layer can have, and the ways of scaling its activations."""

from __future__ import annotations

from dataclasses import dataclass

GROUP_SIZE = 64


@dataclass(frozen=True)
class Format:
    """Bits of weights and activations; 16 bits mean the model's own dtype."""

    name: str
    weight_bits: int
    activation_bits: int
    layers: tuple[str, ...] = ("linear", "conv2d")


FORMATS = {
    f.name: f
    for f in (
        Format("w8a8", 8, 8),
        Format("w4a8", 4, 8),
        Format("w8a16", 8, 16),
        Format("w4a16", 4, 16, layers=("linear",)),
        Format("fp16", 16, 16),
    )
}
ACTIVATIONS = {"static": "-static", "timestep": "-timestep", "dynamic": "-dynamic", "split": "x2"}  # as written


@dataclass(frozen=True)
class Scheme:
    """A format, and for 8-bit activations where their scale comes from.

    "static" is one calibrated scale, "timestep" a calibrated one for each group of sampling steps, "dynamic" is
    measured in each call. "split" is static with two int8 values for each activation, the second for what the
    first leaves: as exact as 16 bits, at the price of two products, for few and small layers. The text form is
    "w8a8-static", "w4a8-dynamic", "w8a16", "fp16" and so on.
    """

    format: Format
    activations: str | None = None

    def __str__(self) -> str:
        return self.format.name + ACTIVATIONS.get(self.activations or "", "")

    @property
    def is_static(self) -> bool:
        """Whether calibrated activation scales are needed, one or one a timestep group: none is measured in a call."""
        return self.activations in ("static", "timestep", "split")

    @property
    def has_timestep_scales(self) -> bool:
        """Whether there is an activation scale for each group of sampling steps."""
        return self.activations == "timestep"

    @property
    def is_split(self) -> bool:
        """Whether each activation is two int8 values."""
        return self.activations == "split"

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized at all."""
        return self.format.weight_bits < 16


SCHEMES = {
    str(scheme): scheme
    for f in FORMATS.values()
    for scheme in ([Scheme(f, a) for a in ACTIVATIONS] if f.activation_bits == 8 else [Scheme(f)])
}
FLOAT = SCHEMES["fp16"]
FORMER_NAMES = {  # in plans of versions 1 and 2
    "w8a8-stepped": "w8a8-timestep",
    "w8a8-paired": "w8a8x2",
    "w4a8-stepped": "w4a8-timestep",
    "w4a8-paired": "w4a8x2",
}


def schemes_of(kind: str) -> list[str]:
    """The schemes that a "linear" or a "conv2d" can have."""
    return [name for name, scheme in SCHEMES.items() if kind in scheme.format.layers]


def parse_schemes(names: list[str] | tuple[str, ...]) -> list[Scheme]:
    """Schemes by name; "w8a8" stands for its static, timestep, dynamic and split forms. Former names are taken too.

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
