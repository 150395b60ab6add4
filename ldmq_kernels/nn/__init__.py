"""Drop-in layers that compute in int8 and int4."""

from ldmq_kernels.nn.quant_conv2d import QuantConv2d
from ldmq_kernels.nn.quant_linear import QuantLinear
from ldmq_kernels.nn.quantized import QuantizedLayer, name_layers
from ldmq_kernels.nn.state_dicts import watch_loading

__all__ = ["QuantConv2d", "QuantLinear", "QuantizedLayer", "name_layers"]

watch_loading()
