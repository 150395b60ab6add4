"""How the package is built: setuptools, and with it the CUDA kernels where they are asked for.

They are asked for when LDMQ_CUDA_ARCHS is set ("80;90") or a GPU is visible; nvcc being there is
not a reason. An explicit request that cannot be met is an error. Without one, a machine that has
a GPU and no nvcc gets the package without the kernels, and the build says so.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.command.build_ext import build_ext

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
build_sdist = build_meta.build_sdist

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("quantize.cu",)
LIBRARY = "ldmq_kernels"
MODULE = "ldmq_kernels.kernels.cuda._binding"
LOWEST_ARCHITECTURE = 80
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute of the driver's API


def visible_architectures() -> list[str]:
    """Compute capabilities of the GPUs that the driver shows, such as ["90"]; empty without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = set()
    for device in range(count.value):
        digits = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            value = ctypes.c_int()
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            digits.append(value.value)
        found.add(digits[0] * 10 + digits[1])
    return [str(architecture) for architecture in sorted(found) if architecture >= LOWEST_ARCHITECTURE]


def requested_architectures() -> list[str]:
    """What to compile for: LDMQ_CUDA_ARCHS where it is set, or else the visible GPUs.

    Raises:
        ValueError: LDMQ_CUDA_ARCHS does not read as "80;90" or "80;90a".
    """
    asked = os.environ.get("LDMQ_CUDA_ARCHS", "")
    if not asked:
        return visible_architectures()
    names = [name for name in re.split(r"[;,\s]+", asked) if name]
    for name in names:
        if not re.fullmatch(r"\d{2,3}a?", name) or int(name.rstrip("a")) < LOWEST_ARCHITECTURE:
            raise ValueError(
                f"LDMQ_CUDA_ARCHS is {asked!r}: {name!r} is not an architecture of {LOWEST_ARCHITECTURE} or newer. "
                'Write it as "80;90".'
            )
    return names


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the place where CUDA installs itself."""
    folders = [os.environ["CUDA_HOME"] + "/bin"] if os.environ.get("CUDA_HOME") else []
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def cuda_architectures() -> list[str]:
    """The architectures that this build compiles for; empty means no CUDA.

    Raises:
        RuntimeError: LDMQ_CUDA_ARCHS is set and there is no nvcc.
    """
    architectures = requested_architectures()
    if architectures and not find_nvcc():
        if os.environ.get("LDMQ_CUDA_ARCHS"):
            raise RuntimeError(
                "LDMQ_CUDA_ARCHS is set and nvcc was not found: put it on PATH, set CUDA_HOME, or unset LDMQ_CUDA_ARCHS"
            )
        return []
    return architectures


def library_command(nvcc: str, architectures: list[str], output: Path) -> list[str]:
    """The nvcc call that makes the C library: machine code for each architecture, and PTX of the lowest for others."""
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    lowest = min(int(name.rstrip("a")) for name in architectures)
    return [
        nvcc,
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-Xcompiler=-fPIC",
        f'-DLDMQ_ARCHITECTURES="{";".join(architectures)}"',
        *codes,
        f"-gencode=arch=compute_{lowest},code=compute_{lowest}",
        "-shared",
        *(str(ROOT / "csrc" / name) for name in SOURCES),
        "-o",
        str(output),
    ]


class BuildCuda(build_ext):
    """Builds the C library with nvcc beside the pybind11 module that is linked with it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile both pieces into the folder of the module."""
        import pybind11  # requested, so importable, only where this runs

        nvcc = find_nvcc()
        assert nvcc is not None, "the extension is declared only where nvcc was found"
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(library_command(nvcc, cuda_architectures(), folder / f"lib{LIBRARY}.so"), check=True)
        ext.include_dirs.append(pybind11.get_include())
        ext.library_dirs.append(str(folder))
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:
        """Put the library beside the module in an editable install too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, *MODULE.split(".")[:-1], f"lib{LIBRARY}.so")
        shutil.copy2(built, ROOT.joinpath(*MODULE.split(".")[:-1]) / built.name)


def cuda_setup() -> dict[str, Any]:
    """Keywords for `setuptools.setup`: the extension where CUDA is asked for, or else none, with the reason printed."""
    architectures = cuda_architectures()
    if not architectures:
        why = "no nvcc for the visible GPU" if requested_architectures() else "no GPU visible, LDMQ_CUDA_ARCHS not set"
        print(f"ldmq_kernels: CUDA kernels left out ({why}); Triton or the CPU serves", file=sys.stderr)
        return {}
    module = Extension(
        MODULE,
        ["csrc/binding.cpp"],
        depends=["csrc/ldmq_cuda.h", *(f"csrc/{name}" for name in SOURCES)],
        libraries=[LIBRARY],
        runtime_library_dirs=["$ORIGIN"],
        extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
        language="c++",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildCuda}}


def _cuda_requirements() -> list[str]:
    return ["pybind11>=2.12"] if cuda_architectures() else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' requirements, and pybind11 where CUDA is asked for."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_cuda_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As for a wheel."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_cuda_requirements()]
