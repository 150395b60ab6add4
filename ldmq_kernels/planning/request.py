"""The request for a plan: one object from the command line and `ldmq.plan` down to the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from ldmq_kernels.calibration.adjoint import End
from ldmq_kernels.calibration.drawings import Call
from ldmq_kernels.calibration.ranges import FIRST_STEP, MODES
from ldmq_kernels.calibration.settings import SamplingSettings, Settings, each_of
from ldmq_kernels.kernels.devices import device_of
from ldmq_kernels.numerics.formats import parse_schemes, scheme_of
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.planning.assignment import SQNR
from ldmq_kernels.planning.options import ENDS
from ldmq_kernels.planning.target import MEASURES, Measure, Target
from ldmq_kernels.plans.cost import least_bytes
from ldmq_kernels.sensitivity.similarity import SSIM

DEFAULT_FORMATS = ("w8a8", "w8a16", "fp16")
SMALLER_FORMATS = ("w4a8", "w4a16")  # beside them where a target in bytes leaves no room for 8-bit weights
SIGNALS = (*MEASURES, SSIM)


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
        formats: formats or schemes to choose among; "w8a8" stands for static, timestep, dynamic, split and rotated.
            None for `DEFAULT_FORMATS`, and `SMALLER_FORMATS` too where the weights take more bytes by these alone
            than the target has.
        calibration_mode: the sampling steps that static ranges start from: "first-step", "sampled-steps",
            "drawn-steps" or "all-steps".
        settings: how pictures are drawn, in calibration as later by the user: one, or several, at each of which all
            is drawn, and of which the worst must keep the target.
        part: the denoiser that is planned, where the pipeline has several; its first one if None.
        signals: what the plan keeps: "sqnr" of the UNet's output, or "latent" or "psnr" of what is drawn, where no
            target in dB says which; and "ssim" for the structure of pictures too.
        hybrid: the share of the noise, 0 to 1, whose blocks start with higher precision; 0 for none.
        time_layers: whether the layers are timed on the pipeline's device, so that those that would get slower stay
            in 16 bit; a target in milliseconds times them in any case.
        times_for: a device of `kernels.devices`, such as "h200", whose times are predicted in place of measured ones
            here; plans say that they are. None for the pipeline's own.
        cut_latents: whether latents will be cut in parts: no layer gets a scale that depends on how.
        work_dir: the folder that keeps the analysis, so that the same request goes on after a kill; None for none.
        show: whether progress is shown on standard error.

    Raises:
        ValueError: there is nothing to draw, a format, signal or calibration mode is unknown, or a number is out of
            range.
    """

    calls: Sequence[Call] | Call
    target: Target | None = None
    formats: Sequence[str] | None = None
    calibration_mode: str = FIRST_STEP
    settings: Settings = field(default_factory=SamplingSettings)
    signals: Sequence[str] = (SQNR,)
    part: str | None = None
    hybrid: float = 0.0
    time_layers: bool = False
    times_for: str | None = None
    cut_latents: bool = False
    work_dir: Path | None = None
    show: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.calls, str | Mapping) or callable(self.calls):
            object.__setattr__(self, "calls", (self.calls,))
        for name in ("calls", "formats", "signals"):
            values = getattr(self, name)
            if values is None:
                continue
            if isinstance(values, str):
                raise ValueError(f"{name} is the text {values!r}: give a list of texts, such as [{values!r}]")
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "settings", each_of(self.settings))
        split_calls(self.drawn)
        if self.formats == ():
            raise ValueError(f"there is no format to choose among: leave formats out for {', '.join(DEFAULT_FORMATS)}")
        parse_schemes(self._formats)
        if self.calibration_mode not in MODES:
            raise ValueError(f"unknown calibration {self.calibration_mode!r}: choose one of {', '.join(MODES)}")
        kept = [name for name in self.signals if name in MEASURES]
        if len(kept) != 1 or set(self.signals) - set(SIGNALS):
            raise ValueError(
                f"the signals are {','.join(self.signals) or 'none'}: give one of {', '.join(MEASURES)}, or one of "
                f"them with {SSIM} after a comma"
            )
        asked = None if self.target is None else self.target.measure
        if asked is not None and kept[0] not in (asked, SQNR):
            raise ValueError(f"the signal is {kept[0]} and the target {self.target}: leave the signal out")
        if self.times_for is not None:
            _check_device(self.times_for, self.schemes)
        if not 0 <= self.hybrid <= 1:
            raise ValueError(f"hybrid is {self.hybrid}: it is a share of the noise, from 0 to 1")

    @property
    def measure(self) -> Measure:
        """What the plan keeps: where its target in dB is measured, or what the signals name."""
        asked = None if self.target is None else self.target.measure
        named: Measure = next(measure for measure in MEASURES if measure in self.signals)
        return named if asked is None else asked

    @property
    def ends(self) -> tuple[End, ...]:
        """The end of the trajectory that noise must be known at, if any."""
        return (ENDS[self.measure],) if self.measure in ENDS else ()

    @property
    def schemes(self) -> list[str]:
        """The names of all schemes that the formats stand for."""
        return [str(scheme) for scheme in parse_schemes(self._formats)]

    @property
    def _formats(self) -> tuple[str, ...]:
        return DEFAULT_FORMATS if self.formats is None else tuple(self.formats)

    def with_room(self, model: nn.Module) -> PlanRequest:
        """The request for a model, with 4-bit weights to choose too where formats were left out and bytes are few."""
        limit = None if self.target is None else self.target.bytes
        if self.formats is not None or limit is None or limit >= least_bytes(model, parse_schemes(self._formats)):
            return self
        return replace(self, formats=(*DEFAULT_FORMATS, *SMALLER_FORMATS))

    @property
    def drawn(self) -> tuple[Call, ...]:
        """Everything that is drawn."""
        assert isinstance(self.calls, tuple)
        return self.calls

    @property
    def drawn_at(self) -> tuple[SamplingSettings, ...]:
        """The settings that everything is drawn at."""
        assert isinstance(self.settings, tuple)
        return self.settings

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
        """Whether the layers' times must be known."""
        is_asked = self.time_layers or self.times_for is not None
        return is_asked or (self.target is not None and self.target.needs_times)


def _check_device(name: str, schemes: Sequence[str]) -> None:
    """Refuse a device that the table has not, or whose data sheet has no rate for one of the schemes."""
    device = device_of(name)
    lacking = [scheme for scheme in schemes if scheme_of(scheme).activations.dtype == FLOAT8]
    if lacking and device.fp8_tops is None:
        raise ValueError(
            f"{device.name} has no FP8, so nothing predicts {', '.join(lacking)}: leave them out of formats, or give a "
            "device from sm_89 on"
        )
