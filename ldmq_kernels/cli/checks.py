"""`ldmq doctor`: does this installation compute what it should, and with which backends?"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import ldmq_kernels
from ldmq_kernels import ops
from ldmq_kernels.cli.op_cases import Cases
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.cpu import onednn

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "accelerate", "scipy")
# of the largest output: float16 and bfloat16 round once at the end, float32 in the order of its sums
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PRODUCERS = ("group_norm_silu_quantize", "layer_norm_quantize", "geglu_quantize", "silu_quantize")
WITHOUT_CUDA = "needs an NVIDIA GPU and a torch build with CUDA"

console = Console()


@dataclass(frozen=True)
class Finding:
    """One op on one backend: "ok", "wrong", "fails" or "refuses", with the milliseconds or the reason."""

    op: str
    backend: str
    verdict: str
    detail: str

    @property
    def is_bad(self) -> bool:
        """Refusing is allowed: the next backend serves."""
        return self.verdict in ("wrong", "fails")


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _difference(op: str, result: Any, expected: Any) -> str:
    """Empty where they agree: integers and scales bit for bit, floats to the last rounding.

    A producer's integers may be one step apart, where a float sum turns a tie over.
    """
    step = 1.0 if op in PRODUCERS else 0.0
    for got, wanted in zip(_as_tuple(result), _as_tuple(expected), strict=True):
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{got.dtype} {tuple(got.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
        error = float((got.double() - wanted.double()).abs().max()) if got.numel() else 0.0
        exact = wanted.dtype == torch.int8 or len(_as_tuple(expected)) > 1
        allowed = step if exact else TOLERANCE[wanted.dtype] * float(wanted.double().abs().max())
        if not error <= allowed:
            return f"differs by up to {error:.3g}, {allowed:.3g} is allowed"
    return ""


def check_op(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Run one op on a backend and compare it with the reference."""
    arguments = Cases(device, dtype).of(op)
    expected = getattr(importlib.import_module("ldmq_kernels.kernels.reference"), op)(*arguments)
    function = getattr(importlib.import_module(f"ldmq_kernels.kernels.{backend}"), op, None)
    if function is None:
        return Finding(op, backend, "refuses", "not written for this backend")
    try:
        function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        result = function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        difference = _difference(op, result, expected)
    except dispatch.Unsupported as refusal:
        return Finding(op, backend, "refuses", str(refusal))
    except Exception as error:
        return Finding(op, backend, "fails", f"{type(error).__name__}: {error}")
    return Finding(op, backend, "wrong" if difference else "ok", difference or f"{taken * 1000:.2f} ms")


def _versions() -> Table:
    table = Table("part", "found", box=None, show_header=False, padding=(0, 2))
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("ldmq_kernels", ldmq_kernels.__version__)
    for name in PACKAGES:
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("CUDA", torch.version.cuda or "this torch is built without it")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        table.add_row(f"GPU {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    table.add_row("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    return table


def missing_why(backend: str) -> str:
    """Why a backend does not serve here, and how to get it."""
    if backend == "cpu":
        built = onednn.is_built_in()
        if not built:
            return "this torch lacks oneDNN's int8 ops: install an x86-64 build of torch 2.10 or newer"
        return "oneDNN's int8 products are not exact on this processor: it needs AVX-512 VNNI, AVX-VNNI or AMX"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return f"triton is not installed, it {WITHOUT_CUDA}: pip install triton"
        if not torch.cuda.is_available():
            return f"{WITHOUT_CUDA} (TRITON_INTERPRET=1 runs it slowly on a CPU)"
        return "needs compute capability 8.0 or newer"
    if not torch.cuda.is_available():
        return WITHOUT_CUDA
    return "the package was built without it: install again with LDMQ_CUDA_ARCHS set"


def _override_problem() -> str:
    """A backend that the environment asks for and that cannot serve, as a line; empty where all is well."""
    name = os.environ.get("LDMQ_BACKEND")
    if not name:
        return ""
    if name not in dispatch.BACKENDS:
        return f"LDMQ_BACKEND={name} is not a backend: choose one of {', '.join(dispatch.BACKENDS)}, or unset it"
    if served_device(name) is None:
        return f"LDMQ_BACKEND={name} asks for a backend that does not serve here: unset it"
    return ""


def served_device(backend: str) -> torch.device | None:
    """The best device of this machine that a backend serves, if any."""
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    module = importlib.import_module(f"ldmq_kernels.kernels.{backend}")
    return next((device for device in [*devices, torch.device("cpu")] if module.serves(device)), None)


def run_doctor() -> bool:
    """Print what was found; whether everything that should work does."""
    console.print(_versions())
    findings: list[Finding] = []
    table = Table("op", "backend", "device", "verdict", "time or reason", title="every op against its definition")
    served = {backend: served_device(backend) for backend in dispatch.BACKENDS}
    for backend, device in served.items():
        if device is None:
            continue
        for op in ops.SCHEMAS:
            found = check_op(op, backend, device, torch.float16 if device.type == "cuda" else torch.float32)
            findings.append(found)
            colour = "red" if found.is_bad else "yellow" if found.verdict == "refuses" else "green"
            table.add_row(op, backend, device.type, f"[{colour}]{found.verdict}[/]", escape(found.detail))
        table.add_section()
    console.print(table)
    for backend in (name for name, device in served.items() if device is None):
        console.print(f"{backend}: does not serve here; {missing_why(backend)}", markup=False)
    problem = _override_problem()
    if problem:
        console.print(problem, markup=False)
    bad = [found for found in findings if found.is_bad]
    if bad:
        names = ", ".join(f"{found.op} on {found.backend}" for found in bad)
        console.print(f"not right: {names}; LDMQ_BACKEND=reference computes without them", markup=False)
    elif not problem:
        console.print("all is well")
    return not bad and not problem
