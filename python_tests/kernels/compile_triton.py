"""Compiles the Triton kernels for GPUs that need not be there, and reports what came out.

A program of its own, since the interpreter that the other tests use must be off when triton is imported.
Every op is called on tensors without memory at shapes from real UNets; each launch that it makes is
compiled instead of run, with the very arguments, tile and options that it would have on a GPU.

Usage: python compile_triton.py REPORT.json CAPABILITY...
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ldmq_kernels.kernels import triton as triton_backend

F16, F32, I8, U8 = torch.float16, torch.float32, torch.int8, torch.uint8
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", F32: "fp32", I8: "i8", U8: "u8"}
MATRIX_INSTRUCTION = re.compile(r"\b(IGMMA|HGMMA|UTCIMMA|UTCHMMA|UTCQMMA|IMMA|HMMA)\b")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_w8a8(rows: int, depth: int, columns: int) -> tuple:
    """Per-token scales, bias and residual."""
    floats = empty(F16, columns), empty(F16, rows, columns)
    return empty(I8, rows, depth), empty(F32, rows), empty(I8, columns, depth), empty(F32, columns), *floats, F16


def linear_w4a8(rows: int, depth: int, columns: int) -> tuple:
    """A static scale and bias."""
    weight = empty(U8, columns, depth // 2), empty(U8, columns, -(-depth // 64)), empty(F32, columns)
    return empty(I8, rows, depth), empty(F32, 1), *weight, empty(F16, columns), None, F16


def linear_w8a16(rows: int, depth: int, columns: int, dtype: torch.dtype = F16) -> tuple:
    """With bias."""
    return empty(dtype, rows, depth), empty(I8, columns, depth), empty(F32, columns), empty(dtype, columns)


def linear_w4a16(rows: int, depth: int, columns: int, dtype: torch.dtype = F16) -> tuple:
    """With bias."""
    weight = empty(U8, columns, depth // 2), empty(F32, columns, -(-depth // 64))
    return empty(dtype, rows, depth), *weight, empty(dtype, columns)


def geometry(stride: int = 1) -> tuple:
    """A 3x3 kernel's, with padding 1."""
    return (3, 3), (stride, stride), (1, 1), (1, 1), 1


def conv2d_w8a8(channels: int, size: int, out_channels: int, stride: int = 1) -> tuple:
    """A static scale, bias, time embedding and residual."""
    out_size = size // stride
    weight = empty(I8, out_channels, 3, 3, channels), empty(F32, out_channels)
    floats = empty(F16, out_channels), empty(F16, 2, out_channels), empty(F16, 2, out_channels, out_size, out_size)
    return empty(I8, 2, channels, size, size), empty(F32, 1), *weight, *floats, *geometry(stride), F16


def conv2d_w4a8(channels: int, size: int, out_channels: int) -> tuple:
    """Per-sample scales and bias."""
    taps = out_channels, 3, 3
    weight = empty(U8, *taps, channels // 2), empty(U8, *taps, -(-channels // 64)), empty(F32, out_channels)
    floats = empty(F16, out_channels), None, None
    return empty(I8, 2, channels, size, size), empty(F32, 2), *weight, *floats, *geometry(), F16


def conv2d_w8a16(channels: int, size: int, out_channels: int, dtype: torch.dtype = F16) -> tuple:
    """With bias."""
    weight = empty(I8, out_channels, 3, 3, channels), empty(F32, out_channels)
    return empty(dtype, 2, channels, size, size), *weight, empty(dtype, out_channels), *geometry()


CALLS: list[tuple[str, str, tuple]] = [
    ("linear_w8a8", "main", linear_w8a8(8192, 640, 5120)),
    ("linear_w8a8", "64 rows", linear_w8a8(64, 1280, 1280)),
    ("linear_w8a8", "2 rows", linear_w8a8(2, 320, 1280)),
    ("linear_w4a8", "main", linear_w4a8(8192, 640, 5120)),
    ("linear_w8a16", "main", linear_w8a16(8192, 640, 5120)),
    ("linear_w8a16", "float32", linear_w8a16(8192, 640, 5120, F32)),
    ("linear_w4a16", "main", linear_w4a16(8192, 640, 5120, torch.bfloat16)),
    ("conv2d_w8a8", "main", conv2d_w8a8(320, 128, 320)),
    ("conv2d_w8a8", "conv_in", conv2d_w8a8(4, 64, 320)),
    ("conv2d_w8a8", "conv_out", conv2d_w8a8(320, 128, 4)),
    ("conv2d_w8a8", "stride 2", conv2d_w8a8(640, 64, 640, stride=2)),
    ("conv2d_w4a8", "main", conv2d_w4a8(320, 128, 320)),
    ("conv2d_w8a16", "main", conv2d_w8a16(320, 128, 320)),
    ("conv2d_w8a16", "float32", conv2d_w8a16(320, 128, 320, F32)),
    ("linear_w4a16", "float32", linear_w4a16(8192, 640, 5120, F32)),
    ("quantize_static", "main", (empty(F16, 2, 320, 64, 64), empty(F32, 320), 1)),
    ("quantize_per_token", "main", (empty(F16, 8192, 10240), empty(F32, 10240))),
    ("quantize_per_sample", "main", (empty(F16, 2, 320, 64, 64), empty(F32, 320))),
]


def source(kernel: Any, arguments: tuple, keywords: dict[str, Any]) -> ASTSource:
    """What triton.compile takes, specialized as a launch would: ones and None constant, multiples of 16 marked."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif value is None or kernel.params[index].is_constexpr or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if signature[name] != "constexpr" and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def inspect(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and matrix instructions of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        code = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return {
        "registers": int(registers),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": compiled.metadata.shared,
        "instructions": sorted(set(MATRIX_INSTRUCTION.findall(code))),
    }


def compile_call(op: str, case: str, arguments: tuple, capabilities: list[int]) -> list[dict[str, Any]]:
    """Compile every launch that one call of an op makes."""
    rows: list[dict[str, Any]] = []

    def compile_launch(kernel: Any, *values: Any, grid: tuple, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        code = source(kernel, values, keywords)
        for capability in capabilities:
            compiled = triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)
            identity = {"op": op, "case": case, "kernel": kernel.__name__, "capability": capability}
            rows.append(identity | inspect(compiled))

    with mock.patch.object(triton.JITFunction, "run", compile_launch):
        getattr(triton_backend, op)(*arguments)
    return rows


def main() -> None:
    """Compile all calls, print the table and write it."""
    report, capabilities = Path(sys.argv[1]), [int(text) for text in sys.argv[2:]]
    rows = [row for call in CALLS for row in compile_call(*call, capabilities)]
    for row in rows:
        print(
            f"{row['kernel']:22} {row['case']:9} sm_{row['capability']:<4} {row['registers']:4} registers "
            f"{row['shared']:7} B shared {row['spills']:3} spills  {' '.join(row['instructions'])}"
        )
    report.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
