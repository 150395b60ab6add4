"""What tests compile is kept in build/ by a hash of all that it depends on, so that the same is not compiled twice."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build"
MODULE = "_binding.abi3.so"
SOURCES = (".cu", ".cuh", ".h", ".cpp", ".py")


def build_key(compiler: str, inputs: Iterable[Path]) -> str:
    """A hash of the sources in these folders and files, the compiler's version and Python."""
    digest = hashlib.sha256()
    for told in (compiler, sys.version, MODULE, os.environ.get("CPATH", "")):
        digest.update(f"{told}\0".encode())
    for place in inputs:
        files = [place] if place.is_file() else place.rglob("*")
        for path in sorted(path for path in files if path.suffix in SOURCES):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(place.parent)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def kept_build(name: str, key: Callable[[], str], build: Callable[[Path], None]) -> Iterator[Path]:
    """The folder of the build of this key in build/`name`, which no other process removes meanwhile.

    Processes wait for the one that builds. A build gets its name when it is whole, and takes the place of older ones.

    Args:
        key: of the build as the sources are now.
        build: fills a folder.

    Raises:
        RuntimeError: the sources changed while they were compiled.
    """
    builds = BUILDS / name
    builds.mkdir(parents=True, exist_ok=True)
    with (builds / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = builds / key()
        if not folder.exists():
            for other in builds.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
            unfinished = Path(tempfile.mkdtemp(dir=builds))
            build(unfinished)
            if key() != folder.name:
                raise RuntimeError(f"the sources changed while build/{name} was made: run again")
            unfinished.rename(folder)
        yield folder
