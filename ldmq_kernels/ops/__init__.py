"""The ops of the package, `torch.ops.ldmq.*`: one node each for torch.compile, graphs and export.

Each op is one specification (`kernels.op_spec.OpSpec`): a typed function with its docstring, from which the schema
comes, a fake kernel, what makes two calls the same shape, how near backends must come to each other, and example
operands. What computes an op is chosen when it runs, by `kernels.dispatch`, among the backends' functions of its name.
"""

from ldmq_kernels.kernels.op_spec import spec_of, specs
from ldmq_kernels.ops.attention import attention
from ldmq_kernels.ops.conv2d import conv2d_fp8, conv2d_w4a8, conv2d_w8a8, conv2d_w8a16
from ldmq_kernels.ops.geglu import linear_geglu_fp8, linear_geglu_w8a8
from ldmq_kernels.ops.linear import (
    linear_fp8,
    linear_static_w8a8,
    linear_w4a8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
)
from ldmq_kernels.ops.norms import (
    geglu_quantize,
    gelu_quantize,
    group_norm_silu_quantize,
    layer_norm_quantize,
    silu_quantize,
)
from ldmq_kernels.ops.quantize import (
    quantize_per_sample,
    quantize_per_token,
    quantize_static,
    rotate_quantize_per_sample,
    rotate_quantize_per_token,
)

__all__ = [
    "attention",
    "conv2d_fp8",
    "conv2d_w4a8",
    "conv2d_w8a8",
    "conv2d_w8a16",
    "geglu_quantize",
    "gelu_quantize",
    "group_norm_silu_quantize",
    "layer_norm_quantize",
    "linear_fp8",
    "linear_geglu_fp8",
    "linear_geglu_w8a8",
    "linear_static_w8a8",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "quantize_per_sample",
    "quantize_per_token",
    "quantize_static",
    "rotate_quantize_per_sample",
    "rotate_quantize_per_token",
    "silu_quantize",
    "spec_of",
    "specs",
]
