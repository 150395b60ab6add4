"""What the search of a layer tries: a recipe makes a layer plan from any calibration."""

from __future__ import annotations

from dataclasses import dataclass

from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.sensitivity.trials import Outcome


@dataclass(frozen=True)
class Recipe:
    """How to make a layer plan from any calibration: of all prompts, or of a fold.

    Attributes:
        smoothing: an alpha, PARTS, or None.
        widened: cover the range of all steps, where the calibrated one is smaller: a range that is too narrow costs far
            more than one that is too wide.
        share: of the range.
    """

    scheme: Scheme
    first_token: bool = False
    smoothing: float | str | None = None
    widened: bool = False
    share: float = 1.0
    rounding: str = "nearest"

    @property
    def takes_inputs(self) -> bool:
        """Whether the layer plan depends on the calibration's inputs."""
        return self.scheme.is_static or self.smoothing is not None or self.rounding == "gptq"


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried."""

    recipe: Recipe
    outcome: Outcome
