"""How much of the end of the trajectory an analysis looks at: pictures, steps and probes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.sensitivity.adjoint import End, EndTrajectory, sampler_adjoint
from ldmq_kernels.sensitivity.redrawn import NoAdjoint

logger = logging.getLogger(__name__)

WHOLE_MODEL = 100_000_000  # parameters up to which all pictures and steps count
PROBES = 4  # at each end: errors of all layers come to it along few directions, so that chance favours all alike
LARGE_PICTURES, LARGE_PROBES = 2, 1  # of a larger model, whose layers are recorded at the analysed steps alone


def calibrated_ends(
    pipe: Any, calibration: Calibration, ends: Sequence[End], steps: Sequence[int], *, show: bool
) -> EndTrajectory | None:
    """The adjoint of the sampler for the calibration's pictures; None where it cannot be had, of which a warning tells.

    Args:
        steps: the analysed ones, which stand for all of a large model's.
    """
    whole = sum(parameter.numel() for parameter in denoiser(pipe).parameters()) <= WHOLE_MODEL
    count = len(calibration.calls)
    try:
        found = sampler_adjoint(
            pipe,
            calibration.trajectory,
            calibration.calls,
            calibration.settings,
            range(count if whole else min(count, LARGE_PICTURES)),
            ends=ends,
            probes=PROBES if whole else LARGE_PROBES,
            show=show,
        )
    except NoAdjoint as reason:
        logger.warning(
            "noise at the end of the trajectory is not predicted: of this %s with a %s, %s; layers are chosen by their "
            "noise at the model's output, averaged over steps",
            type(whole_pipeline(pipe)).__name__,
            type(getattr(whole_pipeline(pipe), "scheduler", None)).__name__,
            reason,
        )
        return None
    return found if whole else found.at_steps(steps)
