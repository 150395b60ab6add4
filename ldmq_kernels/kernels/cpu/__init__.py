"""oneDNN's products on a CPU; the rest is torch, and one pass over memory where a C compiler is there (`compiled`).

Its int8 products, reached through `torch.ops.onednn`, take int8 activations as uint8 with zero point 128 and give
float32 or bfloat16, with scales and bias applied. With AMX and a C compiler `products` multiplies int8 itself, several
times as fast. Without VNNI oneDNN saturates silently: where a self-check finds that, the same integers are multiplied
in 16 bits (`products`, with AVX2 and a C compiler) or in float32 (`widened`), exactly.
FP8, which no CPU multiplies, is widened: e4m3 is exact in float32.
"""

from __future__ import annotations

import os

import torch

from ldmq_kernels.files import shortened
from ldmq_kernels.kernels.backend import Backend, Packer, register
from ldmq_kernels.kernels.cpu import compiled, float_products, packing, products, widened
from ldmq_kernels.kernels.cpu.self_check import is_exact

# oneDNN keeps what it prepared for each shape, and reads the limit at its first call: a model takes a few hundred, a
# server that sees many sizes would keep 1,024
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")

_LACKS = "this processor lacks AVX-512 VNNI, AVX-VNNI and AMX, so that oneDNN's int8 products are not exact: the same "
PAIRS_REMARK = _LACKS + "integers are multiplied in 16 bits, exactly, and weights take twice the memory of int8"
WIDENED_REMARK = _LACKS + (
    "integers are multiplied in float32, exactly; large layers take about the time of float ones, small ones more, and "
    "weights the memory of float32"
)
FLOAT8_REMARK = "FP8 is multiplied in float32: such layers have the time and the memory of float ones"


class _Cpu(Backend):
    name = "cpu"
    device_type = "cpu"
    rank = 10
    float_products = float_products  # what is no op: of the models that are planned

    def serves(self, device: torch.device) -> bool:
        """Whether `device` is a CPU, and oneDNN is in this torch."""
        return device.type == "cpu" and (is_exact() or widened.is_built_in())

    def why_not(self, device: torch.device) -> str:
        """What this torch lacks."""
        return "this torch lacks oneDNN: install an x86-64 build of torch 2.10 or newer"

    def remark(self, device: torch.device) -> str:
        """What is slower here than it need be, and what no CPU has: VNNI, a C compiler, FP8."""
        remarks = [] if is_exact() else [PAIRS_REMARK if products.serves() else WIDENED_REMARK]
        library, why = compiled.load()
        if library is None:
            remarks.append(
                "torch quantizes and scales in several passes, since what does so in one cannot be compiled: "
                f"{shortened(why)}; install a C compiler"
            )
        return "; ".join([*remarks, FLOAT8_REMARK])

    def has(self, op: str) -> bool:
        """Whether it has an op that is faster than its parts: GEGLU in an epilogue is where tiles are multiplied."""
        return super().has(op) and (op != "linear_geglu_w8a8" or products.form() == products.TILES)

    def packer(self, op: str) -> Packer | None:
        """oneDNN's blocked layouts of the int8 products' weights, or float32 where int8 is not exact."""
        return packing.packers().get(op)


backend = register(_Cpu())
