"""What belongs to the Triton backend alone: when it serves, what it imports, and every tile of its tables."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ldmq_kernels.kernels.gpu import Gpu
from ldmq_kernels.kernels.triton import backend as triton_backend
from ldmq_kernels.kernels.triton.tile_tables import FAMILIES, TILES, Tile, family
from ldmq_kernels.numerics.formats.int4 import pack_int4
from ldmq_kernels.ops import specs
from python_tests.kernels.operands import (
    Backend,
    exact_conv2d,
    exact_linear,
    folded,
    random_int4,
    random_int8,
    random_multiplier,
    random_scale,
)

ONE = torch.ones(1)
GEOMETRY = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)
if importlib.util.find_spec("triton") is not None:
    from ldmq_kernels.kernels.triton import convolution, gemm_launch, tile_choice
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_it_has_every_op() -> None:
    assert all(triton_backend.has(op) for op in specs())


def test_a_cpu_is_served_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_backend.serves(torch.device("cpu"))
    assert not triton_backend.serves(torch.device("meta"))


def test_asking_whether_it_serves_does_not_import_triton() -> None:
    program = (
        "import sys, torch, ldmq_kernels.ops; from ldmq_kernels.kernels.triton import backend;"
        "before = 'triton' in sys.modules; backend.serves(torch.device('cpu'));"
        "assert before or 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def tiles() -> list[tuple[str, Tile]]:
    """Every tile of an int8 GEMM, of all tables or of those that a GPU here has; with split-K of 2 as well."""
    families = set(FAMILIES)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        families = {family(10 * major + minor)}
    found = {
        (op, replace(tile, split_k=split_k, efficiency=1.0))
        for op, table in TILES.items()
        if "a8" in op and "geglu" not in op
        for name, tiles in table.items()
        if name in families
        for tile in tiles
        for split_k in ((1, 2) if tile.splittable else (1,))
    }
    return sorted(found, key=str)


def tile_id(value: object) -> str:
    if not isinstance(value, Tile):
        return str(value)
    words = f"{value.m}x{value.n}x{value.k}w{value.warps}s{value.stages}"
    return words + "p" * value.persistent + "t" * value.transposed + f"-{value.split_k}" * (value.split_k > 1)


@needs_triton
@pytest.mark.parametrize("op", specs())
def test_an_op_is_its_function_even_after_its_module_is_imported(op: str) -> None:
    importlib.import_module(f"ldmq_kernels.kernels.triton.{op}")
    assert callable(getattr(triton_backend, op))


@needs_triton
@pytest.mark.parametrize(("table", "tile"), tiles(), ids=tile_id)
def test_every_tile_gives_exact_integers(table: str, tile: Tile) -> None:
    """On more tiles than one by one, the last ones partly outside, and with a K that the blocks do not divide."""
    op, *kind = table.split()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    aligned = kind == [] or op.startswith("linear_w8a16")
    columns, depth = tile.n + 3, (3 if op.startswith("linear") else 1) * 64 + (32 if aligned else 5)
    is_linear = op.startswith("linear")
    shape = (columns, depth) if is_linear else (columns, 3, 3, depth)
    x = random_int8(tile.m + 5, depth) if is_linear else random_int8(1, depth, 5, tile.m // 5 + 2)
    weight = random_int8(*shape)
    operands: tuple = (weight,)
    if "w4" in op:
        integers, multiplier = random_int4(*shape), random_multiplier(*shape)
        weight, operands = folded(integers, multiplier), (pack_int4(integers), multiplier)
    exact = exact_linear(x, weight) if is_linear else exact_conv2d(x, weight, GEOMETRY)
    backend = Backend("triton", device)
    with tile_choice.forced(tile):
        if op == "linear_static_w8a8":
            out = backend.call(op, x.float(), ONE, ONE, *operands, torch.ones(columns), None, None)
        else:
            rest = (None, None) if is_linear else (None, None, None, *GEOMETRY)
            out = backend.call(op, x, ONE, *operands, torch.ones(columns), *rest, torch.float32)
    assert torch.equal(out.long(), exact)


@needs_triton
@pytest.mark.parametrize("tile", TILES["linear_geglu_w8a8"]["90"], ids=tile_id)
def test_every_tile_with_gates_takes_each_value_by_its_own(tile: Tile) -> None:
    """Gates of 10 to 200, which GELU hands on, by their scales; on more tiles than one by one, partly outside."""
    columns, depth = tile.n // 2 + 3, 96
    x, weight = random_int8(tile.m + 5, depth), random_int8(2 * columns, depth).sign()
    x[:, 0], weight[columns:] = 10, 0
    weight[columns:, 0] = 1
    scale = torch.cat([torch.ones(columns), 1.0 + torch.arange(columns) % 20])
    backend = Backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tile_choice.forced(tile):
        out = backend.call("linear_geglu_w8a8", x, ONE, weight, scale, None, None, torch.float32)
    assert torch.equal(out.long(), exact_linear(x, weight[:columns]) * 10 * scale[columns:].long())


@needs_triton
@pytest.mark.parametrize("columns", [320, 70])
def test_a_persistent_tile_computes_every_part_with_few_programs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_choice, "gpu_of", lambda _: Gpu("", 90, 3))
    x, weight = random_int8(260, 64), random_int8(columns, 64)
    with tile_choice.forced(Tile(64, 64, 64, 4, 3, persistent=True)):
        out = Backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu")).call(
            "linear_w8a8", x, ONE, weight, torch.ones(columns), None, None, torch.float32
        )
    assert torch.equal(out.long(), exact_linear(x, weight))


@needs_triton
@pytest.mark.parametrize("terms", [False, True])
def test_split_k_has_the_epilogue_once(terms: bool) -> None:
    """Per-sample scales, bias, time embedding and residual after the partial sums are reduced."""
    x, weight, scale = random_int8(3, 128, 4, 5), random_int8(40, 3, 3, 128), random_scale(40)
    x_scale = random_scale(3)
    bias, vector, residual = torch.randn(40), torch.randn(3, 40), torch.randn(3, 40, 4, 5)
    added = (bias, vector, residual) if terms else (None, None, None)
    arguments = x, x_scale, weight, scale, *added, *GEOMETRY, torch.float32
    backend = Backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    outs = []
    for split_k in (1, 3, 8):
        with tile_choice.forced(Tile(64, 64, 64, 4, 3, split_k=split_k)):
            outs.append(backend.call("conv2d_w8a8", *arguments))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@needs_triton
def test_without_tma_everything_is_gathered_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_choice, "gpu_of", lambda _: Gpu("", 80, 108))
    monkeypatch.setattr(gemm_launch, "TensorDescriptor", None)
    monkeypatch.setattr(convolution, "TensorDescriptor", None)
    backend = Backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    x, weight = random_int8(70, 96), random_int8(40, 96)
    out = backend.call("linear_w8a8", x, ONE, weight, torch.ones(40), None, None, torch.float32)
    assert torch.equal(out.long(), exact_linear(x, weight))
    x, weight = random_int8(2, 96, 6, 5), random_int8(40, 3, 3, 96)
    out = backend.call("conv2d_w8a8", x, ONE, weight, torch.ones(40), None, None, None, *GEOMETRY, torch.float32)
    assert torch.equal(out.long(), exact_conv2d(x, weight, GEOMETRY))
