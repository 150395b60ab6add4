"""Measures the kernels' tiles, and the backends against each other, on this GPU: `ldmq bench --tune`."""

from ldmq_kernels.tuning.fastest import TuningError
from ldmq_kernels.tuning.tune import tune

__all__ = ["TuningError", "tune"]
