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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, build_meta
from setuptools.command.build_ext import build_ext

prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
get_requires_for_build_wheel = build_meta.get_requires_for_build_wheel
get_requires_for_build_editable = build_meta.get_requires_for_build_editable
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
build_sdist = build_meta.build_sdist

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "ldmq_kernels"
MODULE = "ldmq_kernels.kernels.cuda._binding"
LOWEST_ARCHITECTURE = 80
HOPPER = "90a"  # 90 means this everywhere: wgmma and TMA are there
SERIALIZED = re.compile(r"C7510|wgmma\.mma_async instructions are serialized")  # each reason has its own number
REMARK = re.compile(r"warning|\(C\d+\)")
OLDEST_PYTHON = "cp311"  # whose stable ABI csrc/stable_abi.h asks for: the module serves all later ones
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
    """What to compile for: LDMQ_CUDA_ARCHS where it is set, or else the visible GPUs; 90 stands as "90a".

    Raises:
        ValueError: LDMQ_CUDA_ARCHS does not read as "80;90".
    """
    asked = os.environ.get("LDMQ_CUDA_ARCHS", "")
    names = [name for name in re.split(r"[;,\s]+", asked) if name] if asked else visible_architectures()
    for name in names:
        if not re.fullmatch(r"\d{2,3}a?", name) or int(name.rstrip("a")) < LOWEST_ARCHITECTURE:
            raise ValueError(
                f"LDMQ_CUDA_ARCHS is {asked!r}: {name!r} is not an architecture of {LOWEST_ARCHITECTURE} or newer. "
                'Write it as "80;90".'
            )
    return list(dict.fromkeys(HOPPER if name == "90" else name for name in names))


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


def library_sources(architectures: list[str]) -> list[Path]:
    """The files of the library that some of these architectures run."""
    return [source for source in sorted((ROOT / "csrc").glob("*.cu")) if running(source, architectures)]


def running(source: Path, architectures: list[str]) -> list[str]:
    """Those of these architectures that run a file, as its name says: sm90_*.cu is for Hopper alone, others for newer.

    sm89_*.cu has the instructions of FP8, which came with 8.9.
    """
    lowest = re.match(r"sm(\d+)_", source.name)
    if lowest is None:
        return architectures
    if lowest[1] == HOPPER.rstrip("a"):
        return [name for name in architectures if name == HOPPER]
    return [name for name in architectures if int(name.rstrip("a")) >= int(lowest[1])]


def generated_code(source: Path, architectures: list[str]) -> list[str]:
    """nvcc's flags: machine code for each architecture, and PTX for newer GPUs, of the lowest whose PTX they take."""
    chosen = running(source, architectures)
    portable = [name for name in chosen if name.isdigit()]
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    if portable:
        lowest = min(portable, key=int)
        codes.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    return codes


def barrier_timeout() -> list[str]:
    """nvcc's flags of a debug build: LDMQ_BARRIER_TIMEOUT is the clocks after which a wait for an mbarrier is given up.

    The kernel then says which block, warpgroup, mbarrier and parity it was, and ends; without it, it would hang.

    Raises:
        ValueError: LDMQ_BARRIER_TIMEOUT is not a number of 1 or more.
    """
    asked = os.environ.get("LDMQ_BARRIER_TIMEOUT", "")
    if asked and (not asked.isdecimal() or int(asked) < 1):
        raise ValueError(
            f"LDMQ_BARRIER_TIMEOUT is {asked!r}, must be a number of clocks, 1 or more, such as 4000000000"
        )
    return [f"-DLDMQ_BARRIER_TIMEOUT={asked}ll"] if asked else []


def object_command(nvcc: str, source: Path, architectures: list[str], output: Path) -> list[str]:
    """The nvcc call that compiles one file of the library."""
    compiled = {other.name[:4] for other in library_sources(architectures)}
    return [
        nvcc,
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-Xcompiler=-fPIC",
        "-Xptxas=-v",
        f"-I{ROOT / 'csrc/ptx'}",
        f'-DLDMQ_ARCHITECTURES="{";".join(architectures)}"',
        f"-DLDMQ_HAS_SM89={int('sm89' in compiled)}",
        f"-DLDMQ_HAS_SM90={int('sm90' in compiled)}",
        *barrier_timeout(),
        *generated_code(source, architectures),
        "-c",
        str(source),
        "-o",
        str(output),
    ]


def readable_names(log: str) -> str:
    """The log with C++ names in place of the linker's, where a tool is there that knows them."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return log
    return subprocess.run([tool, "-p"], input=log, capture_output=True, text=True, check=True).stdout


class KernelUse(NamedTuple):
    """What ptxas says of one kernel on one architecture; memory in bytes, that of shared memory without dynamic."""

    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    kernel: str


def kernel_rows(log: str) -> list[KernelUse]:
    """The kernels of a log of `ptxas -v`, and the functions that they call, whose registers are in the kernel's."""
    rows: list[KernelUse] = []
    architecture = ""
    for line in log.splitlines():
        if compiled := re.search(r"Compiling entry function '.*' for 'sm_(\w+)'", line):
            architecture = compiled[1]
        elif function := re.search(r"Function properties for (.+)", line):
            rows.append(KernelUse(architecture, 0, 0, 0, 0, 0, function[1]))
        elif memory := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, memory.groups())
            rows[-1] = rows[-1]._replace(stack=stack, spill_stores=stores, spill_loads=loads)
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows[-1] = rows[-1]._replace(registers=int(used[1]), shared=int(shared[1]) if shared else 0)
    return rows


def gate(source: str, log: str) -> None:
    """Refuse kernels that ptxas compiled to something slow.

    Raises:
        RuntimeError: a kernel keeps registers in memory, or its matrix products run one after another.
    """
    spilled = [
        f"{row.kernel} (sm_{row.architecture}): spill stores {row.spill_stores} bytes, loads {row.spill_loads} bytes"
        for row in kernel_rows(log)
        if row.spill_stores or row.spill_loads
    ]
    serialized = [line for line in log.splitlines() if SERIALIZED.search(line)]
    if spilled or serialized:
        raise RuntimeError("\n    ".join([f"{source} compiles to slow kernels:", *spilled, *serialized]))


def compile_source(command: list[str], source: str) -> list[KernelUse]:
    """Run one nvcc call, say how long it took, and return what its kernels use.

    Raises:
        RuntimeError: nvcc fails, or a kernel does not pass the gate.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile {source}:\n{done.stdout}{done.stderr}")
    log = readable_names(done.stderr)
    if not barrier_timeout():  # what a debug build prints takes a stack, and its products wait for the call
        gate(source, log)
    remarks = [line for line in log.splitlines() if REMARK.search(line)]
    print("\n".join([f"ldmq_kernels: {source} in {time.perf_counter() - start:.1f} s", *remarks]), flush=True)
    return kernel_rows(log)


def jobs() -> int:
    """How many files are compiled at once: MAX_JOBS, or else as many as there are processors.

    Raises:
        ValueError: MAX_JOBS is not a number of 1 or more.
    """
    asked = os.environ.get("MAX_JOBS", "")
    if asked and (not asked.isdecimal() or int(asked) < 1):
        raise ValueError(f"MAX_JOBS is {asked!r}, must be a number of 1 or more")
    return int(asked) if asked else len(os.sched_getaffinity(0))


def kernel_table(rows: list[tuple[str, KernelUse]]) -> str:
    """One line for each kernel of each file, under a line of titles."""
    lines = [("file", *KernelUse._fields), *((source, *map(str, use)) for source, use in rows)]
    *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "".join("  ".join([*map(str.ljust, line, widths), line[-1]]) + "\n" for line in lines)


def build_library(nvcc: str, architectures: list[str], scratch: Path, output: Path) -> None:
    """Compile each file on its own, several at once, and link them; kernels.txt in `scratch` says what the kernels use.

    Raises:
        RuntimeError: a file does not compile, or has a kernel that does not pass the gate, or ptxas tells of none.
    """
    sources = library_sources(architectures)
    objects = [scratch / f"{source.stem}.o" for source in sources]
    commands = [
        object_command(nvcc, source, architectures, made) for source, made in zip(sources, objects, strict=True)
    ]
    names = [source.name for source in sources]
    scratch.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs()) as pool:
        uses = list(pool.map(compile_source, commands, names))
    rows = [(name, use) for name, kernels in zip(names, uses, strict=True) for use in kernels]
    if not rows:
        raise RuntimeError(f"{nvcc} -Xptxas=-v tells of no kernel in a form that is known, so that none can be checked")
    (scratch / "kernels.txt").write_text(kernel_table(rows))
    link = [nvcc, "-shared", "-cudart=static", "-Xlinker=--no-undefined"]
    subprocess.run([*link, *map(str, objects), "-o", str(output)], check=True)


class BuildCuda(build_ext):
    """Builds the C library with nvcc beside the Python module that is linked with it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile both pieces into the folder of the module."""
        nvcc = find_nvcc()
        assert nvcc is not None, "the extension is declared only where nvcc was found"
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        build_library(nvcc, cuda_architectures(), Path(self.build_temp), folder / f"lib{LIBRARY}.so")
        ext.library_dirs.append(str(folder))
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:
        """Put the library beside the module in an editable install too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, *MODULE.split(".")[:-1], f"lib{LIBRARY}.so")
        shutil.copy2(built, ROOT.joinpath(*MODULE.split(".")[:-1]) / built.name)


def in_tree(*patterns: str) -> list[str]:
    """The files of csrc that match, as paths from the root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cuda_setup() -> dict[str, Any]:
    """Keywords for `setuptools.setup`: the extension where CUDA is asked for, or else none, with the reason printed."""
    architectures = cuda_architectures()
    if not architectures:
        why = "no nvcc for the visible GPU" if requested_architectures() else "no GPU visible, LDMQ_CUDA_ARCHS not set"
        print(f"ldmq_kernels: CUDA kernels left out ({why}); Triton or the CPU serves", file=sys.stderr)
        return {}
    module = Extension(
        MODULE,
        in_tree("binding*.cpp"),
        depends=in_tree("*.h", "*.cuh", "ptx/*", "*.cu"),
        libraries=[LIBRARY],
        runtime_library_dirs=["$ORIGIN"],
        extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
        py_limited_api=True,
        language="c++",
    )
    options = {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildCuda}, "options": options}
