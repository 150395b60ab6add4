"""Runs the full-precision pipeline and writes down what its UNet sees."""

from ldmq_kernels.calibration.calibrate import Calibration, calibrate
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import Trajectory, record_trajectory

__all__ = ["Calibration", "SamplingSettings", "Trajectory", "calibrate", "record_trajectory"]
