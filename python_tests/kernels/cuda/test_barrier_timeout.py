"""A debug build gives up a wait that would never end, and says who waited for what."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from python_tests.kernels.kept_builds import ROOT

SOURCE = """
#include <ptx_sm90.cuh>
__global__ void waits(int* out) {
  __shared__ uint64_t barrier;
  mbarrier_wait(&barrier, 1);
  *out = 1;
}
"""


@pytest.fixture
def backend() -> ModuleType:
    """The build backend, by itself."""
    spec = importlib.util.spec_from_file_location("build_backend_of_timeouts", ROOT / "csrc/build_backend.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_debug_build_is_asked_for_by_the_clocks_of_a_wait(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ROOT / "csrc/sm90_linear_w8a8.cu"
    monkeypatch.delenv("LDMQ_BARRIER_TIMEOUT", raising=False)
    assert "LDMQ_BARRIER_TIMEOUT" not in " ".join(backend.object_command("nvcc", source, ["90a"], Path("a.o")))
    monkeypatch.setenv("LDMQ_BARRIER_TIMEOUT", "4000000000")
    assert "-DLDMQ_BARRIER_TIMEOUT=4000000000ll" in backend.object_command("nvcc", source, ["90a"], Path("a.o"))
    monkeypatch.setenv("LDMQ_BARRIER_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="LDMQ_BARRIER_TIMEOUT is 'soon', must be a number of clocks"):
        backend.object_command("nvcc", source, ["90a"], Path("a.o"))


@pytest.mark.slow
def test_its_wait_says_where_and_ends_the_kernel(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    monkeypatch.setenv("LDMQ_BARRIER_TIMEOUT", "4000000000")
    (tmp_path / "waits.cu").write_text(SOURCE)
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-ptx", f"-I{ROOT / 'csrc/ptx'}", *backend.barrier_timeout()]
    subprocess.run([*command, str(tmp_path / "waits.cu"), "-o", str(tmp_path / "waits.ptx")], check=True)
    code = (tmp_path / "waits.ptx").read_text()
    for part in (
        "mbarrier.try_wait.parity",
        "%clock64",
        "400000000",
        "vprintf",
        "trap;",
        "%ctaid.x",
        "%tid.x",
        "activemask",
    ):
        assert part in code, part
    text = "".join(
        chr(int(value)) for value in code.partition("$str[")[2].partition("{")[2].partition("}")[0].split(",")
    )
    assert "block (%u, %u, %u), warpgroup %u, warp %u, lane %u" in text
    assert "parity %u" in text
