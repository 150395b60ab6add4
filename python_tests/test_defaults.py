"""No tensor of the package gets its device or its floating dtype from what a process has as its default.

Kernels read what they are given as they expect it: a default of float64, or of a GPU, would change what they read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ldmq_kernels

PACKAGE = Path(ldmq_kernels.__file__).parent
FLOATING = {"empty", "zeros", "ones", "eye", "linspace", "rand", "randn"}  # of the default dtype if of none
MADE = {*FLOATING, "tensor", "full", "arange", "randint", "randperm"}


def _without_a_place(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of, name = node.func.value, node.func.attr
        given = {keyword.arg for keyword in node.keywords}
        if not isinstance(of, ast.Name) or of.id != "torch" or name not in MADE or None in given:
            continue
        if "device" not in given or (name in FLOATING and "dtype" not in given):
            yield node.lineno, ast.unparse(node)


def _sources() -> Iterator[Path]:
    """Every file but the demo's, which has a process of its own."""
    return (path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "demo")


def test_every_tensor_names_its_device_and_floating_ones_their_dtype() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {call}"
        for path in _sources()
        for line, call in _without_a_place(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_what_takes_defaults_is_found() -> None:
    source = "torch.ones(2, device=d)\ntorch.ones(2, dtype=t, device=d)\ntorch.tensor([1])\ntorch.rand(2, **how)\n"
    assert [line for line, _ in _without_a_place(source)] == [1, 3]
