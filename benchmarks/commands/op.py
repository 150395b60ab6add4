"""One op by each of our backends, beside other libraries: python -m benchmarks op linear_w8a8 --against int_mm,fp8

All are measured in turns in one run, at the shapes that the models have or at one of your own.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import machine, results
from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.cases import OURS, Case, accepted, measure
from benchmarks.harness.shapes import CONV2D, IMAGE, LINEAR, TOKENS
from benchmarks.harness.tables import aligned, markdown
from ldmq_kernels.timing import ROUNDS

GEOMETRY = ("kernel", "stride", "upsample")


def names(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def cases_of(op: str, written: Sequence[str], against: Sequence[str] | None, geometry: Mapping[str, int]) -> list[Case]:
    """The cases of an op at the shapes that are written, or at the models'.

    Args:
        geometry: kernel, stride and upsample of a convolution whose shape is written, as far as they are given.

    Raises:
        ValueError: there is no such op, the shape is not one of its kind, or a name is no baseline of it.
    """
    if op not in results.OPS:
        raise ValueError(f"there is no op {op}: there are {', '.join(results.OPS)}")
    module = importlib.import_module(f"benchmarks.ops.{op}")
    if geometry and (module.SHAPE is not CONV2D or not written):
        raise ValueError(f"--{next(iter(geometry))} goes with the --shape of a convolution")
    own = [replace(module.SHAPE.parse(text), **geometry) for text in written]
    cases = [module.case(shape) for shape in own] or list(module.cases())
    known = accepted(cases[0])
    unknown = [name for name in against or () if name not in known]
    if unknown:
        raise ValueError(f"{op} is not measured beside {', '.join(unknown)}; it is beside {', '.join(known)}")
    return cases


def table(data: dict[str, Any]) -> str:
    """All rows of an op, for the pages."""
    lines = []
    for row in data["rows"]:
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        share = row.get("share_of_peak") or row.get("share_of_copy_bandwidth")
        speed = f"{row['tops']:.0f} TOPS" if "tops" in row else f"{row['gbps']:.0f} GB/s"
        ratios = ", ".join(f"{name} {each['ratio']:.2f}x" for name, each in row["rivals"].items())
        lines.append([shape, str(row["count"]), f"{row['ms']:.3f}", speed, f"{share:.0%}" if share else "", ratios])
    header = ["shape", "calls", "ms", "speed", "of the peak or a copy", "times as fast as"]
    return f"**{data['rows'][0]['op']}**\n\n" + markdown(header, lines)


def text(row: dict[str, Any], work: float) -> str:
    """A row of results as a table for a terminal: our op first, then the others from the fastest on.

    Args:
        work: billions of operations of a GEMM or convolution, or 0, which leaves out the rate.
    """
    header, rate = ["", "ms", "p20 to p80"], ["TOPS"] if work else []
    own = [f"{OURS} ({row['backend']})", *_times(row), *_rate(row, work), f"{row['gbps']:.3g}", ""]
    lines = [own]
    for name, each in sorted(row["rivals"].items(), key=lambda pair: pair[1]["ms"]):
        lines.append([name, *_times(each), *_rate(each, work), "", f"{each['ratio']:.2f}x as fast"])
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    notes = [f"{name} is left out: {why}" for name, why in row.get("notes", {}).items()]
    columns = aligned([*header, *rate, "GB/s", "ldmq is"], lines, left=1)
    return "\n".join([f"{row['op']}, {shape}", columns, *notes])


def _times(times: dict[str, Any]) -> tuple[str, str]:
    digits = 2 if times["ms"] >= 10 else 4
    return f"{times['ms']:.{digits}f}", f"{times['p20']:.{digits}f} to {times['p80']:.{digits}f}"


def _rate(times: dict[str, Any], work: float) -> list[str]:
    return [f"{work / times['ms']:.3g}"] if work else []


def parser() -> argparse.ArgumentParser:
    """The options, with all names that they take."""
    known = "\n".join(f"  {name:20}{baseline.what}" for name, baseline in BASELINES.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks op",
        description=__doc__,
        epilog=f"ops:\n  {', '.join(results.OPS)}\n\nwhat ops are measured beside, apart from our backends:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("op")
    made.add_argument("--against", type=names, metavar="NAMES", help="baselines and backends, with commas between")
    made.add_argument(
        "--shape",
        action="extend",
        type=names,
        default=[],
        help=f"{LINEAR} of a linear, {CONV2D} of a convolution, {TOKENS} or {IMAGE} of an op that quantizes; several "
        "with commas; without, the models' shapes",
    )
    for name in GEOMETRY:
        made.add_argument(f"--{name}", type=int, help="of a convolution whose shape is given")
    made.add_argument("--device", choices=("cpu", "cuda"), help="without: the GPU where there is one")
    made.add_argument("--rounds", type=int, default=ROUNDS, help="calls of each that are timed")
    made.add_argument("--threads", type=int, help="of torch, on a CPU")
    results.add_options(made)
    return made


def main(arguments: list[str]) -> None:
    """Print a table for each shape as soon as it is measured, and keep the rows where the options say."""
    options_of = parser()
    options = options_of.parse_args(arguments)
    geometry = {name: value for name in GEOMETRY if (value := getattr(options, name)) is not None}
    try:
        if options.device:
            machine.use_device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        cases = cases_of(options.op, options.shape, options.against, geometry)
    except ValueError as error:
        options_of.error(str(error))
    record = machine.machine()
    print(f"{record['device']}, torch {record['torch']}; median of {options.rounds} rounds, all in turns\n", flush=True)
    output = results.Output.of(options.op, options)
    for case in cases:
        for row in measure([case], options.rounds, options.against):
            output.add(row)
            print(text(row, case.work) + "\n", flush=True)
    print(*output.files, sep="\n", end="")
