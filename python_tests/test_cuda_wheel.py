"""The wheel that `make cuda-wheel` leaves in dist: it installs and loads where there is neither nvcc nor a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEELS = sorted((ROOT / "dist").glob("ldmq_kernels-*manylinux*.whl"))
ARCHITECTURES = "80;86;89;90a"
LOAD = """
from ldmq_kernels.kernels.cuda import extension
module = extension.load()
print(module.__file__, module.architectures(), module.versions()[1], len(module.tiles()), sep="\\n")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEELS, reason="`make cuda-wheel` makes the wheel"),
]


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The one wheel."""
    (found,) = WHEELS
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, and with what it depends on as it is in this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not this tree's package
    subprocess.run(install, cwd=folder, env=elsewhere, check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, *command: str) -> str:
    """The output of a command in the environment, without nvcc and without a path to this tree."""
    place, environment = installed / "bin", {"PATH": str(installed / "bin"), "HOME": str(installed)}
    done = subprocess.run(
        [str(place / command[0]), *command[1:]],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_wheel_is_for_every_later_python_and_for_other_linuxes(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("cp311", "abi3")
    assert platform.startswith("manylinux_2_")
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist() if ".so" in name}
    assert names == {"_binding.abi3.so", "libldmq_kernels.so"}


def test_it_loads_without_nvcc_and_lists_its_kernels(installed: Path) -> None:
    file, architectures, cuda, tiles = run(installed, "python", "-c", LOAD).splitlines()
    assert Path(file).is_relative_to(installed)
    assert architectures == ARCHITECTURES
    assert int(cuda) >= 12060
    assert int(tiles) >= 30


def test_the_doctor_tells_that_the_kernels_are_built_and_what_they_wait_for(installed: Path) -> None:
    told = " ".join(run(installed, "ldmq", "doctor").split())
    assert f"cuda: does not serve here; it is built for {ARCHITECTURES}, with " in told
    assert "needs an NVIDIA GPU" in told
