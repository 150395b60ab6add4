"""Drop-in layers that compute in int8 and int4."""

from ldmq_kernels.nn.folded import QuantConv1d, QuantConv3d
from ldmq_kernels.nn.quant_conv2d import QuantConv2d
from ldmq_kernels.nn.quant_linear import QuantLinear
from ldmq_kernels.nn.quantized import QuantizedLayer, name_layers
from ldmq_kernels.nn.state_dicts import watch_loading
from ldmq_kernels.nn.substitutes import product_of_layer, quantized_class

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "QuantizedLayer",
    "name_layers",
    "product_of_layer",
    "quantized_class",
]

watch_loading()
