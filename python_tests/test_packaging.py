"""What an install brings, what it leaves out, what `import ldmq_kernels` costs, and who may import whom."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldmq_kernels"
LEFT_OUT = (".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "demo_output")

LAYERS = [
    {"tracing"},
    {"chunks", "extras", "files", "graphs", "numerics", "progress", "timing", "version"},
    {"kernels"},
    {"ops"},
    {"nn", "prediction", "tuning"},
    {"plans"},
    {"calibration"},
    {"conversion"},
    {"integrations", "sensitivity"},
    {"planning"},
    {"report"},
    {"__init__"},
    {"demo", "serving"},
    {"cli"},
    {"__main__"},
]
SUBPACKAGES = set().union(*LAYERS)
ASK_NO_TORCH = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'csrc'); import build_backend; "


def environment(**changes: str) -> dict[str, str]:
    """No GPU in sight and nothing asked for, but for the changes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LDMQ_CUDA_ARCHS", "CUDA_HOME")}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | changes


def in_source(source: Path, code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ASK_NO_TORCH + code]
    return subprocess.run(command, cwd=source, env=environment(**changes), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiler_trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an nvcc that leaves a trace when it is called."""
    folder = tmp_path_factory.mktemp("trap")
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {folder / 'called'}\nexit 1\n")
    nvcc.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    made = in_source(folder / "source", f"build_backend.build_sdist({str(folder)!r})")
    assert made.returncode == 0, made.stderr
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(source: Path, compiler_trap: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution with no torch and an nvcc on PATH."""
    folder = tmp_path_factory.mktemp("wheel")
    search = f"{compiler_trap}{os.pathsep}{os.environ['PATH']}"
    made = in_source(source, f"build_backend.build_wheel({str(folder)!r})", PATH=search)
    assert made.returncode == 0, made.stderr
    assert "CUDA kernels left out (no GPU visible, LDMQ_CUDA_ARCHS not set)" in made.stderr
    return next(folder.glob("*.whl"))


def packed(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_data_file_of_the_package(wheel: Path) -> None:
    data = [path for pattern in ("*.schema.json", "*.html", "*.[ch]") for path in PACKAGE.rglob(pattern)]
    weights = [path for path in (PACKAGE / "demo/weights").rglob("*") if path.is_file() and path.suffix != ".part"]
    assert any(path.suffix == ".safetensors" for path in weights)
    assert any(path.name == "plan.schema.json" for path in data)
    wanted = [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed", *data, *weights]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= packed(wheel)


def test_the_wheel_holds_nothing_but_the_package(wheel: Path) -> None:
    names = packed(wheel)
    assert {name.split("/")[0] for name in names} == {"ldmq_kernels", "ldmq_kernels-0.1.0.dist-info"}
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".cpp", ".so")) or "csrc" in name]
    assert any(name.endswith("LICENSE") for name in names)


def test_an_nvcc_on_the_path_is_no_reason_to_compile(wheel: Path, compiler_trap: Path) -> None:
    assert wheel.name.endswith("py3-none-any.whl")
    assert not (compiler_trap / "called").exists()


def test_the_source_distribution_holds_the_kernels_and_the_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc"}
    endings = (".py", ".h", ".cuh", ".cpp")
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "python_tests").rglob("*.*") if path.suffix in endings}
    assert kernels | tests | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= names


def test_the_wheel_leaves_versions_open_and_never_asks_for_triton(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("ldmq_kernels-0.1.0.dist-info/METADATA").decode()
        entry_points = archive.read("ldmq_kernels-0.1.0.dist-info/entry_points.txt").decode()
    needs = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    core = {line.removeprefix("Requires-Dist: ") for line in needs if "extra ==" not in line}
    assert core == {"numpy", "safetensors", "torch>=2.10", "wrapt"}
    assert not [line for line in needs if "==" in line.split(";")[0] or "<" in line or "triton" in line]
    assert "[vllm_omni.general_plugins]\nldmq = ldmq_kernels.integrations.vllm_omni:register" in entry_points
    assert "[sglang.multimodal_gen.plugins]\nldmq = ldmq_kernels.integrations.sglang:register" in entry_points


@pytest.mark.parametrize("asked", ["hopper", "75", "sm_90"])
def test_architectures_that_are_none_are_refused(source: Path, asked: str) -> None:
    refused = in_source(source, "build_backend.cuda_architectures()", LDMQ_CUDA_ARCHS=asked)
    assert refused.returncode != 0
    assert "is not an architecture of 80 or newer" in refused.stderr


def test_cuda_that_is_asked_for_without_nvcc_is_an_error(source: Path) -> None:
    hide = "build_backend.find_nvcc = lambda: None; build_backend.cuda_architectures()"
    refused = in_source(source, hide, LDMQ_CUDA_ARCHS="90")
    assert "LDMQ_CUDA_ARCHS is set and nvcc was not found" in refused.stderr


def test_a_gpu_without_nvcc_gets_the_package_without_the_kernels(source: Path) -> None:
    pretend = "build_backend.visible_architectures = lambda: ['90']; build_backend.find_nvcc = lambda: None; "
    told = in_source(source, pretend + "assert build_backend.cuda_setup() == {}")
    assert told.returncode == 0, told.stderr
    assert "CUDA kernels left out (no nvcc for the visible GPU)" in told.stderr


IMPORT = """
import json, sys
import torch
before = set(sys.modules)
import ldmq_kernels
added = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"added": sorted(added), "gpu": torch.cuda.is_initialized()}))
"""


def test_the_import_touches_no_gpu_and_nothing_heavy() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, check=True)
    told = json.loads(run.stdout)
    assert "ldmq_kernels" in told["added"]
    assert not {"diffusers", "transformers", "matplotlib", "triton", "scipy", "accelerate", "fastapi"} & set(
        told["added"]
    )
    assert not told["gpu"]


def subpackage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of the package's own modules, wherever in the file it stands."""
    parent = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else ()
            names = [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] == PACKAGE.name)


def imported_subpackages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and subpackage of each import of the package's own modules."""
    for line, name in imported_names(path):
        subpackage = [*name.split("."), ""][1]
        yield line, subpackage if subpackage in SUBPACKAGES else "__init__"


def imported_files(path: Path) -> set[Path]:
    """The package's own files that a file imports, also for a type checker alone or inside a function."""
    found = set()
    for _, name in imported_names(path):
        module = PACKAGE.parent.joinpath(*name.split("."))
        tried = [p for m in (module, module.parent) for p in (m.with_suffix(".py"), m / "__init__.py")]
        found.add(next(p for p in tried if p.is_file()))
    return found


def may_import(subpackage: str, other: str) -> bool:
    layer_of = {name: index for index, names in enumerate(LAYERS) for name in names}
    return subpackage == other or layer_of[other] < layer_of[subpackage]


def test_every_subpackage_has_a_layer() -> None:
    assert {subpackage_of(path) for path in PACKAGE.rglob("*.py")} <= SUBPACKAGES


@pytest.mark.parametrize("subpackage", sorted(SUBPACKAGES))
def test_a_file_imports_only_from_layers_below_its_own(subpackage: str) -> None:
    own = sorted(path for path in PACKAGE.rglob("*.py") if subpackage_of(path) == subpackage)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in own
        for line, other in imported_subpackages(path)
        if not may_import(subpackage, other)
    ]
    assert not wrong, wrong


def test_no_files_import_each_other_in_a_circle() -> None:
    imports = {path: imported_files(path) for path in PACKAGE.rglob("*.py")}
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" is imported by ".join(str(path.relative_to(ROOT)) for path in error.args[1]))
