"""The kernels of csrc/ compiled for a CPU (emulator/), and the binding over them."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ldmq_kernels.kernels.cuda import extension, tiles
from python_tests.kernels import kept_builds
from python_tests.kernels.kept_builds import MODULE, ROOT, build_key, kept_build

EMULATOR = Path(__file__).resolve().parent / "emulator"
LIBRARY = "libldmq_emulated.so"  # a name of its own: a process loads one library of each name
COMPILE = ("g++", "-std=c++20", "-O1", "-fPIC", "-Wno-psabi")
SETTINGS = (
    "set_eager",
    "set_slow_warp",
    "set_seed",
    "set_fault",
    "turn",
    "set_device",
    "set_encode_error",
    "get_device",
    "launched_on",
    "told_shared",
    "watch",
    "forget_watched",
    "early_launches",
    "triggered",
)
KERNELS = (  # no product and sum in one rounding, as torch; an address that is not aligned ends the process
    "-ffp-contract=off",
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
    '-DLDMQ_ARCHITECTURES="80;89;90a"',
    "-DLDMQ_HAS_SM89=1",
    "-DLDMQ_HAS_SM90=1",
    f"-I{EMULATOR}",
    f"-I{ROOT / 'csrc'}",
    "-x",
    "c++",
)


def load(path: Path) -> ModuleType:
    """The module of this file, under the name of its folder."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._binding", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiled(source: Path, options: Sequence[str], folder: Path) -> str:
    target = folder / f"{source.name}.o"
    subprocess.run([*COMPILE, *options, "-c", str(source), "-o", str(target)], check=True)
    return str(target)


def _compiler_version() -> str:
    return subprocess.run([*COMPILE[:1], "-v"], capture_output=True, text=True, check=True).stderr


def _key() -> str:
    return build_key(_compiler_version(), [kept_builds.ROOT / "csrc", EMULATOR, Path(__file__)])


def _build(folder: Path) -> None:
    """Compile the kernels for the CPU and the binding over them into this folder."""
    kernels = [*sorted((ROOT / "csrc").glob("*.cu")), EMULATOR / "emulator.cpp"]
    modules = sorted((ROOT / "csrc").glob("binding*.cpp"))
    includes = [f"-I{sysconfig.get_path('include')}"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_compiled, source, KERNELS, Path(scratch)) for source in kernels]
        module_jobs = [pool.submit(_compiled, source, includes, Path(scratch)) for source in modules]
        objects, module_objects = ([job.result() for job in started] for started in (jobs, module_jobs))
        subprocess.run(["g++", "-shared", *objects, "-o", str(folder / LIBRARY)], check=True)
        linked = [f"-L{folder}", f"-l:{LIBRARY}", "-Wl,-rpath,$ORIGIN"]
        subprocess.run(["g++", "-shared", *module_objects, *linked, "-o", str(folder / MODULE)], check=True)


@functools.cache
def emulated_binding() -> ModuleType:
    """The binding, linked with the kernels for the CPU: addresses are those of CPU tensors.

    All processes of these sources share one build, in build/emulator. Skips without g++.
    """
    python_headers = Path(sysconfig.get_path("include"))
    if sys.platform != "linux" or not shutil.which("g++") or not (python_headers / "Python.h").exists():
        pytest.skip("needs Linux, g++ and Python's headers")
    with kept_build("emulator", _key, _build) as folder:
        module = load(folder / MODULE)
        emulator = ctypes.CDLL(str(folder / LIBRARY))
    for name in SETTINGS:
        setattr(module, name, getattr(emulator, f"emulator_{name}"))
    return module


def emulate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let the CUDA backend serve CPU tensors by the emulator, until the end of the test; the binding."""
    binding = emulated_binding()
    monkeypatch.setattr(extension, "binding", lambda: binding)
    monkeypatch.setattr(extension, "target", lambda _: {"device": 1, "stream": 0})
    monkeypatch.setattr("ldmq_kernels.kernels.cuda.backend.serves", lambda device: device == torch.device("cpu"))
    tiles.forget()
    return binding
