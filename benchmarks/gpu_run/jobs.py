"""What a run on a GPU machine consists of, in order of value, with the seconds that each job may take.

`PROVE` fits into `PROVE_SECONDS`: every kernel in a process of its own, then SDXL, so that its milliseconds are known
whatever else fails. `MEASURE` fits into `MEASURE_SECONDS`, and needs nothing of `PROVE` but what that wrote to
tuned.json. "expected" seconds are assumptions for one H200 with 16 cores, not measurements; a test runs both lists
against a clock that is made of them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

PROVE_SECONDS, MEASURE_SECONDS = 240.0, 480.0
PREBUILT_SECONDS = 5.0  # of "CUDA kernels" where they came along
HEADLINE = "SDXL by Triton"  # the first job of `PROVE` whose row has SDXL's milliseconds
AFTER_BUILD = ("CUDA kernels",)
BENCHMARKS = ("-m", "benchmarks")
ROWS = ("--rows", "{rows}")


def _installed(module: str, *options: str) -> tuple[str, ...]:
    return options if importlib.util.find_spec(module) is not None else ()


# a worker whose GPU is unusable ends, and pytest-xdist starts another one
PYTEST = (
    *("-m", "pytest", "-v", "--maxfail=20", "--no-header", "-p", "no:cacheprovider"),
    *_installed("xdist", "-n", "8"),
    *_installed("pytest_timeout", "--timeout", "25", "--timeout-method", "thread"),
)
OPS_TESTS = ("python_tests/kernels", "--ignore=python_tests/kernels/cpu", "--ignore=python_tests/kernels/cuda")


@dataclass(frozen=True)
class Job:
    """A process of Python's.

    Attributes:
        name: in the state and the log.
        command: arguments of Python; {rows}, {trace} and {kernels} stand for files of the run.
        limit: the most seconds that it may take; it is killed then.
        expected: seconds that it is assumed to take.
        always: whether it runs again in every run, since a new machine has lost what it leaves.
        background: whether the jobs after it start at once.
        after: names of jobs in the background that it waits for, however they end.
        goes_on: whether it is started again after a failure, as long as it adds rows or measured tiles.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    expected: float
    always: bool = False
    background: bool = False
    after: tuple[str, ...] = ()
    goes_on: bool = False


def _op(name: str, limit: float = 40, expected: float = 25) -> Job:
    return Job(name, (*BENCHMARKS, "op", name, *ROWS), limit, expected, after=AFTER_BUILD)


def _model(name: str, limit: float, expected: float) -> Job:
    rivals = "graph_fp16,compiled_fp16,torchao_fp8_compiled"
    command = (*BENCHMARKS, "model", name, "--against", rivals, *ROWS)
    return Job(f"model {name}", command, limit, expected, after=AFTER_BUILD)


def _sdxl_by(backend: str, title: str, limit: float, expected: float) -> Job:
    command = (*BENCHMARKS, "model", "sdxl", "--by", backend, "--against", "graph_fp16", *ROWS, "--trace", "{trace}")
    return Job(f"SDXL by {title}", command, limit, expected, after=AFTER_BUILD if backend == "cuda" else ())


def _smoke(title: str, backend: str, limit: float, expected: float, *, after: tuple[str, ...] = ()) -> Job:
    command = (*BENCHMARKS, "smoke", "--backend", backend, "--seconds", f"{limit - 5:.0f}", *ROWS)
    return Job(f"every kernel of {title}", command, limit, expected, after=after)


PREPARATION = (
    Job("packages", (*BENCHMARKS, "gpu", "--install"), 20, 4, always=True),
    Job("CUDA kernels", (*BENCHMARKS, "gpu", "--build", "{kernels}"), 150, 75, always=True, background=True),
    Job("device", (*BENCHMARKS, "device", *ROWS), 15, 6, always=True),
)
PROVE = (
    *PREPARATION,
    _smoke("Triton", "triton", 60, 45),
    _smoke("CUDA", "cuda", 30, 20, after=AFTER_BUILD),
    Job("sanitizer", (*BENCHMARKS, "sanitizer", "--seconds", "20", *ROWS), 25, 20, after=AFTER_BUILD),
    _sdxl_by("triton", "Triton", 75, 45),
    _sdxl_by("cuda", "CUDA", 40, 25),
    Job("early launches", (*BENCHMARKS, "early-launches", *ROWS), 60, 40, after=AFTER_BUILD),
    Job("ceilings", (*BENCHMARKS, "machine", "ceilings", *ROWS), 30, 12),
)
MEASURE = (
    *PREPARATION,
    Job(
        "compile ahead",
        (*BENCHMARKS, "smoke", "--tuning", "--seconds", "60", "--workers", "15", *ROWS),
        70,
        60,
        always=True,
        after=AFTER_BUILD,
    ),
    Job("tuning", (*BENCHMARKS, "smoke", "--tune", "--seconds", "90"), 100, 90, after=AFTER_BUILD, goes_on=True),
    _model("sdxl", 120, 95),
    _model("sd15", 60, 50),
    _op("linear_w8a8", 60, 40),
    _op("conv2d_w8a8", 60, 40),
    Job("ceilings", (*BENCHMARKS, "machine", "ceilings", *ROWS), 30, 12),
    _model("vae_decoder", 60, 50),
    *(_op(name) for name in ("group_norm_silu_quantize", "layer_norm_quantize", "geglu_quantize", "gelu_quantize")),
    Job(
        "truth on the GPU",
        (*PYTEST, "-m", "gpu", "python_tests/gpu", "python_tests/kernels/cuda"),
        120,
        100,
        after=AFTER_BUILD,
    ),
    Job("doctor", ("-m", "ldmq_kernels", "doctor"), 100, 60, after=AFTER_BUILD),
    *(_op(name) for name in ("linear_fp8", "conv2d_fp8", "linear_w4a8", "conv2d_w4a8", "linear_static_w8a8")),
    *(_op(name) for name in ("linear_geglu_w8a8", "linear_geglu_fp8")),
    *(_op(name) for name in ("quantize_per_token", "quantize_static", "quantize_per_sample", "silu_quantize")),
    *(_op(name) for name in ("rotate_quantize_per_token", "rotate_quantize_per_sample")),
    *(_op(name) for name in ("linear_w8a16", "conv2d_w8a16", "linear_w4a16")),
    Job("host time", (*BENCHMARKS, "machine", "host_time", *ROWS), 30, 15, after=AFTER_BUILD),
    Job("cold start", (*BENCHMARKS, "cold-start", *ROWS), 120, 80, after=AFTER_BUILD),
    Job(
        "ops on the GPU", (*PYTEST, *OPS_TESTS, "-k", "(triton or cuda) and not compiles"), 300, 200, after=AFTER_BUILD
    ),
)
LISTS = {"prove": (PROVE, PROVE_SECONDS), "measure": (MEASURE, MEASURE_SECONDS)}
