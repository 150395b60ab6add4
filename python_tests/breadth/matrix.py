"""Pipelines of every kind that diffusers has, in miniature: what planning takes and quantizing keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from python_tests.breadth.rows import Row


def all_rows() -> dict[str, Row]:
    """All rows by name; importing diffusers comes with it."""
    from python_tests.breadth import part_rows, transformer_rows  # noqa: F401
    from python_tests.breadth.rows import ROWS

    return ROWS
