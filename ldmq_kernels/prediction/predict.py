"""What each operation of a call takes at least, and is expected to take, on a device of the table.

    products     what waves, the loop's ceiling and the memory allow, whichever is longest
    attention    products and exponentials one after the other, in 16 bit by a fused kernel
    the rest     the start of each kernel, and its bytes at the rate of a copy

Each kernel adds the gap to the next one in a replayed CUDA graph. It is shorter before a kernel that is launched while
the one in front of it still runs (programmatic dependent launch, which `ldmq doctor` allows where it is right and no
slower): `early_milliseconds` has the call with it. "compiled" is the rival: every product in 16 bit by the libraries,
and what lies between two of them in as few kernels as torch's Inductor makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.kernels.dependent_launch import FROM as EARLY_FROM
from ldmq_kernels.kernels.devices import Device
from ldmq_kernels.ops import specs
from ldmq_kernels.prediction.gemms import GemmTime, by_cuda, by_library, by_triton, rate_of
from ldmq_kernels.prediction.launches import early_of, launches_of
from ldmq_kernels.prediction.recorded import ATTENTION, Operation

Backend = Literal["triton", "cuda", "compiled"]
BACKENDS: tuple[Backend, ...] = ("triton", "cuda", "compiled")
COPY_SHARE = 0.9  # of the data sheet's bandwidth that a large copy reaches; assumed, 2026-11-29
START_MS = 1.7e-3  # of a kernel that moves bytes: until its loads come, and its last programs; assumed, 2026-11-29
GAP_MS = 0.9e-3  # from one kernel of a replayed graph to the next; assumed, 2026-11-29
EARLY_GAP_MS = 0.45e-3  # to one that is there already, and waits; assumed, 2026-11-30
EXPONENTIALS = 16  # of a multiprocessor in a clock, by its special function units
HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # to which fused attention pads
NORMS = ("group_norm", "layer_norm")
LINEAR, CONVOLUTION, ATTENTIONS, REST, GAPS = "linear", "convolution", "attention", "norms and the rest", "gaps"


@dataclass(frozen=True)
class Predicted:
    """What one operation, or what is one kernel of several, is expected to take.

    Attributes:
        op, layer, words: what it is, whose, and its sizes.
        kind: by which times are summed up.
        milliseconds: without gaps.
        operations_ms: its operations at the data sheet's rate: no kernel is faster.
        bytes_ms: its tensors at the data sheet's bandwidth.
        launches: kernels.
        served_by: the backend that computes it: "triton" or "cuda", "torch" for an operation of torch's own.
        gemm: how the product is cut; None for other operations.
        early: kernels that may be launched before the one in front of them has ended.
    """

    op: str
    layer: str
    words: str
    kind: str
    milliseconds: float
    operations_ms: float
    bytes_ms: float
    launches: int
    served_by: str = "torch"
    gemm: GemmTime | None = None
    early: int = 0


@dataclass(frozen=True)
class Prediction:
    """A call's operations on a device by a backend."""

    device: Device
    backend: Backend
    rows: Sequence[Predicted]

    @property
    def launches(self) -> int:
        """Kernels of the call."""
        return sum(row.launches for row in self.rows)

    @property
    def by_kind(self) -> dict[str, float]:
        """Milliseconds of each kind of operation, and of the gaps between kernels."""
        sums = dict.fromkeys((LINEAR, CONVOLUTION, ATTENTIONS, REST), 0.0)
        for row in self.rows:
            sums[row.kind] += row.milliseconds
        return sums | {GAPS: GAP_MS * self.launches}

    @property
    def milliseconds(self) -> float:
        """Of the whole call."""
        return sum(self.by_kind.values())

    @property
    def early_milliseconds(self) -> float:
        """Of the whole call with dependent launches; the same where the device or the backend has none."""
        early = sum(row.early for row in self.rows) if self.device.capability >= EARLY_FROM else 0
        return self.milliseconds - (GAP_MS - EARLY_GAP_MS) * early


def predict(operations: Iterable[Operation], device: Device, backend: Backend) -> Prediction:
    """Times of a recorded call.

    Args:
        operations: of a quantized model for "triton" and "cuda", of a float one for "compiled".
        device: of the table of data sheets.
        backend: who computes; what "cuda" refuses or does not have is Triton's, as each row's `served_by` says.
    """
    rows: list[Predicted] = []
    between: list[Operation] = []
    last_read = _last_reads(operations := list(operations))
    for position, operation in enumerate(operations):
        if operation.gemm is None and operation.op != ATTENTION:
            if backend == "compiled":
                between.append(operation)
            else:
                rows.append(_moved(operation, device, backend))
            continue
        rows += _fused(between, device, last_read, position)
        between = []
        rows.append(_attended(operation, device) if operation.gemm is None else _multiplied(operation, device, backend))
    rows += _fused(between, device, last_read, len(operations))
    return Prediction(device, backend, rows)


def _bytes_ms(count: float, device: Device) -> float:
    return count / (device.bandwidth * 1e6)


def _multiplied(operation: Operation, device: Device, backend: Backend) -> Predicted:
    gemm, op = operation.gemm, operation.op
    assert gemm is not None
    quantizes_alone = 0.0
    if "_" not in op:  # torch's own
        time, tops, server = by_library(gemm, device), device.half_tops, "torch"
    else:
        tops = rate_of(op, device)
        is_static = op == "linear_static_w8a8"
        served = by_cuda("linear_w8a8" if is_static else op, gemm, device) if backend == "cuda" else None
        in_two = is_static and (served is not None or launches_of(operation, "triton") > 1)
        time = served or by_triton("linear_w8a8" if in_two else op, gemm, device)
        server = "cuda" if served else "triton"
        if in_two:
            quantizes_alone = START_MS + _bytes_ms(3 * gemm.m * gemm.k, device) / COPY_SHARE
    least_ops, least_bytes = gemm.operations / (tops * 1e9), _bytes_ms(operation.bytes, device)
    taken = max(device.milliseconds(time.clocks), least_ops, least_bytes / COPY_SHARE) + quantizes_alone
    kind = CONVOLUTION if op.startswith("conv") else LINEAR
    launches = time.launches + (quantizes_alone > 0)
    words, early = str(gemm), early_of(op, server, launches)
    return Predicted(op, operation.layer, words, kind, taken, least_ops, least_bytes, launches, server, time, early)


def _attended(operation: Operation, device: Device) -> Predicted:
    *batch, queries, width = operation.facts["query"]
    keys, value_width = operation.facts["key"][-2], operation.facts["value"][-1]
    heads = 1
    for size in batch:
        heads *= size
    padded = next((known for known in HEAD_DIMS if known >= width), width)
    pairs = heads * queries * keys
    least_ops = 2 * pairs * (width + value_width) / (device.half_tops * 1e9)
    products = 4 * pairs * padded / (device.half_tops * 1e9)
    exponentials = device.milliseconds(pairs / (EXPONENTIALS * device.multiprocessors))
    least_bytes = _bytes_ms(operation.bytes, device)
    taken = START_MS + max(products + exponentials, least_bytes / COPY_SHARE)
    words = f"{heads} x {queries}x{keys}x{width}"
    return Predicted(operation.op, operation.layer, words, ATTENTIONS, taken, least_ops, least_bytes, 1)


def _moved(operation: Operation, device: Device, backend: Literal["triton", "cuda"]) -> Predicted:
    op, least, launches = operation.op, _bytes_ms(operation.bytes, device), launches_of(operation, backend)
    taken = START_MS * launches + least / COPY_SHARE
    ours = [name for name in (backend, "triton") if op in specs() and backends()[name].has(op)]
    server = ours[0] if ours else "torch"
    words, early = f"{operation.bytes / 1e6:.3g} MB", early_of(op, server, launches)
    return Predicted(op, operation.layer, words, REST, taken, 0.0, least, launches, server, early=early)


def _last_reads(operations: Sequence[Operation]) -> dict[int, int]:
    return {tensor: position for position, operation in enumerate(operations) for tensor in operation.reads}


def _fused(between: list[Operation], device: Device, last_read: dict[int, int], until: int) -> list[Predicted]:
    """What lies between two products, in one kernel and one more for each norm, whose statistics come first."""
    if not between:
        return []
    made = {tensor for operation in between for tensor in operation.writes}
    reads = {t: size for operation in between for t, size in operation.reads.items() if t not in made}
    kept = {
        t: size for operation in between for t, size in operation.writes.items() if last_read.get(t, until) >= until
    }
    norms = sum(operation.op in NORMS for operation in between)
    count = sum(reads.values()) + sum(kept.values())
    least = _bytes_ms(count, device)
    launches = 1 + norms
    taken = START_MS * launches + least / COPY_SHARE
    op = "+".join(dict.fromkeys(operation.op for operation in between))
    return [Predicted(op, between[-1].layer, f"{count / 1e6:.3g} MB", REST, taken, 0.0, least, launches)]
