"""The formats that a layer can have, one object each, in one registry; schemes, plans and reports are made from it.

A new format is a file here with a `WeightFormat` and a `Format`, its line below, and the op that it names.
"""

from ldmq_kernels.numerics.formats.base import (
    FLOAT_BYTES,
    ActivationFormat,
    Buffer,
    Format,
    WeightFormat,
    product_of,
)
from ldmq_kernels.numerics.formats.float8 import FP8
from ldmq_kernels.numerics.formats.float16 import FP16
from ldmq_kernels.numerics.formats.int4_grouped import W4A16
from ldmq_kernels.numerics.formats.int4_two_level import W4A8
from ldmq_kernels.numerics.formats.int8 import W8A8, W8A16
from ldmq_kernels.numerics.formats.registry import (
    FORMATS,
    FORMER_NAMES,
    SCHEMES,
    Scheme,
    no_groups,
    parse_schemes,
    register,
    scheme_of,
    schemes_of,
    unregister,
)

for _format in (W8A8, W4A8, FP8, W8A16, W4A16, FP16):  # in the order of lists and tables
    register(_format)
FLOAT = SCHEMES["fp16"]

__all__ = [
    "FLOAT",
    "FLOAT_BYTES",
    "FORMATS",
    "FORMER_NAMES",
    "SCHEMES",
    "ActivationFormat",
    "Buffer",
    "Format",
    "Scheme",
    "WeightFormat",
    "no_groups",
    "parse_schemes",
    "product_of",
    "register",
    "scheme_of",
    "schemes_of",
    "unregister",
]
