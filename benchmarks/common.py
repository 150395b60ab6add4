"""What every benchmark shares: interleaved medians, rows, and the results file."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from benchmarks.machine import device, gpu_state, int8_peak, machine
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.timing import one_call_ms

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
LARGE_BYTES = 32 * 2**20  # from here on a memory-bound op is measured by its share of a copy's bandwidth
T = TypeVar("T")


def interleaved_ms(variants: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Median milliseconds of each variant, one call of each in turn, after one call to warm up.

    Turns share whatever else the machine does, so ratios hold where absolute times are noisy. On a GPU
    the L2 cache is flushed before each call, and its launches wait for the host.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(one_call_ms(call, device()))
    return {name: statistics.median(values) for name, values in times.items()}


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by Inductor, compiled once for all shapes; more than a few compilations are an error, not eager."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=True)


def synchronize() -> None:
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Variants = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One shape of one op: `make` gives "ldmq" and the rivals as calls, over operands that they share.

    work: billions of operations (2 for a multiply and add) of a product, or 0.
    moved: bytes that have to be read and written, or 0.
    input_bytes: of the tensor that the rival "copy" copies.
    """

    op: str
    shape: dict[str, int]
    count: int
    rivals: tuple[str, ...]
    make: Callable[[], Variants]
    work: float = 0.0
    moved: int = 0
    input_bytes: int = 0

    def __str__(self) -> str:
        return "-".join(f"{key}{value}" for key, value in self.shape.items())


def backend() -> str:
    """The backend that serves this machine's best device first."""
    visible = dispatch.visible_backends()
    return next(name for name in dispatch.PREFERENCE[device().type] if visible[name])


def row(case: Case, ms: dict[str, float], notes: dict[str, str]) -> dict[str, Any]:
    """One row of a results file; a ratio above 1 means that ours is faster. `notes` say why a rival is missing."""
    ours = ms["ldmq"]
    rivals = {name: {"ms": value, "ratio": value / ours} for name, value in ms.items() if name != "ldmq"}
    speed: dict[str, Any] = {"tops": case.work / ours} if case.work else {"gbps": case.moved / ours / 1e6}
    peak = int8_peak()
    if case.work and peak and case.op.endswith("a8"):
        speed["share_of_peak"] = case.work / ours / peak
    if case.moved and "copy" in ms:
        copied = 2 * case.input_bytes  # a copy reads and writes its input
        speed["share_of_copy_bandwidth"] = (case.moved / ours) / (copied / ms["copy"])
    found = {"op": case.op, "shape": case.shape, "count": case.count, "backend": backend(), "ms": ours, **speed}
    return found | {"rivals": rivals} | ({"notes": notes} if notes else {})


def own_backends(op: str) -> tuple[str, ...]:
    """Our backends that are measured one beside the other on a GPU; "ldmq" is whichever of them serves."""
    if not torch.cuda.is_available():
        return ()
    backends = {name: importlib.import_module(f"ldmq_kernels.kernels.{name}") for name in ("triton", "cuda")}
    have = tuple(name for name, module in backends.items() if module.serves(device()) and hasattr(module, op))
    return have if len(have) > 1 else ()


def with_own_backends(case: Case) -> Variants:
    """What the case makes, and "ldmq" by each of our backends."""
    variants = case.make()

    def by(name: str) -> Any:
        with dispatch.use_backend(name):
            return variants["ldmq"]()

    return variants | {name: functools.partial(by, name) for name in own_backends(case.op)}


def cuda_over_triton(op: str, rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The weighted ratio of Triton's time to the CUDA backend's, where both were measured."""
    cuda, triton = geometric_mean(rows, "cuda"), geometric_mean(rows, "triton")
    return {f"{op}_cuda/geomean_vs_triton": triton / cuda if cuda and triton else None}


def working(variants: Variants) -> tuple[Variants, dict[str, str]]:
    """The variants that run here, each called once, and why the others do not; ours has to run."""
    kept: Variants = {}
    notes: dict[str, str] = {}
    for name, call in variants.items():
        try:
            call()
            synchronize()
        except Exception as error:
            if name == "ldmq":
                raise
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        kept[name] = call
    return kept, notes


def measure(cases: Iterable[Case], rounds: int = 9) -> Iterator[dict[str, Any]]:
    """A row for each case as soon as it is measured, its variants interleaved, with the GPU's state after it."""
    for case in cases:
        with torch.inference_mode():
            kept, notes = working(with_own_backends(case))
            measured = interleaved_ms(kept, rounds)
        yield row(case, measured, notes) | gpu_state()


def one_of_each(shapes: Iterable[T], key: Callable[[T], Hashable | None]) -> list[T]:
    """The first shape of each key; those with the key None are left out."""
    found: dict[Hashable, T] = {}
    for shape in shapes:
        name = key(shape)
        if name is not None:
            found.setdefault(name, shape)
    return list(found.values())


def geometric_mean(rows: list[dict[str, Any]], rival: str) -> float | None:
    """Mean ratio to a rival, weighted by how often a model calls the shape; None where it did not run."""
    pairs = [(r["count"], r["rivals"][rival]["ratio"]) for r in rows if rival in r["rivals"]]
    calls = sum(count for count, _ in pairs)
    return math.exp(sum(count * math.log(ratio) for count, ratio in pairs) / calls) if calls else None


def producer_summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The least share of a copy's bandwidth over large tensors, and the weighted ratio to eager torch."""
    shares = [r["share_of_copy_bandwidth"] for r in rows if r.get("gbps") and r["gbps"] * r["ms"] * 1e6 >= LARGE_BYTES]
    return {
        "producers/worst_share_of_copy_bandwidth": min(shares, default=None),
        "producers/geomean_vs_eager": geometric_mean(rows, "eager"),
    }


def benchmark_test(cases: Callable[[], Iterable[Case]]) -> Callable[..., None]:
    """A pytest-benchmark test of every variant of every case, grouped by shape."""

    pairs = [(case, name) for case in cases() for name in ("ldmq", *case.rivals, *own_backends(case.op))]

    @pytest.mark.parametrize(("case", "variant"), pairs, ids=lambda value: str(value))
    def test(benchmark: Any, case: Case, variant: str) -> None:
        benchmark.group = f"{case.op} {case}"
        call = with_own_backends(case)[variant]
        with torch.inference_mode():
            benchmark(lambda: (call(), synchronize()))

    return test


def results_path(what: str, record: dict[str, Any]) -> Path:
    """results/<device>/<date>-<what>.json"""
    folder = "".join(c if c.isalnum() else "-" for c in record["device"].split("(")[0].strip()).lower()
    return RESULTS / folder / f"{record['date']}-{what}.json"


def write_results(
    what: str, rows: list[dict[str, Any]], summary: dict[str, float | None], record: dict[str, Any] | None = None
) -> Path:
    """Write a results file; None is left out of the summary. `record` is of this machine unless given."""
    record = machine() if record is None else record
    path = results_path(what, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in summary.items() if value is not None}
    path.write_text(json.dumps({**record, "rows": rows, "summary": kept}, indent=1) + "\n")
    return path
