"""The binding over kernels that run on a CPU (emulator/), and the real extension where nvcc is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "emulator"
MODULE = "_binding" + sysconfig.get_config_var("EXT_SUFFIX")


def load(path: Path) -> ModuleType:
    """The module of this file, under the name of its folder: pybind11 keeps one module for each name."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._binding", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The binding, linked with the kernels compiled for the CPU: addresses are those of CPU tensors."""
    python_headers = Path(sysconfig.get_path("include"))
    if sys.platform != "linux" or not shutil.which("g++") or not (python_headers / "Python.h").exists():
        pytest.skip("needs Linux, g++ and Python's headers")
    folder = tmp_path_factory.mktemp("emulated")  # the library has its own name: a process loads one of each name
    compile_shared = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off"]
    kernels = [
        "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
        '-DLDMQ_ARCHITECTURES="80"',
        f"-I{EMULATOR}",
        "-x",
        "c++",
        str(ROOT / "csrc/quantize.cu"),
    ]
    subprocess.run([*compile_shared, *kernels, "-o", str(folder / "libldmq_emulated.so")], check=True)
    includes = [f"-I{pybind11.get_include()}", f"-I{python_headers}"]
    linked = [f"-L{folder}", "-lldmq_emulated", "-Wl,-rpath,$ORIGIN", "-o", str(folder / MODULE)]
    subprocess.run([*compile_shared, *includes, str(ROOT / "csrc/binding.cpp"), *linked], check=True)
    return load(folder / MODULE)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The real extension, built for two architectures as an install builds it."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("built")
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = os.environ | {"LDMQ_CUDA_ARCHS": "80;90"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *places], cwd=ROOT, env=environment, check=True)
    return load(folder / "lib/ldmq_kernels/kernels/cuda" / MODULE)
