"""One shape of one op, measured by our backends and its baselines in turns, and what many of these say."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.clocks import sampled
from benchmarks.harness.machine import device, int8_peak, synchronize
from benchmarks.harness.timing import Call, Variants, interleaved
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import backends, usual_order
from ldmq_kernels.timing import ROUNDS, Samples

LARGE_BYTES = 32 * 2**20  # from here on a memory-bound op is measured by its share of a copy's bandwidth
OURS = "ldmq"
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One shape of one op: `make` gives "ldmq" and every baseline as calls, over operands that they share.

    A baseline that costs memory or time to set up does so in its first call (`baselines.lazily`).

    Attributes:
        baselines: names of what it is measured beside, on devices where that is usual.
        on_request: names of what it is measured beside only where asked for.
        work: billions of operations (2 for a multiply and add) of a GEMM or convolution, or 0.
        moved: bytes that our op has to read and write.
        input_bytes: bytes of the tensor that the baseline "copy" copies, or 0.
    """

    op: str
    shape: dict[str, int]
    count: int
    baselines: tuple[str, ...]
    make: Callable[[], Variants]
    work: float = 0.0
    moved: int = 0
    input_bytes: int = 0
    on_request: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(f"{key}{value}" for key, value in self.shape.items())


def served_by(op: str, call: Call) -> str:
    """The backend that serves an op in a call: the first may refuse the shape, and another may be measured faster."""
    dispatch.reset_dispatch_report()
    call()
    lines = (line.split() for line in dispatch.dispatch_report().splitlines())
    return next(backend for name, backend, what, *_ in lines if name == op and what != "refused")


def own_backends(op: str) -> tuple[str, ...]:
    """Our backends that have an op on this device, the one that usually serves in front."""
    usual_first = dict.fromkeys((*usual_order(device()), *backends()))
    served = [backends()[name] for name in usual_first]
    return tuple(backend.name for backend in served if backend.serves(device()) and backend.has(op))


def accepted(case: Case) -> tuple[str, ...]:
    """Every name that `--against` takes for a case."""
    return (*own_backends(case.op), *case.baselines, *case.on_request)


def usual(case: Case) -> tuple[str, ...]:
    """What a case is measured beside where nothing is asked for: on a GPU our backends too, where there are several."""
    backends = [name for name in own_backends(case.op) if name != "reference"]
    several = tuple(backends) if len(backends) > 1 else ()
    return (*several, *(name for name in case.baselines if device().type in BASELINES[name].usual_on))


def variants_of(case: Case, against: Collection[str]) -> tuple[Variants, dict[str, str]]:
    """Our op and the named backends and baselines as calls, and why some of these cannot be measured here."""
    made = case.make()

    def by(backend: str) -> Any:
        with dispatch.use_backend(backend):
            return made[OURS]()

    variants = {OURS: made[OURS]}
    notes = {}
    for name in against:
        why = BASELINES[name].missing() if name in BASELINES else None
        if why is not None:
            notes[name] = why
        elif name in made:
            variants[name] = made[name]
        else:
            variants[name] = functools.partial(by, name)
    return variants, notes


def working(variants: Variants, needed: Collection[str] = (OURS,)) -> tuple[Variants, dict[str, str]]:
    """The variants that run here, each called once, and why the others do not.

    Raises:
        Exception: whatever a variant in `needed` raises.
    """
    kept: Variants = {}
    notes: dict[str, str] = {}
    for name, call in variants.items():
        try:
            call()
            synchronize()
        except Exception as error:
            if name in needed:
                raise
            notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        kept[name] = call
    return kept, notes


def measure(
    cases: Iterable[Case], rounds: int = ROUNDS, against: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each case as soon as it is measured, its variants interleaved, with the GPU's state meanwhile."""
    for case in cases:
        with torch.inference_mode():
            variants, missing = variants_of(case, usual(case) if against is None else against)
            kept, failed = working(variants)
            with sampled() as state:
                times = interleaved(kept, rounds)
            backend = served_by(case.op, kept[OURS])
        yield row(case, backend, times, missing | failed) | state


def row(case: Case, backend: str, times: dict[str, Samples], notes: dict[str, str]) -> dict[str, Any]:
    """One row of a results file; a ratio above 1 means that ours is faster.

    Args:
        backend: of ours, the one that served.
        notes: why a baseline is missing.
    """
    ours = times[OURS]
    rivals = {  # the field's name in results files
        name: {"ms": each.median, "p20": each.p20, "p80": each.p80, "ratio": each.median / ours.median}
        for name, each in times.items()
        if name != OURS
    }
    speed: dict[str, Any] = {"gbps": case.moved / ours.median / 1e6} if case.moved else {}
    if case.work:
        speed["tops"] = case.work / ours.median
        peak = int8_peak()
        if peak and case.op.endswith("a8"):
            speed["share_of_peak"] = case.work / ours.median / peak
    if case.input_bytes and "copy" in times:
        copied = 2 * case.input_bytes  # a copy reads and writes its input
        speed["share_of_copy_bandwidth"] = (case.moved / ours.median) / (copied / times["copy"].median)
    found = {"op": case.op, "shape": case.shape, "count": case.count, "backend": backend}
    found |= {"ms": ours.median, "p20": ours.p20, "p80": ours.p80, **speed}
    return found | {"rivals": rivals} | ({"notes": notes} if notes else {})


# -- of many rows ------------------------------------------------------------------------------------------


def one_of_each(shapes: Iterable[T], key: Callable[[T], Hashable | None]) -> list[T]:
    """The first shape of each key; those with the key None are left out."""
    found: dict[Hashable, T] = {}
    for shape in shapes:
        name = key(shape)
        if name is not None:
            found.setdefault(name, shape)
    return list(found.values())


def geometric_mean(rows: list[dict[str, Any]], baseline: str) -> float | None:
    """Mean ratio to a baseline, weighted by how often a model calls the shape; None where it did not run."""
    pairs = [(r["count"], r["rivals"][baseline]["ratio"]) for r in rows if baseline in r["rivals"]]
    calls = sum(count for count, _ in pairs)
    return math.exp(sum(count * math.log(ratio) for count, ratio in pairs) / calls) if calls else None


def cuda_over_triton(op: str, rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The weighted ratio of Triton's time to the CUDA backend's, where both were measured."""
    cuda, triton = geometric_mean(rows, "cuda"), geometric_mean(rows, "triton")
    return {f"{op}_cuda/geomean_vs_triton": triton / cuda if cuda and triton else None}


def producer_summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The least share of a copy's bandwidth over large tensors, and the weighted ratio to eager torch."""
    shares = [
        row["share_of_copy_bandwidth"]
        for row in rows
        if "share_of_copy_bandwidth" in row and row["gbps"] * row["ms"] * 1e6 >= LARGE_BYTES
    ]
    return {
        "producers/worst_share_of_copy_bandwidth": min(shares, default=None),
        "producers/geomean_vs_eager": geometric_mean(rows, "eager"),
    }
