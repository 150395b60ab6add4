"""The limits that a plan must keep, and the quantity that it then makes as small as it can."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Goal = Literal["noise", "bytes", "milliseconds"]


@dataclass(frozen=True)
class Target:
    """Limits of a plan, in any combination.

    The first of noise, bytes and milliseconds that has no limit is made as small as the others allow: dB alone,
    or dB with milliseconds, gives the fewest bytes; bytes alone, or milliseconds alone, the highest SQNR; dB with
    bytes the least time. With all three it is the noise.

    Attributes:
        sqnr_db: least SQNR of the UNet's output in dB, averaged over the sampling steps.
        bytes: most bytes of the weights of all linears and convolutions.
        milliseconds: most time of one UNet call for one picture, as `planning.times` measures it.
        layers: most layers that may stay in 16 bit, of those that run: "all but the ten most sensitive".
    """

    sqnr_db: float | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in (self.sqnr_db, self.bytes, self.milliseconds, self.layers)):
            raise ValueError("give at least one target: SQNR in dB, bytes, milliseconds, or layers left in 16 bit")
        if self.sqnr_db is not None and not math.isfinite(self.sqnr_db):
            raise ValueError(f"the target of {self.sqnr_db} dB is not a finite number")
        for name, value in (("bytes", self.bytes), ("milliseconds", self.milliseconds)):
            if value is not None and not value > 0:
                raise ValueError(f"the target of {value} {name} must be above 0")
        if self.layers is not None and self.layers < 0:
            raise ValueError(f"the target of {self.layers} layers in 16 bit must be 0 or more")

    @property
    def goal(self) -> Goal:
        """The quantity that is made as small as the limits allow."""
        if self.sqnr_db is None:
            return "noise"
        if self.bytes is None:
            return "bytes"
        return "milliseconds" if self.milliseconds is None else "noise"

    @property
    def needs_times(self) -> bool:
        """Whether the layers' times must be known."""
        return self.milliseconds is not None or self.goal == "milliseconds"

    def to_dict(self) -> dict[str, Any]:
        """The limits that were given, as the plan file has them."""
        given = {
            "sqnr_db": self.sqnr_db,
            "bytes": self.bytes,
            "milliseconds": self.milliseconds,
            "layers": self.layers,
        }
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        words = {
            "sqnr_db": "{:g} dB",
            "bytes": "{} bytes",
            "milliseconds": "{:g} ms",
            "layers": "{} layers in 16 bit",
        }
        return ", ".join(words[name].format(value) for name, value in self.to_dict().items())
