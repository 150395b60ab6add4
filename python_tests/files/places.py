"""A file and a folder that tests write, and what is in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from ldmq_kernels.files import output_file, output_folder


def is_ours(path: Path) -> bool:
    return path.read_bytes().startswith(b"ours")


def is_older(folder: Path, names: object) -> bool:
    return set(os.listdir(folder)) >= {"ours"}


def put_file(path: Path, content: bytes = b"ours, new") -> None:
    with output_file(path, is_ours, "table of ours") as write:
        write(content)


def fill(folder: Path) -> None:
    (folder / "unet").mkdir()
    (folder / "unet" / "weights").write_bytes(b"new")
    (folder / "model.json").write_bytes(b"new")


def put_folder(path: Path) -> None:
    with output_folder(path) as write:
        write(fill)


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, links as such."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


WHOLE = {"unet/weights": b"new", "model.json": b"new"}
