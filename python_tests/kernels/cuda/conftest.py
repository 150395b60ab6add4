"""The binding over kernels that run on a CPU (emulator/), and the real extension where nvcc is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ldmq_kernels.kernels.cuda import extension, tiles
from python_tests.kernels.cuda.emulation import emulate, emulated_binding, load
from python_tests.kernels.kept_builds import MODULE, ROOT, build_key, kept_build


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


@pytest.fixture
def tile(request: pytest.FixtureRequest, device: torch.device) -> Iterator[tiles.Tile]:
    """A tile that every GEMM of the test takes."""
    op, name = request.param
    found = [tile for tile in tiles.candidates(op, 64, 64, 64, device) if tile.name == name]
    if not found:
        pytest.skip(f"this GPU has no tile {name}")
    with tiles.forced(found[0]):
        yield found[0]


@pytest.fixture(params=["late", "eager"])
def timing(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """In the emulator: asynchronous work as late, and as early, as the rules allow."""
    if device.type == "cuda":
        if request.param == "eager":
            pytest.skip("a GPU has its own time")
        yield
        return
    set_eager = extension.binding().set_eager
    set_eager(request.param == "eager")
    yield
    set_eager(False)


def _install(folder: Path) -> None:
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = os.environ | {"LDMQ_CUDA_ARCHS": "80;90"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *places], cwd=ROOT, env=environment, check=True)


def _install_key() -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return build_key(version, [ROOT / "csrc", ROOT / "setup.py", Path(__file__)])


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """What an install for two architectures builds: library and module in lib, objects and kernels.txt in temp.

    All processes of these sources share one build, in build/cuda.
    """
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    with kept_build("cuda", _install_key, _install) as folder:
        return folder


@pytest.fixture(scope="session")
def cuobjdump() -> str:
    """The disassembler of the toolkit, or the one inside triton."""
    spec = importlib.util.find_spec("triton")
    inside = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec and spec.origin else []
    found = [tool for place in [None, *inside] if (tool := shutil.which("cuobjdump", path=place))]
    if not found:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")
    return found[0]


@pytest.fixture(scope="session")
def machine_code(build_folder: Path, cuobjdump: str) -> str:
    """The machine code of that build."""

    def disassemble(folder: Path) -> None:
        library = build_folder / "lib/ldmq_kernels/kernels/cuda/libldmq_kernels.so"
        text = subprocess.run([cuobjdump, "-sass", str(library)], capture_output=True, text=True, check=True).stdout
        (folder / "kernels.sass").write_text(text)

    with kept_build("machine_code", lambda: build_folder.name, disassemble) as folder:
        return (folder / "kernels.sass").read_text()


@pytest.fixture(scope="session")
def built(build_folder: Path) -> ModuleType:
    """The real extension of that build."""
    return load(build_folder / "lib/ldmq_kernels/kernels/cuda" / MODULE)
