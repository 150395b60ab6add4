"""Puts quantized layers into a model as a plan says, and summarizes what that saves."""

from ldmq_kernels.conversion.baking import bake
from ldmq_kernels.conversion.convert import ConversionError, convert
from ldmq_kernels.conversion.pipeline import quantize
from ldmq_kernels.conversion.summary import Summary, summarize

__all__ = ["ConversionError", "Summary", "bake", "convert", "quantize", "summarize"]
