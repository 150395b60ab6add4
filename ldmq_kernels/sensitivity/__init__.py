"""Where quantization hurts: SQNR by block, module and sampling step."""

from ldmq_kernels.sensitivity.analysis import Analysis, analyze
from ldmq_kernels.sensitivity.output_noise import StepNoise

__all__ = ["Analysis", "StepNoise", "analyze"]
