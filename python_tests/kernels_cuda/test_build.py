"""The extension that nvcc builds: it imports without a GPU, spills nothing and refuses what it cannot take."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

TOKENS: dict[str, Any] = {
    "x": 4096, "dtype": "float16", "smoothing": 0, "q": 8192, "scale": 12288, "rows": 3, "channels": 320,
    "device": 0, "stream": 0,
}  # fmt: skip
SAMPLES = {name: value for name, value in TOKENS.items() if name != "rows"} | {
    "absmax": 16384,
    "samples": 2,
    "pixels": 16,
}
STATIC = {name: value for name, value in TOKENS.items() if name not in ("smoothing", "scale")} | {
    "reciprocal": 16384,
    "reciprocal_count": 320,
}
CALLS = {"quantize_static": STATIC, "quantize_per_token": TOKENS, "quantize_per_sample": SAMPLES}


@pytest.mark.parametrize(
    ("op", "change", "why"),
    [
        *((op, {"x": 0}, "x is null, for sizes") for op in CALLS),
        *((op, {"q": 0}, "q is null") for op in CALLS),
        *((op, {"channels": -1}, "channels is -1, must be 0 or more") for op in CALLS),
        *((op, {"channels": 2**24}, "channels is 16777216, must be at most") for op in ("quantize_per_token",)),
        *((op, {"dtype": "float64"}, "dtype is float64, must be float32") for op in CALLS),
        *((op, {"device": -1}, "device is -1") for op in CALLS),
        *((op, {"x": 4097}, "x is not aligned to 2 bytes") for op in CALLS),
        ("quantize_static", {"rows": 2**62}, "overflow"),
        ("quantize_static", {"reciprocal": 0}, "reciprocal is null"),
        ("quantize_static", {"reciprocal_count": 7}, "reciprocal has 7 elements, must have 1 or 320"),
        ("quantize_per_token", {"scale": 0}, "scale is null"),
        ("quantize_per_token", {"scale": 12290}, "scale is not aligned to 4 bytes"),
        ("quantize_per_token", {"smoothing": 12290}, "smoothing is not aligned to 4 bytes"),
        ("quantize_per_token", {"rows": -5}, "rows is -5"),
        ("quantize_per_sample", {"absmax": 0}, "absmax is null"),
        ("quantize_per_sample", {"samples": 2**40, "pixels": 2**40}, "overflow"),
    ],
)
def test_bad_arguments_are_refused_before_a_launch(
    built: ModuleType, op: str, change: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=f"ldmq cuda {op}: .*{why}"):
        getattr(built, op)(**(CALLS[op] | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses are not real")
@pytest.mark.parametrize("op", CALLS)
def test_without_a_gpu_the_error_names_op_shape_device_and_architectures(built: ModuleType, op: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{op} of float16 \(.*channels=320\) on cuda:0 failed: .*80;90"):
        getattr(built, op)(**CALLS[op])


def test_no_kernel_spills_registers(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "csrc/build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    command = [*backend.library_command(nvcc, ["80", "90"], tmp_path / "library.so"), "-Xptxas=-v"]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= 2 * 12, "each op is compiled for three dtypes and both architectures"
    assert set(spills) == {("0", "0")}
