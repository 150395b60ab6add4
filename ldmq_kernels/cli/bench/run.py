"""`ldmq bench --op`: ops at shapes of the user's own, by every backend or by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldmq_kernels.cli.bench.backends import backends_of
from ldmq_kernels.cli.bench.cases import EPILOGUES, Case, cases_of
from ldmq_kernels.cli.bench.earlier import is_json, is_table, json_of, read_rows, table_of
from ldmq_kernels.cli.bench.measure import measure_case, measure_ceilings
from ldmq_kernels.cli.bench.show import print_legend, print_results
from ldmq_kernels.cli.fitted import output_console
from ldmq_kernels.files import output_file
from ldmq_kernels.progress import track


@dataclass(frozen=True)
class BenchRequest:
    """What `ldmq bench --op` is asked for.

    Attributes:
        ops: names of ops.
        shapes: texts, each for all of the ops; the usual shape of each op where there is none.
        backends: names; all that serve the device where there is none.
        tile: the name of a tile that the only backend is to take.
        dtype: the name of a float dtype; float16 on a GPU and float32 on a CPU where it is None.
        epilogue: of `EPILOGUES`; none of them for "none".
        cache: "cold" or "warm"; cold on a GPU and warm on a CPU where it is None.
        kernel, stride: of convolutions.
        rounds: samples of each backend.
        json, csv: files to write.
        compare: a file that an earlier run wrote to `json`.
    """

    ops: Sequence[str]
    shapes: Sequence[str] = ()
    backends: Sequence[str] = ()
    tile: str | None = None
    dtype: str | None = None
    epilogue: Sequence[str] = ()
    cache: str | None = None
    kernel: int = 3
    stride: int = 1
    rounds: int = 25
    json: Path | None = None
    csv: Path | None = None
    compare: Path | None = None


def _work(request: BenchRequest, dtype: torch.dtype, device: torch.device) -> list[tuple[Case, list[str]]]:
    """The cases with the backends that are to be measured, everything that was asked for being checked."""
    for name in request.epilogue:
        if name not in EPILOGUES:
            raise ValueError(f"--epilogue {name}: choose among {', '.join(EPILOGUES)}")
    work = []
    for op in request.ops:
        cases = cases_of(op, request.shapes, dtype, request.epilogue, request.kernel, request.stride)
        backends = backends_of(op, request.backends, device)
        work += [(case, backends) for case in cases]
    if request.tile is not None and len(request.backends) != 1:
        raise ValueError(f"--tile {request.tile}: a tile belongs to one backend, give a single --backend")
    return work


def _place(
    path: Path | None, is_older: Callable[[Path], bool], kind: str
) -> contextlib.AbstractContextManager[Callable[[bytes], None] | None]:
    """The place of a file that is asked for, reserved before anything is measured."""
    return contextlib.nullcontext() if path is None else output_file(path, is_older, kind)


def run_op_bench(request: BenchRequest) -> None:
    """Measure, print the tables and write the files.

    Raises:
        ValueError: something that is asked for does not exist, or nothing could be measured; the text lists what is
            accepted.
        OSError: a file that is asked for cannot be written, or its place holds something else.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = device.type == "cuda"
    dtype: torch.dtype = getattr(torch, request.dtype or ("float16" if is_gpu else "float32"))
    cache = request.cache or ("cold" if is_gpu else "warm")
    work = _work(request, dtype, device)
    earlier, differences = read_rows(request.compare, device) if request.compare else (None, [])
    console = output_console()
    with contextlib.ExitStack() as places:
        write_json = places.enter_context(_place(request.json, is_json, "file of `ldmq bench --json`"))
        write_csv = places.enter_context(_place(request.csv, is_table, "file of `ldmq bench --csv`"))
        ceilings = measure_ceilings(device, dtype)
        results, refused = [], []
        for case, backends in track(work, "shapes", len(work), show=True):
            found, refusals = measure_case(case, backends, request.tile, cache, request.rounds, device, ceilings)
            results += found
            refused += [f"{case.op} at {case.label} was not measured on {n}: {why}" for n, why in refusals.items()]
        if not results:
            raise ValueError("; ".join(refused))
        if write_json:
            write_json(json_of(results, ceilings, device))
        if write_csv:
            write_csv(table_of(results))
    print_results(console, results, earlier)
    print_legend(console, ceilings, request.rounds, is_compared=earlier is not None)
    for line in [*refused, *(f"the earlier run differs: {difference}" for difference in differences)]:
        console.print(line, markup=False, highlight=False)
