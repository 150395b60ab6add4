"""GEGLU and quantization in the epilogue of an FP8 product, beside the two ops that it replaces, and float."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import shapes
from benchmarks.harness.cases import Case
from benchmarks.ops.linear_geglu_w8a8 import case_of

SHAPE = shapes.LINEAR


def case(shape: shapes.Linear) -> Case:
    """One projection."""
    return case_of("linear_geglu_fp8", "linear_fp8", shape)


def cases() -> Iterator[Case]:
    """A case for each feed-forward of the models."""
    return map(case, shapes.geglus())
