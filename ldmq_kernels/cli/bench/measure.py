"""The measurement of `ldmq bench --op`: every backend of a case in turns, beside what this machine reaches at best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ldmq_kernels import ops
from ldmq_kernels.cli.bench.backends import served_by, tile_context
from ldmq_kernels.cli.bench.cases import Case, tensor_bytes
from ldmq_kernels.timing import Clock, Context, Samples, cold_ms, interleaved, warm_ms

CLOCKS: dict[str, Clock] = {"cold": cold_ms, "warm": warm_ms}
CEILING_ROUNDS = 9
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}  # of the square float matrices
COPIED_BYTES = {"cuda": 512 * 2**20, "cpu": 128 * 2**20}  # more than any cache holds


@dataclass(frozen=True)
class Ceilings:
    """What torch reached on this machine in the same run.

    Attributes:
        tops: 10^12 operations a second of a float matrix product.
        gbps: 10^9 bytes a second that a copy reads and writes.
        matmul: the product in words.
        copy: the copy in words.
    """

    tops: float
    gbps: float
    matmul: str
    copy: str


@dataclass(frozen=True)
class Result:
    """One backend at one case.

    Attributes:
        case: what was measured.
        backend: by whom.
        tile: its name where one was forced, else "".
        cache: "cold" or "warm".
        samples: milliseconds.
        moved: bytes of all operands and results.
        ceilings: of the run.
    """

    case: Case
    backend: str
    tile: str
    cache: str
    samples: Samples
    moved: int
    ceilings: Ceilings

    @property
    def tops(self) -> float | None:
        """10^12 operations a second; None of an op without a product."""
        return self.case.operations / self.samples.median / 1e9 if self.case.operations else None

    @property
    def gbps(self) -> float:
        """10^9 bytes of operands and results a second."""
        return self.moved / self.samples.median / 1e6

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the two ceilings, by "compute" and "memory"."""
        compute = {"compute": self.tops / self.ceilings.tops} if self.tops is not None else {}
        return {**compute, "memory": self.gbps / self.ceilings.gbps}

    @property
    def bound(self) -> str:
        """The ceiling that is nearer: "compute" or "memory"."""
        return max(self.shares, key=lambda name: self.shares[name])

    def as_dict(self) -> dict[str, Any]:
        """The row of a file."""
        return {
            "op": self.case.op,
            "shape": self.case.label,
            "backend": self.backend,
            "tile": self.tile,
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "epilogue": ",".join(self.case.epilogue),
            "cache": self.cache,
            "p20_ms": self.samples.p20,
            "p50_ms": self.samples.median,
            "p80_ms": self.samples.p80,
            "noise": self.samples.noise,
            "tops": self.tops,
            "gbps": self.gbps,
            "share_of_ceiling": self.shares[self.bound],
            "bound": self.bound,
        }


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A large float matrix product and a large copy by torch, in turns.

    Args:
        device: where.
        dtype: of the matrices; a CPU, where half precision may be slow, takes float32.
    """
    used = dtype if device.type == "cuda" else torch.float32
    size, length = MATMUL_SIZE[device.type], COPIED_BYTES[device.type]
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(used) for _ in range(2))
    source = torch.ones(length, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"matmul": partial(torch.matmul, a, b), "copy": partial(target.copy_, source)}
    found = interleaved(calls, device, rounds=CEILING_ROUNDS, clock=CLOCKS["warm"])
    name = str(used).removeprefix("torch.")
    return Ceilings(
        2 * size**3 / found["matmul"].median / 1e9,
        2 * length / found["copy"].median / 1e6,
        f"torch's {name} matmul of {size}x{size}x{size}",
        f"a copy of {length / 2**20:.0f} MiB",
    )


@torch.inference_mode()
def measure_case(
    case: Case,
    backends: Sequence[str],
    tile: str | None,
    cache: str,
    rounds: int,
    device: torch.device,
    ceilings: Ceilings,
) -> tuple[list[Result], dict[str, str]]:
    """Time a case by some backends, in turns.

    Args:
        case: the op and its shape.
        backends: their names.
        tile: the name of a tile that the only backend is to take, or None.
        cache: "cold" or "warm".
        rounds: samples of each backend.
        device: where.
        ceilings: what the results are compared with.

    Returns:
        The results, and by backend why it did not take the call.

    Raises:
        ValueError: the backend has no such tile.
    """
    operands = case.operands(device)
    run = partial(getattr(ops, case.op), *operands)
    contexts: dict[str, Context] = {}
    refusals: dict[str, str] = {}
    tiles: dict[str, str] = {}
    outputs: Any = ()
    for name in backends:
        context: Context = partial(served_by, name)
        if tile is not None:
            tiles[name], forced = tile_context(case, name, tile, run, device)
            context = partial(served_by, name, forced)
        try:
            with context():
                outputs = run()
        except RuntimeError as error:
            refusals[name] = str(error)
            continue
        contexts[name] = context
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    moved = tensor_bytes([*operands, *outputs])
    samples = interleaved(dict.fromkeys(contexts, run), device, rounds=rounds, clock=CLOCKS[cache], contexts=contexts)
    results = [
        Result(case, name, tiles.get(name, ""), cache, taken, moved, ceilings) for name, taken in samples.items()
    ]
    return results, refusals
