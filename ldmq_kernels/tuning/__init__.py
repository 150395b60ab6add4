"""Measures the tiles of the Triton kernels on this GPU: `ldmq bench --tune`."""

from ldmq_kernels.tuning.tune import TuningError, tune

__all__ = ["TuningError", "tune"]
