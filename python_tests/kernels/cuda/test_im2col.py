"""The tensor maps of convolutions are those that CUTLASS's host code makes, which shares no line with csrc/.

The emulator is written from the same reading of the documentation as the kernels, and is no witness of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from python_tests.kernels.cuda.emulation import KERNELS
from python_tests.kernels.cuda.im2col import generate

FIELDS = {"rank, box and swizzle": slice(0, 4), "size": slice(4, 8), "stride": slice(8, 11), "step": slice(15, 19)}
LOWER, UPPER = (11, 13), (12, 14)  # width, height


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that prints what csrc/ makes of a geometry."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("im2col") / "ours"
    options = [option for option in KERNELS if not option.startswith("-fsanitize")]
    source = generate.HERE / "ours.cpp"
    subprocess.run(["g++", "-std=c++20", "-O0", "-Wno-psabi", *options, str(source), "-o", str(program)], check=True)
    return program


def base_pixels(size: int, lower: int, upper: int, step: int) -> int:
    """Base pixels along an axis between the corners; the upper one may lie anywhere before the next step."""
    return (size - 1 + upper - lower) // step + 1


@pytest.mark.slow
def test_tensor_maps_are_those_of_cutlass(ours: Path) -> None:
    pairs = json.loads(generate.FILE.read_text())
    assert [tuple(given) for given, _ in pairs] == generate.geometries()
    assert len(pairs) == 200
    for (given, wanted), found in zip(pairs, generate.lines(ours, [given for given, _ in pairs]), strict=True):
        for name, field in FIELDS.items():
            assert found[field] == wanted[field], f"{name} of {given}"
        for axis in range(2):
            size, step = wanted[5 + axis], wanted[16 + axis]
            assert found[LOWER[axis]] == wanted[LOWER[axis]], given
            counts = [base_pixels(size, each[LOWER[axis]], each[UPPER[axis]], step) for each in (found, wanted)]
            assert counts[0] == counts[1], given
