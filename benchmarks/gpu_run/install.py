"""What a GPU machine without a network lacks: packages as wheels, and the compiled kernels."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_run.runner import INSTALLED, ROOT

WHEELS, PREBUILT = ROOT / "build" / "wheels", ROOT / "build" / "prebuilt"
PLACE = ROOT / "ldmq_kernels" / "kernels" / "cuda"
DIGEST = "sources.txt"  # of the sources that the kernels in `PREBUILT` were compiled from


def missing_wheels() -> list[str]:
    """Wheels of what is not installed: the machine's own versions go together, and none is to be hidden."""
    found = []
    for path in sorted(WHEELS.glob("*.whl")):
        try:
            importlib.metadata.version(path.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            found.append(str(path))
    return found


def install() -> None:
    """Unpack the wheels of packages that this machine lacks; they need nothing more."""
    wheels = missing_wheels()
    if not WHEELS.is_dir():
        print(f"there is no {WHEELS}: `make wheels` on a machine with a network makes it; models are left out")
    if wheels:
        target = ["--no-deps", "--no-index", "--upgrade", "--target", str(INSTALLED)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *target, *wheels], check=True)


def sources_digest() -> str:
    """A hash of what the kernels are compiled from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def prebuild() -> None:
    """Compile the kernels into build/prebuilt, for a machine that takes them along."""
    shutil.rmtree(PREBUILT, ignore_errors=True)
    scratch = PREBUILT / "temp"
    _build_ext("--build-lib", str(PREBUILT / "lib"), "--build-temp", str(scratch))
    for built in (PREBUILT / "lib").rglob("*.so"):
        shutil.move(built, PREBUILT / built.name)
    shutil.move(next(scratch.rglob("kernels.txt")), PREBUILT / "kernels.txt")
    for folder in (scratch, PREBUILT / "lib"):
        shutil.rmtree(folder)
    (PREBUILT / DIGEST).write_text(sources_digest())


def build(kernels: Path) -> None:
    """Put the kernels into the package: those that came along, if they are of these sources and load, or compiled here.

    Args:
        kernels: where the table of what each kernel uses is copied to.

    Raises:
        subprocess.CalledProcessError: they are not compiled, or do not load.
    """
    if _take_prebuilt():
        print("the compiled kernels that came along are taken")
        shutil.copy(PREBUILT / "kernels.txt", kernels)
    else:
        _build_ext("--inplace")
        for table in (ROOT / "build").glob("temp*/kernels.txt"):
            shutil.copy(table, kernels)
    subprocess.run([sys.executable, "-c", _loads()], cwd=ROOT, check=True)


def _loads() -> str:
    """A program that ends well where the package's compiled kernels load; needs no GPU."""
    return "from ldmq_kernels.kernels.cuda import extension; print(extension.binding().architectures())"


def _take_prebuilt() -> bool:
    told = PREBUILT / DIGEST
    if not told.exists() or told.read_text() != sources_digest():
        return False
    for file in PREBUILT.glob("*.so"):
        shutil.copy(file, PLACE / file.name)
    return subprocess.run([sys.executable, "-c", _loads()], cwd=ROOT, check=False).returncode == 0


def _build_ext(*options: str) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *options], cwd=ROOT, check=True)
