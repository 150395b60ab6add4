"""The binding over kernels that run on a CPU (emulator/), and the real extension where nvcc is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ldmq_kernels.kernels.cuda import extension
from python_tests.kernels.cuda.emulation import MODULE, ROOT, emulate, emulated_binding, load


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The binding, linked with the kernels compiled for the CPU: addresses are those of CPU tensors."""
    return emulated_binding()


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run: a CPU stands in for a CUDA device in the emulator."""
    if request.param == "emulator":
        emulate(monkeypatch)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    binding = extension.load() or request.getfixturevalue("built")
    monkeypatch.setattr(extension, "binding", lambda: binding)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an install for two architectures builds: library and module in lib, objects and kernels.txt in temp."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("built")
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = os.environ | {"LDMQ_CUDA_ARCHS": "80;90"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *places], cwd=ROOT, env=environment, check=True)
    return folder


@pytest.fixture(scope="session")
def built(build_folder: Path) -> ModuleType:
    """The real extension of that build."""
    return load(build_folder / "lib/ldmq_kernels/kernels/cuda" / MODULE)
