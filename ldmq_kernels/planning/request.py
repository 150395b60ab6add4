"""The request for a plan: one object from the command line and `ldmq.plan` down to the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldmq_kernels.calibration.ranges import FIRST_STEP, MODES
from ldmq_kernels.calibration.trajectory import SamplingSettings
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.assignment import SQNR
from ldmq_kernels.planning.target import Target
from ldmq_kernels.sensitivity.similarity import SSIM

DEFAULT_FORMATS = ("w8a8", "w8a16", "fp16")
SIGNALS = (SQNR, SSIM)


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Prompts to calibrate on, and prompts to verify on: the last quarter, or all where there are too few.

    Raises:
        ValueError: no prompt has any text.
    """
    unique = [text.strip() for text in prompts if text.strip()]
    if not unique:
        raise ValueError("there is no prompt: give at least one line of text to calibrate on")
    held = max(1, len(unique) // 4)
    return (unique[:-held], unique[-held:]) if len(unique) > 1 else (unique, unique)


@dataclass(frozen=True)
class PlanRequest:
    """Everything that a plan is made from, beside the pipeline.

    Attributes:
        prompts: texts like those that the pipeline will be used for; the last quarter verifies the plan. A text alone
            is one prompt, as for a pipeline.
        target: limits that the plan must keep; None where plans of all sizes are asked for.
        formats: formats or schemes to choose among; "w8a8" stands for static, timestep, dynamic and split.
        calibration_mode: the sampling steps that static ranges start from: "first-step", "sampled-steps" or
            "all-steps".
        settings: how pictures are drawn, in calibration as later by the user.
        signals: what the plan keeps: "sqnr", and "ssim" for the structure of pictures too.
        hybrid: the share of the noise, 0 to 1, whose blocks start with higher precision; 0 for none.
        time_layers: whether the layers are timed on the pipeline's device, so that those that would get slower stay
            in 16 bit; a target in milliseconds times them in any case.
        work_dir: the folder that keeps the analysis, so that the same request goes on after a kill; None for none.
        show: whether progress is shown on standard error.

    Raises:
        ValueError: no prompt has any text, a format, signal or calibration mode is unknown, or a number is out of
            range.
    """

    prompts: Sequence[str] | str
    target: Target | None = None
    formats: Sequence[str] = DEFAULT_FORMATS
    calibration_mode: str = FIRST_STEP
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    signals: Sequence[str] = (SQNR,)
    hybrid: float = 0.0
    time_layers: bool = False
    work_dir: Path | None = None
    show: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            object.__setattr__(self, "prompts", (self.prompts,))
        for name in ("prompts", "formats", "signals"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise ValueError(f"{name} is the text {values!r}: give a list of texts, such as [{values!r}]")
            object.__setattr__(self, name, tuple(values))
        split_prompts(self.prompts)
        if not self.formats:
            raise ValueError(f"there is no format to choose among: leave formats out for {', '.join(DEFAULT_FORMATS)}")
        parse_schemes(tuple(self.formats))
        if self.calibration_mode not in MODES:
            raise ValueError(f"unknown calibration {self.calibration_mode!r}: choose one of {', '.join(MODES)}")
        if SQNR not in self.signals or set(self.signals) - set(SIGNALS):
            raise ValueError(f"the signals are {','.join(self.signals) or 'none'}: give {SQNR}, or {SQNR},{SSIM}")
        if not 0 <= self.hybrid <= 1:
            raise ValueError(f"hybrid is {self.hybrid}: it is a share of the noise, from 0 to 1")

    @property
    def schemes(self) -> list[str]:
        """The names of all schemes that the formats stand for."""
        return [str(scheme) for scheme in parse_schemes(tuple(self.formats))]

    @property
    def calibration_prompts(self) -> list[str]:
        """The prompts that are calibrated on."""
        return split_prompts(self.prompts)[0]

    @property
    def held_out_prompts(self) -> list[str]:
        """The prompts that verify the plan; those of the calibration where there is one prompt."""
        return split_prompts(self.prompts)[1]

    @property
    def needs_times(self) -> bool:
        """Whether the layers' times must be measured."""
        return self.time_layers or (self.target is not None and self.target.needs_times)
