"""What belongs to the Triton backend alone: when it serves, what it imports, and every tile of its tables."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from ldmq_kernels.kernels import triton as triton_backend
from ldmq_kernels.numerics.packing import pack_int4
from ldmq_kernels.ops import SCHEMAS
from python_tests.kernels.operands import (
    Backend,
    exact_conv2d,
    exact_linear,
    folded,
    random_int4,
    random_int8,
    random_multiplier,
)

ONE = torch.ones(1)
GEOMETRY = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_it_has_every_op() -> None:
    assert set(triton_backend.OPS) == set(SCHEMAS)


def test_a_cpu_is_served_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_backend.serves(torch.device("cpu"))
    assert not triton_backend.serves(torch.device("meta"))


def test_asking_whether_it_serves_does_not_import_triton() -> None:
    program = (
        "import sys, torch, ldmq_kernels.ops; from ldmq_kernels.kernels import triton as backend;"
        "before = 'triton' in sys.modules; backend.serves(torch.device('cpu'));"
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_triton
@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w4a8", "conv2d_w8a8", "conv2d_w4a8"])
@pytest.mark.parametrize("size_class", [(16, 16), (16, 128), (64, 16), (64, 128), (128, 16), (128, 128)])
def test_every_tile_gives_exact_integers(op: str, size_class: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On two tiles by two, the second ones partly outside."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    getattr(triton_backend, op)
    launch = importlib.import_module("ldmq_kernels.kernels.triton.launch")
    tile = launch.INT8_TILES[size_class]
    monkeypatch.setattr(sys.modules[f"ldmq_kernels.kernels.triton.{op}"], "int8_tile", lambda *_: tile)
    columns, depth = tile.columns + 3, 70
    is_linear = op.startswith("linear")
    shape = (columns, depth) if is_linear else (columns, 3, 3, depth)
    x = random_int8(tile.rows + 5, depth) if is_linear else random_int8(1, depth, 3, tile.rows // 3 + 2)
    weight = random_int8(*shape)
    operands: tuple = (weight,)
    if "w4" in op:
        integers, multiplier = random_int4(*shape), random_multiplier(*shape)
        weight, operands = folded(integers, multiplier), (pack_int4(integers), multiplier)
    rest = (None, None) if is_linear else (None, None, None, *GEOMETRY)
    out = Backend("triton", device).call(op, x, ONE, *operands, torch.ones(columns), *rest, torch.float32)
    assert torch.equal(out.long(), exact_linear(x, weight) if is_linear else exact_conv2d(x, weight, GEOMETRY))
