"""The Triton kernels compile for GPUs that need not be there, into the machine code that they are meant to be."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SMALLEST_LIMIT = 99 * 1024  # sm_86, sm_89 and sm_120 take the same tiles
INT8 = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA IMMA"}
FLOAT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA HMMA"}
QUANTIZERS = ("quantize_static", "quantize_per_token", "quantize_per_sample")
SMALL = "2 rows"  # fewer than the 64 that wgmma needs

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came out of every kernel for every architecture; the table is printed."""
    path = tmp_path_factory.mktemp("triton") / "report.json"
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, str(program), str(path), *map(str, CAPABILITIES)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    print(finished.stdout)
    return json.loads(path.read_text())


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['kernel']} {row['case']} sm_{row['capability']} {row['instructions']}" for row in rows]


def test_every_op_is_compiled(report: list[dict[str, Any]]) -> None:
    from ldmq_kernels.kernels.triton import OPS

    assert {(row["op"], row["capability"]) for row in report} == {(op, sm) for op in OPS for sm in CAPABILITIES}


def test_no_register_is_spilled(report: list[dict[str, Any]]) -> None:
    assert names([row for row in report if row["spills"]]) == []


def test_shared_memory_fits_the_smallest_gpu_of_the_family(report: list[dict[str, Any]]) -> None:
    assert names([row for row in report if row["shared"] > min(SMALLEST_LIMIT, SHARED_LIMIT[row["capability"]])]) == []


def test_integer_products_use_the_integer_tensor_cores(report: list[dict[str, Any]]) -> None:
    rows = [row for row in report if row["op"].endswith("a8") and row["case"] != SMALL]
    wrong = [row for row in rows if not set(row["instructions"]) & set(INT8[row["capability"]].split())]
    assert len(rows) >= 8 * len(CAPABILITIES)
    assert names(wrong) == []
    assert all(row["instructions"] == ["IMMA"] for row in report if row["case"] == SMALL)


def test_16_bit_products_use_the_tensor_cores(report: list[dict[str, Any]]) -> None:
    rows = [row for row in report if row["op"].endswith("a16") and row["case"] == "main"]
    wrong = [row for row in rows if not set(row["instructions"]) & set(FLOAT[row["capability"]].split())]
    assert len(rows) == 3 * len(CAPABILITIES)
    assert names(wrong) == []


def test_exact_float32_products_and_quantizers_use_none(report: list[dict[str, Any]]) -> None:
    rows = [row for row in report if row["op"] in QUANTIZERS or row["case"] == "float32"]
    assert names([row for row in rows if row["instructions"]]) == []
