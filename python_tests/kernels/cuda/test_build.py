"""The build of the extension, and what it builds: it imports without a GPU and refuses what it cannot take."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
PLACE = "lib/ldmq_kernels/kernels/cuda"

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4ldmq4gemmI6__halfLi4EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN4ldmq4gemmI6__halfLi4EEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 6 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 16.041 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5callsPfi' for 'sm_90a'
ptxas info    : Function properties for _Z5callsPfi
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 256 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compile time = 9.700 ms
ptxas info    : Function properties for _Z6helperPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SPILLS = """\
ptxas info    : Compiling entry function '_Z6spillsPf' for 'sm_90a'
ptxas info    : Function properties for _Z6spillsPf
    336 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 336 bytes cumulative stack size
"""
SERIALIZED = """\
ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {why} \
in the function '_Z6serialPimmi'
"""
NVCC = """\
#!/bin/sh
for last in "$@"; do :; done
touch "$last"
cat "$(dirname "$0")/log" >&2
"""

TOKENS: dict[str, Any] = {
    "x": 4096, "dtype": "float16", "inv_smooth": 0, "q": 8192, "q_dtype": "int8", "scale": 12288, "rows": 3,
    "channels": 320, "device": 0, "stream": 0, "dependent": False,
}  # fmt: skip
SAMPLES = {name: value for name, value in TOKENS.items() if name != "rows"} | {
    "absmax": 16384,
    "samples": 2,
    "pixels": 16,
}
STATIC = {name: value for name, value in TOKENS.items() if name not in ("inv_smooth", "scale")} | {
    "inv_scale": 16384,
    "inv_scale_count": 320,
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
        ("quantize_static", {"inv_scale": 0}, "inv_scale is null"),
        ("quantize_static", {"inv_scale_count": 7}, "inv_scale has 7 elements, must have 1 or 320"),
        ("quantize_per_token", {"scale": 0}, "scale is null"),
        ("quantize_per_token", {"scale": 12290}, "scale is not aligned to 4 bytes"),
        ("quantize_per_token", {"inv_smooth": 12290}, "inv_smooth is not aligned to 4 bytes"),
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


def test_a_build_says_which_cuda_made_it(built: ModuleType) -> None:
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    assert release is not None
    driver, build = built.versions()
    assert build == int(release[1]) * 1000 + int(release[2]) * 10
    assert driver >= 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses are not real")
@pytest.mark.parametrize("op", CALLS)
def test_without_a_gpu_the_error_names_op_shape_device_and_architectures(built: ModuleType, op: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{op} of float16 \(.*channels=320\) on cuda:0 failed: .*80;90a"):
        getattr(built, op)(**CALLS[op])


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    """csrc/build_backend.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "csrc/build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout with three files to compile, and an nvcc that prints the file named log beside it."""
    monkeypatch.setattr(backend, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    for name in ("sm90_gemm.cu", "sm89_gemm.cu", "sm80_gemm.cu", "cast.cu"):
        (tmp_path / "csrc" / name).touch()
    (tmp_path / "nvcc").write_text(NVCC)
    (tmp_path / "nvcc").chmod(0o755)
    (tmp_path / "log").write_text(CLEAN)
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "visible", "architectures"),
    [
        ("90", [], ["90a"]),
        ("80;90", [], ["80", "90a"]),
        ("90a, 90 100 120a", [], ["90a", "100", "120a"]),
        ("", ["86", "90"], ["86", "90a"]),
        ("89", ["90"], ["89"]),
        ("", [], []),
    ],
)
def test_90_stands_for_90a_wherever_it_comes_from(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, visible: list[str], architectures: list[str]
) -> None:
    monkeypatch.setenv("LDMQ_CUDA_ARCHS", asked)
    monkeypatch.setattr(backend, "visible_architectures", lambda: visible)
    assert backend.requested_architectures() == architectures


@pytest.mark.parametrize(
    ("name", "architectures", "code"),
    [
        ("sm80_gemm.cu", ["80", "90a"], ["compute_80,sm_80", "compute_90a,sm_90a", "compute_80,compute_80"]),
        ("cast.cu", ["120", "89"], ["compute_120,sm_120", "compute_89,sm_89", "compute_89,compute_89"]),
        ("cast.cu", ["90a"], ["compute_90a,sm_90a"]),
        ("cast.cu", ["90a", "100"], ["compute_90a,sm_90a", "compute_100,sm_100", "compute_100,compute_100"]),
        ("sm90_gemm.cu", ["80", "90a", "120"], ["compute_90a,sm_90a"]),
        ("sm89_gemm.cu", ["80", "90a"], ["compute_90a,sm_90a"]),
        ("sm89_gemm.cu", ["120a", "86", "89"], ["compute_120a,sm_120a", "compute_89,sm_89", "compute_89,compute_89"]),
    ],
)
def test_a_file_is_compiled_for_what_its_name_allows(
    tree: Path, backend: ModuleType, name: str, architectures: list[str], code: list[str]
) -> None:
    command = backend.object_command("nvcc", tree / "csrc" / name, architectures, tree / "x.o")
    flags = [flag for flag in command if flag.startswith("-gencode")]
    assert flags == ["-gencode=arch={},code={}".format(*pair.split(",")) for pair in code]


def test_files_that_no_architecture_runs_are_left_out_and_every_file_is_told(tree: Path, backend: ModuleType) -> None:
    def told(architectures: list[str]) -> tuple[list[str], str]:
        sources = backend.library_sources(architectures)
        commands = [backend.object_command("nvcc", source, architectures, tree / "x.o") for source in sources]
        macros = {flag for command in commands for flag in command if flag.startswith("-DLDMQ_HAS")}
        return [source.name for source in sources], " ".join(sorted(macros)).replace("-DLDMQ_HAS_", "")

    every = ["cast.cu", "sm80_gemm.cu", "sm89_gemm.cu", "sm90_gemm.cu"]
    assert told(["80", "90a"]) == (every, "SM89=1 SM90=1")
    assert told(["80", "120"]) == (every[:-1], "SM89=1 SM90=0")
    assert told(["80", "86"]) == (every[:-2], "SM89=0 SM90=0")
    (tree / "csrc/sm90_gemm.cu").unlink()
    assert told(["90a"]) == (every[:-1], "SM89=1 SM90=0")


def test_a_build_says_what_it_compiled_and_what_the_kernels_use(
    tree: Path, backend: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.build_library(str(tree / "nvcc"), ["80", "90a"], tree / "temp", tree / "library.so")
    assert (tree / "library.so").exists()
    objects = {"cast.o", "sm80_gemm.o", "sm89_gemm.o", "sm90_gemm.o"}
    assert {path.name for path in (tree / "temp").iterdir()} == objects | {"kernels.txt"}
    printed = capsys.readouterr().out
    assert all(re.search(rf"ldmq_kernels: {name}.cu in [\d.]+ s\n", printed) for name in ("cast", "sm80_gemm"))
    titles, *lines = (tree / "temp/kernels.txt").read_text().splitlines()
    assert titles.split()[:3] == ["file", "architecture", "registers"]
    assert len(lines) == 4 * 3
    assert lines[-2].split() == ["sm90_gemm.cu", "90a", "34", "256", "0", "0", "128", lines[-2].split()[-1]]


def test_a_build_whose_kernels_spill_fails(tree: Path, backend: ModuleType) -> None:
    (tree / "log").write_text(CLEAN + SPILLS.format(stores=392, loads=404))
    with pytest.raises(RuntimeError, match=r"cast.cu compiles to slow kernels"):
        backend.build_library(str(tree / "nvcc"), ["90a"], tree / "temp", tree / "library.so")
    assert not (tree / "library.so").exists()


def test_a_log_that_tells_of_no_kernel_is_no_clean_log(tree: Path, backend: ModuleType) -> None:
    (tree / "log").write_text("ptxas of another day\n")
    with pytest.raises(RuntimeError, match="tells of no kernel"):
        backend.build_library(str(tree / "nvcc"), ["80"], tree / "temp", tree / "library.so")


def test_a_file_that_does_not_compile_is_named_with_what_nvcc_says(tree: Path, backend: ModuleType) -> None:
    (tree / "nvcc").write_text("#!/bin/sh\necho 'expected a ;' >&2\nexit 2\n")
    with pytest.raises(RuntimeError, match=r"nvcc does not compile cast.cu:\nexpected a ;"):
        backend.build_library(str(tree / "nvcc"), ["80"], tree / "temp", tree / "library.so")


def test_a_log_becomes_one_row_for_each_kernel(backend: ModuleType) -> None:
    assert [tuple(row) for row in backend.kernel_rows(CLEAN)] == [
        ("80", 6, 0, 0, 0, 0, "_ZN4ldmq4gemmI6__halfLi4EEEvPT_"),
        ("90a", 34, 256, 0, 0, 128, "_Z5callsPfi"),
        ("90a", 0, 0, 0, 0, 0, "_Z6helperPfi"),
    ]
    (spilling,) = backend.kernel_rows(SPILLS.format(stores=392, loads=404))
    assert tuple(spilling) == ("90a", 32, 336, 392, 404, 0, "_Z6spillsPf")
    assert backend.kernel_rows("") == []


def test_names_are_made_readable_where_a_tool_is_there(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("c++filt") or shutil.which("cu++filt"):
        names = [row.kernel for row in backend.kernel_rows(backend.readable_names(CLEAN))]
        assert names == ["ldmq::gemm<__half, 4>", "calls", "helper"]
    monkeypatch.setenv("PATH", "")
    assert backend.readable_names(CLEAN) == CLEAN


def test_the_gate_lets_clean_kernels_through(backend: ModuleType) -> None:
    backend.gate("gemm.cu", CLEAN)


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (SPILLS.format(stores=392, loads=404), r"_Z6spillsPf \(sm_90a\): spill stores 392 bytes, loads 404 bytes"),
        (SPILLS.format(stores=0, loads=4), "spill stores 0 bytes, loads 4 bytes"),
        (SERIALIZED.format(code="C7510", why="insufficient register resources"), "serialized .*_Z6serialPimmi"),
        (SERIALIZED.format(code="C7514", why="the presence of Extern calls"), "serialized .*_Z6serialPimmi"),
    ],
)
def test_the_gate_refuses_slow_kernels_by_file_kernel_and_figures(backend: ModuleType, log: str, why: str) -> None:
    with pytest.raises(RuntimeError, match=rf"gemm.cu compiles to slow kernels:\n\s+.*{why}"):
        backend.gate("gemm.cu", CLEAN + log)


def test_max_jobs_limits_how_many_files_are_compiled_at_once(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert backend.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert backend.jobs() == len(os.sched_getaffinity(0))
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(ValueError, match=f"MAX_JOBS is '{wrong}'"):
            backend.jobs()


def test_every_file_has_kernels_for_its_architectures(build_folder: Path) -> None:
    _, *lines = (build_folder / "temp/kernels.txt").read_text().splitlines()
    found = {tuple(line.split()[:2]) for line in lines}
    names = [path.name for path in (ROOT / "csrc").glob("*.cu")]
    hopper = {(name, "90a") for name in names}
    assert found <= hopper | {(name, "80") for name in names if not name.startswith(("sm89_", "sm90_"))}
    assert {("quantize.cu", "80"), ("quantize.cu", "90a")} <= found


def dynamic_section(library: Path) -> set[str]:
    """The libraries that this one asks the loader for."""
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    text = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))


def test_the_library_needs_neither_torch_nor_python_nor_cuda_and_the_module_only_the_library(
    build_folder: Path,
) -> None:
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    (module,) = (build_folder / PLACE).glob("_binding*.so")
    assert dynamic_section(build_folder / PLACE / "libldmq_kernels.so") <= system
    assert dynamic_section(module) - system == {"libldmq_kernels.so"}


def test_the_library_hides_its_cuda_runtime_so_that_none_of_torch_takes_its_place(build_folder: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(build_folder / PLACE / "libldmq_kernels.so")]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert "ldmq_architectures" in names
    assert [name for name in names if re.match("_*cu", name)] == []


def other_python() -> str:
    """Another version on PATH or installed beside this one."""
    beside = map(str, Path(sys.base_prefix).parent.glob("*/bin"))
    search = os.pathsep.join([*beside, os.environ["PATH"]])
    for minor in range(11, 20):
        python = shutil.which(f"python3.{minor}", path=search)
        if python is None or minor == sys.version_info.minor:
            continue
        if subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip("needs another Python")


def test_the_same_module_serves_another_python(build_folder: Path) -> None:
    call = f"import _binding; _binding.quantize_per_token(**{TOKENS | {'device': 99}})"
    refused = subprocess.run(
        [other_python(), "-c", call], cwd=build_folder / PLACE, capture_output=True, text=True, check=False
    ).stderr
    why = r"RuntimeError: ldmq cuda quantize_per_token of float16 \(rows=3, channels=320\) on cuda:99 failed: "
    assert re.search(why, refused), refused


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"rows": 3}, "TypeError: quantize_static() needs the argument 'x'"),
        (STATIC | {"row": 3}, "TypeError: quantize_static() has no argument 'row'"),
        (STATIC | {"dtype": 16}, "TypeError: "),
        (STATIC | {"rows": "3"}, "TypeError: "),
        (STATIC | {"device": 2**40}, "OverflowError: 1099511627776 is too large"),
        (STATIC | {"x": -1}, "OverflowError: "),
    ],
)
def test_arguments_that_are_none_are_pythons_errors(emulated: ModuleType, call: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, OverflowError)) as raised:
        emulated.quantize_static(**call)
    assert f"{raised.type.__name__}: {raised.value}".startswith(error)


def test_arguments_are_taken_by_name_in_any_order(emulated: ModuleType) -> None:
    x, q, inv_scale = torch.randn(3, 32), torch.empty(3, 32, dtype=torch.int8), torch.full((1,), 40.0)
    given = {"x": x.data_ptr(), "dtype": "float32", "inv_scale": inv_scale.data_ptr(), "inv_scale_count": 1}
    given |= {"q": q.data_ptr(), "q_dtype": "int8", "rows": 3, "channels": 32, "device": 0, "stream": 0}
    given |= {"dependent": False}
    for names in (list(given), sorted(given), sorted(given, reverse=True)):
        q.fill_(99)
        emulated.quantize_static(**{name: given[name] for name in names})
        assert torch.equal(q, (x * 40).round().clamp(-127, 127).to(torch.int8))
    with pytest.raises(TypeError, match="keyword arguments alone"):
        emulated.quantize_static(1)


def test_no_line_of_the_kernels_is_longer_than_those_of_python() -> None:
    folders = ROOT / "csrc", Path(__file__).parent / "emulator"
    sources = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    lines = {f"{path.name}:{at}": line for path in sources for at, line in enumerate(path.read_text().splitlines(), 1)}
    assert len(lines) > 1000
    assert not [place for place, line in lines.items() if len(line) > 120]
