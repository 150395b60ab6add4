"""Compiles the Triton kernels for GPUs that need not be there, and reports what came out.

A program of its own, since the interpreter that the other tests use must be off when triton is imported.
Every op is called on tensors without memory at shapes from real UNets; each launch that it makes is
compiled instead of run, with the very arguments, tile and options that it would have on a GPU.

From capability 9.0 on they are compiled for programmatic dependent launch; with --tiles, where each tile of the tables
is compiled, they are not.

Usage: python compile_triton.py [--tiles] REPORT.json CAPABILITY...
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ldmq_kernels.kernels.dependent_launch import FROM, dependent_launches
from ldmq_kernels.kernels.gpu import FLOAT8_FROM, Gpu
from ldmq_kernels.kernels.triton import backend as triton_backend
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.kernels.triton.tile_tables import TILES, Tile, family
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from python_tests.kernels.before_wait import LET_THE_NEXT_BEGIN, WAIT, touched_before_wait, with_addresses
from python_tests.kernels.machine_code import MATRIX, divides, has_unguarded_write, main_loop, of_every_step, waits
from python_tests.kernels.triton import compile_conv2d, compile_linear, compile_producers

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
}
COUNTED = (*MATRIX, "UTMALDG", "LDS", "STS", "LDSM", "F2FP", "STL", "LDL")
INSTRUCTION = re.compile(rf"\b({'|'.join(COUNTED)})\b")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl")
# stand-ins for what `gpu_of` would find
GPUS = {80: Gpu("A100", 80, 108), 86: Gpu("A40", 86, 84), 89: Gpu("L40", 89, 142), 90: Gpu("H100", 90, 132)}
GPUS |= {100: Gpu("B200", 100, 148), 120: Gpu("RTX PRO 6000", 120, 188)}
CALLS = [*compile_linear.CALLS, *compile_conv2d.CALLS, *compile_producers.CALLS]


def source(kernel: Any, arguments: tuple, keywords: dict[str, Any]) -> ASTSource:
    """What triton.compile takes, specialized as a launch would: ones and None constant, multiples of 16 marked."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif value is None or kernel.params[index].is_constexpr or value == 1:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, TensorDescriptor) or signature[name] in ("constexpr", "fp32"):
            continue
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[index,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def inspect(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and matrix instructions of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        code = subprocess.check_output(
            [TOOLS / "nvdisasm", "-c", "--no-dataflow", file.name], text=True, stderr=subprocess.DEVNULL
        )
    (registers,) = re.findall(r"REG:(\d+)", usage)
    counts, loop = Counter(INSTRUCTION.findall(code)), main_loop(code)
    return {
        "registers": int(registers),
        "spills": counts["STL"] + counts["LDL"],
        "shared": compiled.metadata.shared,
        "instructions": sorted(set(MATRIX) & set(counts)),
        "counts": dict(counts),
        "loop": dict(Counter(INSTRUCTION.findall("\n".join(loop)))),
        "waits": waits(loop),
        "unguarded": has_unguarded_write(loop),
        "divides": divides(of_every_step(loop)),
        "early": [opcode for opcode in (WAIT, LET_THE_NEXT_BEGIN) if opcode in code],
        "touched": sorted(touched_before_wait(with_addresses(code))),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128\b", code)),
    }


def compile_call(op: str, case: str, arguments: tuple, tile: Tile | None, capability: int) -> list[dict[str, Any]]:
    """Compile every launch that one call of an op makes, with the tile that it would choose or with a given one."""
    rows: list[dict[str, Any]] = []

    def compile_launch(kernel: Any, *values: Any, grid: tuple, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        code = source(kernel, values, keywords)
        compiled = triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)
        blocks = "x".join(str(keywords[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in keywords)
        blocks += "+32" * bool(keywords.get("EXTRA_N")) + " T" * bool(keywords.get("TRANSPOSED"))
        identity = {"op": op, "case": case, "kernel": kernel.__name__, "capability": capability, "tile": blocks}
        identity |= {"warps": options.get("num_warps", 4), "ctas": 1 if tile is None else tile.ctas}
        identity["persistent"] = tile is not None and tile.persistent
        rows.append(identity | inspect(compiled))

    given = contextlib.nullcontext() if tile is None else tile_choice.forced(tile)
    with given, mock.patch.object(triton.JITFunction, "run", compile_launch):
        getattr(triton_backend, op)(*arguments)
    return rows


def is_float8(arguments: tuple) -> bool:
    """Whether a call takes or makes FP8."""
    return any(a == FLOAT8 or (isinstance(a, Tensor) and a.dtype == FLOAT8) for a in arguments)


def tile_calls(capability: int) -> list[tuple[str, str, tuple, Tile | None]]:
    """A call for every tile of every table of an architecture; those that can have split-K also with 2."""
    calls: list[tuple[str, str, tuple, Tile | None]] = []
    for table, families in TILES.items():
        if table.startswith("conv2d") and "gather" not in table and capability < 90:
            continue
        if "fp8" in table:  # the tiles of int8, of which `CALLS` has some
            continue
        for tile in families[family(capability)]:
            if table.startswith("linear"):
                given = compile_linear.of_tile(table, tile.m, tile.n)
            else:
                given = compile_conv2d.of_tile(table, tile.n, capability >= 90)
            calls.append((table.split()[0], table, given, replace(tile, split_k=2) if tile.splittable else tile))
            if tile.splittable:
                calls.append((table.split()[0], table, given, tile))
    return calls


def main() -> None:
    """Compile all calls or, with --tiles, every tile of the tables; print the report and write it."""
    arguments = [text for text in sys.argv[1:] if text != "--tiles"]
    report, capabilities = Path(arguments[0]), [int(text) for text in arguments[1:]]
    rows = []
    for capability in capabilities:
        gpu = mock.patch.object(tile_choice, "gpu_of", lambda _, gpu=GPUS[capability]: gpu)
        with gpu, dependent_launches(capability >= FROM and "--tiles" not in sys.argv):
            for op, case, given, tile in tile_calls(capability) if "--tiles" in sys.argv else CALLS:
                if capability >= FLOAT8_FROM or not is_float8(given):
                    rows += compile_call(op, case, given, tile, capability)
    for row in rows:
        loop = " ".join(f"{name} {count}" for name, count in sorted(row["loop"].items()))
        print(
            f"{row['kernel']:22} {row['case']:12} {row['tile']:14} sm_{row['capability']:<4} "
            f"{row['registers']:4} registers "
            f"{row['shared']:7} B shared {row['spills']:3} spills  {' '.join(row['instructions']):12} loop: {loop} "
            f"waits: {' '.join(map(str, row['waits'])) or '-'}"
        )
    report.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
