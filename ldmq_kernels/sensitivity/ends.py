"""How much of the end of the trajectory an analysis looks at: pictures, calls and probes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.settings import sample_number
from ldmq_kernels.sensitivity.adjoint import End, EndTrajectory, sampler_adjoint
from ldmq_kernels.sensitivity.redrawn import NoAdjoint

logger = logging.getLogger(__name__)

WHOLE_MODEL = 100_000_000  # parameters up to which all pictures and calls count
PROBES = 8  # at each end; with fewer, sizes scatter more by the chance of which probes are drawn
LARGE_PICTURES, LARGE_PROBES = 2, 1  # of a larger model
LARGE_CALLS = 8  # of each run, at which layers are recorded: in the median sizes come out smaller than by all


def is_whole(model: nn.Module) -> bool:
    """Whether a model is so small that all pictures and calls of a calibration count at the end."""
    return sum(parameter.numel() for parameter in model.parameters()) <= WHOLE_MODEL


def calibrated_ends(pipe: Any, calibration: Calibration, ends: Sequence[End], *, show: bool) -> EndTrajectory | None:
    """The adjoint of the sampler for the calibration's pictures, or the first of each setting for a large model.

    Returns:
        None where it cannot be had, of which a warning tells.
    """
    whole = is_whole(denoiser(pipe))
    calls, settings = len(calibration.calls), len(calibration.settings)
    count = calls if whole else min(calls, LARGE_PICTURES)
    pictures = [sample_number(call, setting, settings) for setting in range(settings) for call in range(count)]
    try:
        found = sampler_adjoint(
            pipe,
            calibration.trajectory,
            calibration.calls,
            calibration.settings,
            pictures,
            ends=ends,
            probes=PROBES if whole else LARGE_PROBES,
            show=show,
        )
    except NoAdjoint as reason:
        own = type(getattr(whole_pipeline(pipe), "scheduler", None)).__name__
        logger.warning(
            "noise at the end of the trajectory is not predicted: of this %s with a %s, %s; layers are chosen by their "
            "noise at the model's output, averaged over steps",
            type(whole_pipeline(pipe)).__name__,
            " or ".join(dict.fromkeys(one.scheduler or own for one in calibration.settings)),
            reason,
        )
        return None
    return found if whole else found.thinned(LARGE_CALLS)
