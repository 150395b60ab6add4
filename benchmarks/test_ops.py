"""Every op under pytest-benchmark, which keeps a history and compares with it.

    pytest benchmarks/test_ops.py -k linear_w8a8 --benchmark-autosave
    pytest benchmarks/test_ops.py -k linear_w8a8 --benchmark-compare

The suite leaves it out. Ratios between variants are `python -m benchmarks op`'s business, which measures in turns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness import results
from benchmarks.harness.cases import OURS, Case, usual, variants_of, working
from benchmarks.harness.machine import synchronize


def _parameters() -> Iterator[Any]:
    for op in results.OPS:
        for case in importlib.import_module(f"benchmarks.ops.{op}").cases():
            for variant in (OURS, *usual(case)):
                yield pytest.param(case, variant, id=f"{op}-{case}-{variant}")


@pytest.mark.parametrize(("case", "variant"), list(_parameters()))
def test_op(benchmark: Callable[..., Any], case: Case, variant: str) -> None:
    """Time one variant of one case; one that does not run here is skipped with the reason."""
    benchmark.group = f"{case.op} {case}"  # type: ignore[attr-defined]
    with torch.inference_mode():
        variants, notes = variants_of(case, [] if variant == OURS else [variant])
        chosen, failed = working({variant: variants[variant]} if variant in variants else {})
        if variant not in chosen:
            pytest.skip((notes | failed)[variant])
        benchmark(lambda: (chosen[variant](), synchronize()))
