"""The limits that a plan must keep, and the quantity that it then makes as small as it can."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Goal = Literal["noise", "bytes", "milliseconds"]
Measure = Literal["sqnr", "latent", "psnr"]
MEASURES: dict[Measure, str] = {
    "sqnr": "SQNR of the UNet output",
    "latent": "SQNR of the final latents",
    "psnr": "PSNR of the pictures",
}


@dataclass(frozen=True)
class Target:
    """Limits of a plan, in any combination.

    The first of noise, bytes and milliseconds that has no limit is made as small as the others allow: dB alone,
    or dB with milliseconds, gives the fewest bytes; bytes alone, or milliseconds alone, the highest SQNR; dB with
    bytes the least time. With all three it is the noise.

    Attributes:
        sqnr_db: least SQNR of the UNet's output in dB along the float trajectory, averaged over the sampling steps.
        bytes: most bytes of the weights of all linears and convolutions.
        milliseconds: most time of one UNet call for one picture, as `planning.times` measures it.
        layers: most layers that may stay in 16 bit, of those that run: "all but the ten most sensitive".
        latent_db: least SQNR of the final latents in dB, as drawn, averaged over pictures; in place of `sqnr_db`.
        psnr_db: least PSNR of the pictures against the float ones in dB, as drawn, averaged over pictures; alike.
    """

    sqnr_db: float | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    layers: int | None = None
    latent_db: float | None = None
    psnr_db: float | None = None

    def __post_init__(self) -> None:
        if not self.to_dict():
            raise ValueError(
                "give at least one target: dB at the UNet's output, in the latents or in the pictures, bytes, "
                "milliseconds, or layers left in 16 bit"
            )
        if sum(value is not None for value in (self.sqnr_db, self.latent_db, self.psnr_db)) > 1:
            raise ValueError(f"{self} are targets of several places: give one of sqnr_db, latent_db and psnr_db")
        if self.db is not None and not math.isfinite(self.db):
            raise ValueError(f"the target of {self.db} dB is not a finite number")
        for name, value in (("bytes", self.bytes), ("milliseconds", self.milliseconds)):
            if value is not None and not value > 0:
                raise ValueError(f"the target of {value} {name} must be above 0")
        if self.layers is not None and self.layers < 0:
            raise ValueError(f"the target of {self.layers} layers in 16 bit must be 0 or more")

    @property
    def measure(self) -> Measure | None:
        """Where the target in dB is measured; None where there is none."""
        limits: dict[Measure, float | None] = {"sqnr": self.sqnr_db, "latent": self.latent_db, "psnr": self.psnr_db}
        return next((measure for measure, limit in limits.items() if limit is not None), None)

    @property
    def db(self) -> float | None:
        """The target in dB, wherever it is measured."""
        return next((db for db in (self.sqnr_db, self.latent_db, self.psnr_db) if db is not None), None)

    @property
    def goal(self) -> Goal:
        """The quantity that is made as small as the limits allow."""
        if self.db is None:
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
            "latent_db": self.latent_db,
            "psnr_db": self.psnr_db,
        }
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        words = {
            "sqnr_db": "{:g} dB",
            "bytes": "{} bytes",
            "milliseconds": "{:g} ms",
            "layers": "{} layers in 16 bit",
            "latent_db": "{:g} dB in the latents",
            "psnr_db": "{:g} dB of PSNR",
        }
        return ", ".join(words[name].format(value) for name, value in self.to_dict().items())
