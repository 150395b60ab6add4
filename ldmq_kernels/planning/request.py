"""The request for a plan: one object from the command line and `ldmq.plan` down to the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldmq_kernels.calibration.drawings import Call, SamplingSettings
from ldmq_kernels.calibration.ranges import FIRST_STEP, MODES
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.assignment import SQNR
from ldmq_kernels.planning.target import Target
from ldmq_kernels.sensitivity.similarity import SSIM

DEFAULT_FORMATS = ("w8a8", "w8a16", "fp16")
SIGNALS = (SQNR, SSIM)


def split_calls(calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """Prompts or calls to calibrate on, and others to verify on: the last quarter, or all where there are too few.

    Raises:
        ValueError: there is none, or no prompt has any text.
    """
    given = [call.strip() if isinstance(call, str) else call for call in calls]
    drawn = [call for call in given if call != ""]
    if not drawn:
        raise ValueError("there is no prompt and no call: give at least one to calibrate on")
    held = max(1, len(drawn) // 4)
    return (drawn[:-held], drawn[-held:]) if len(drawn) > 1 else (drawn, drawn)


@dataclass(frozen=True)
class PlanRequest:
    """Everything that a plan is made from, beside the pipeline.

    Attributes:
        calls: what is drawn, like what the pipeline will be used for: prompts, mappings of arguments of its own call,
            or functions that take the pipeline and run it once. The last quarter verifies the plan. One alone needs
            no list.
        target: limits that the plan must keep; None where plans of all sizes are asked for.
        formats: formats or schemes to choose among; "w8a8" stands for static, timestep, dynamic and split.
        calibration_mode: the sampling steps that static ranges start from: "first-step", "sampled-steps" or
            "all-steps".
        settings: how pictures are drawn, in calibration as later by the user.
        part: the denoiser that is planned, where the pipeline has several; its first one if None.
        signals: what the plan keeps: "sqnr", and "ssim" for the structure of pictures too.
        hybrid: the share of the noise, 0 to 1, whose blocks start with higher precision; 0 for none.
        time_layers: whether the layers are timed on the pipeline's device, so that those that would get slower stay
            in 16 bit; a target in milliseconds times them in any case.
        work_dir: the folder that keeps the analysis, so that the same request goes on after a kill; None for none.
        show: whether progress is shown on standard error.

    Raises:
        ValueError: there is nothing to draw, a format, signal or calibration mode is unknown, or a number is out of
            range.
    """

    calls: Sequence[Call] | Call
    target: Target | None = None
    formats: Sequence[str] = DEFAULT_FORMATS
    calibration_mode: str = FIRST_STEP
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    signals: Sequence[str] = (SQNR,)
    part: str | None = None
    hybrid: float = 0.0
    time_layers: bool = False
    work_dir: Path | None = None
    show: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.calls, str | Mapping) or callable(self.calls):
            object.__setattr__(self, "calls", (self.calls,))
        for name in ("calls", "formats", "signals"):
            values = getattr(self, name)
            if isinstance(values, str):
                raise ValueError(f"{name} is the text {values!r}: give a list of texts, such as [{values!r}]")
            object.__setattr__(self, name, tuple(values))
        split_calls(self.drawn)
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
    def drawn(self) -> tuple[Call, ...]:
        """Everything that is drawn."""
        assert isinstance(self.calls, tuple)
        return self.calls

    @property
    def has_one_call(self) -> bool:
        """Whether there is one alone, which is calibrated and verified on."""
        return len(self.calibration_calls) == len(self.held_out_calls) == len(self.drawn)

    @property
    def calibration_calls(self) -> list[Call]:
        """What is calibrated on."""
        return split_calls(self.drawn)[0]

    @property
    def held_out_calls(self) -> list[Call]:
        """What verifies the plan; that of the calibration where there is one alone."""
        return split_calls(self.drawn)[1]

    @property
    def needs_times(self) -> bool:
        """Whether the layers' times must be measured."""
        return self.time_layers or (self.target is not None and self.target.needs_times)
