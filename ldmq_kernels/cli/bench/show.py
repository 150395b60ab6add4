"""The tables of `ldmq bench --op`: one for each op, with as many columns as the terminal holds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console

from ldmq_kernels.cli.bench.earlier import key_of
from ldmq_kernels.cli.bench.measure import Ceilings, Result
from ldmq_kernels.cli.fitted import Column, print_fitted

COLUMNS = (
    Column("shape", is_number=False),
    Column("backend", is_number=False),
    Column("tile", rank=3, is_number=False),
    Column("ms", rank=0),
    Column("noise", rank=0),
    Column("TOPS", rank=2),
    Column("GB/s", rank=5),
    Column("of ceiling", rank=4),
    Column("bound", rank=6, is_number=False),
    Column("p20 ms", rank=7),
    Column("p80 ms", rank=7),
)
COMPARED = (Column("earlier ms", rank=4), Column("its noise", rank=1), Column("faster", rank=0))


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits or more, never an exponent; "-" for None."""
    if value is None:
        return "-"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:.{max(0, digits)}f}{unit}"


def share(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def _cells(result: Result) -> list[str]:
    samples = result.samples
    return [
        result.case.label,
        result.backend,
        result.tile or "-",
        number(samples.median),
        share(samples.noise),
        number(result.tops),
        number(result.gbps),
        share(result.shares[result.bound]),
        result.bound,
        number(samples.p20),
        number(samples.p80),
    ]


def _compared(result: Result, earlier: Mapping[Hashable, Mapping[str, Any]]) -> list[str]:
    row = earlier.get(key_of(result.as_dict()))
    if row is None:
        return ["-", "-", "-"]
    ratio = number(row["p50_ms"] / result.samples.median, "x")
    return [number(row["p50_ms"]), share(row["noise"]), ratio]


def print_results(
    console: Console,
    results: Sequence[Result],
    earlier: Mapping[Hashable, Mapping[str, Any]] | None,
) -> None:
    """Print a table for each op.

    Args:
        console: where to.
        results: in the order of their ops.
        earlier: the rows of another run by `key_of`, to compare with; None for none.
    """
    for op, group in groupby(results, key=lambda result: result.case.op):
        found = list(group)
        columns = COLUMNS if earlier is None else COLUMNS + COMPARED
        rows = [_cells(one) + ([] if earlier is None else _compared(one, earlier)) for one in found]
        used = [index for index, column in enumerate(columns) if column.title != "tile" or any(r.tile for r in found)]
        case = found[0].case
        epilogue = f", epilogue {', '.join(case.epilogue)}" if case.epilogue else ""
        title = f"{op}, {str(case.dtype).removeprefix('torch.')}, {found[0].cache} cache{epilogue}"
        picked = [[row[index] for index in used] for row in rows]
        left_out = print_fitted(console, title, [columns[index] for index in used], picked)
        if left_out:
            wide = "for want of width; a wider terminal, --json and --csv have all"
            console.print(f"left out: {', '.join(left_out)}, {wide}", markup=False, highlight=False)


def print_legend(console: Console, ceilings: Ceilings, rounds: int, is_compared: bool) -> None:
    """Say what the columns mean, and what the ceilings of this run were."""
    lines = [
        f"ms is the median of {rounds} rounds in turns; noise is half of p80 - p20, as a share of it.",
        "GB/s counts every operand and result once. A ceiling is what torch reached in this run: "
        f"{number(ceilings.tops)} TOPS by {ceilings.matmul} and {number(ceilings.gbps)} GB/s by {ceilings.copy}; "
        "the share is of the nearer one. Int8 may exceed the ceiling of floats, and a warm cache that of a copy.",
    ]
    if is_compared:
        lines.append("faster is the earlier ms over this one: above 1x this run is faster.")
    for line in lines:
        console.print(line, markup=False, highlight=False)
