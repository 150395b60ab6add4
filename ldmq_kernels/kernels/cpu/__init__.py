"""oneDNN's int8 on a CPU, reached through `torch.ops.onednn`; the rest is plain torch, block by block.

oneDNN takes int8 activations as uint8 with zero point 128 and gives float32 or bfloat16, with scales
and bias applied. Without VNNI it saturates silently, so a self-check decides whether it may be used.
"""

from __future__ import annotations

import os

import torch

from ldmq_kernels.kernels.backend import Backend, Packer, register
from ldmq_kernels.kernels.cpu import onednn, packing
from ldmq_kernels.kernels.cpu.self_check import is_exact

# oneDNN keeps what it prepared for each shape, and reads the limit at its first call: a model takes a few hundred, a
# server that sees many sizes would keep 1,024
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


class _Cpu(Backend):
    name = "cpu"
    device_type = "cpu"
    rank = 10

    def serves(self, device: torch.device) -> bool:
        """Whether `device` is a CPU whose oneDNN int8 products are exact."""
        return device.type == "cpu" and is_exact()

    def why_not(self, device: torch.device) -> str:
        """What this torch or this processor lacks."""
        if not onednn.is_built_in():
            return "this torch lacks oneDNN's int8 ops: install an x86-64 build of torch 2.10 or newer"
        return "oneDNN's int8 products are not exact on this processor: it needs AVX-512 VNNI, AVX-VNNI or AMX"

    def packer(self, op: str) -> Packer | None:
        """oneDNN's blocked layouts of the int8 products' weights."""
        return packing.PACKERS.get(op)


backend = register(_Cpu())
