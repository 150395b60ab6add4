"""`ldmq doctor`: does this installation compute what it should, and with which backends?

Each op of each backend is compared with the reference on a few small odd shapes and, on a GPU, at the sizes that models
spend their time in (see `model_sizes`). One that is wrong or fails on any is switched off for devices of this kind,
until a later run of the doctor finds it right (see `kernels.measurements`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import ldmq_kernels
from ldmq_kernels import ops
from ldmq_kernels.cli import model_sizes, op_speed
from ldmq_kernels.cli.batches import check_batches
from ldmq_kernels.cli.early_launches import check_early_launches
from ldmq_kernels.cli.fitted import Column, output_console, print_fitted
from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import DEFINITION, backends
from ldmq_kernels.kernels.dependent_launch import asked_for
from ldmq_kernels.ops.operands import EVERY_OPTION, MODULATION, NORM, Shape, example
from ldmq_kernels.progress import track

PACKAGES = ("torch", "triton", "diffusers", "transformers", "safetensors", "accelerate", "scipy")
COLOURS = {"ok": "green", "refuses": "yellow", "not checked": "yellow"}
WHOLE_MODELS_ON = ("cuda",)  # device types on which sizes of models take no time, and choose tiles of their own

# odd in every size and in what they leave out; with the last, what quantizes makes FP8
SHAPES = (
    Shape(17, 68, 37, (2, 9, 7), 3, options=EVERY_OPTION, scale_per_row=True),
    Shape(63, 20, 4, (1, 5, 6), 3, upsample=2, prefers_picture=True),
    Shape(1, 4, 320, (3, 7, 9), 3, stride=2, prefers_picture=True),
    Shape(145, 352, 168, (2, 9, 7), 3, options=EVERY_OPTION, scale_per_row=True),
    Shape(63, 96, 40, (1, 5, 6), 3, stride=2, prefers_picture=True),
    Shape(63, 320, 68, (1, 6, 5), per_token=True, prefers_picture=True),
    Shape(34, 64, 72, (1, 6, 5), options=EVERY_OPTION | MODULATION, scale_per_row=True),
    Shape(18, 64, 40, (2, 5, 6), 3, options=NORM | {"q_dtype"}),
)


@dataclass(frozen=True)
class Finding:
    """One op on one backend: "ok", "wrong", "fails", "no memory", "refuses" or "not checked".

    detail: the milliseconds, or the reason.
    speed_up: over torch in float16, where that was timed.
    """

    op: str
    backend: str
    verdict: str
    detail: str
    speed_up: float | None = None

    @property
    def is_bad(self) -> bool:
        """Refusing is allowed: the next backend serves."""
        return self.verdict in ("wrong", "fails", "no memory")

    @property
    def is_the_kernels_fault(self) -> bool:
        """Whether the op is to be switched off."""
        return self.verdict in ("wrong", "fails") and self.backend != DEFINITION


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_case(op: str, function: Callable[..., Any], device: torch.device, arguments: Any) -> tuple[str, float]:
    """What is wrong with two calls, or nothing, and the milliseconds of the second."""
    expected = getattr(backends()[DEFINITION], op)(*arguments)
    first = function(*arguments)
    _finish(device)
    start = time.perf_counter()
    second = function(*arguments)
    _finish(device)
    taken = (time.perf_counter() - start) * 1e3
    agreement = ops.spec_of(op).agreement
    return agreement.difference(first, expected) or agreement.difference(second, expected), taken


def _operands(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """The arguments that an op is compared with: small ones and, on a GPU, those of models, in half precision."""
    for shape in SHAPES:
        yield example(op, shape, device, dtype)
    if device.type in WHOLE_MODELS_ON:
        for call in model_sizes.compared(op, backends()[backend], device):
            yield call.make()


def check_op(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Run one op on a backend at every size and compare it with the reference; on a GPU, time it as well."""
    function = getattr(backends()[backend], op, None)
    if function is None:
        return Finding(op, backend, "refuses", "not written for this backend")
    times, refusals, where, speed = [], [], "", None
    try:
        spec = ops.spec_of(op)
        for arguments in _operands(op, backend, device, dtype):
            where = f"at {spec.shape_text(arguments)}, {dtype}"
            try:
                problem, taken = _check_case(op, function, device, arguments)
            except dispatch.Unsupported as refusal:
                refusals.append(str(refusal))
                continue
            if problem:
                return Finding(op, backend, "wrong", f"{problem}, {where}")
            times.append(taken)
        if not times:
            return Finding(op, backend, "refuses", refusals[0])
        if device.type == "cuda":
            where = "at the size that is timed"
            speed = op_speed.measure(op, function, device)
    except torch.OutOfMemoryError as error:
        return Finding(op, backend, "no memory", f"{error}, {where}")
    except Exception as error:
        return Finding(op, backend, "fails", f"{type(error).__name__}: {error}, {where}")
    taken, speed_up = speed or (times[0], None)
    partly = f"; refuses {len(refusals)} of {len(refusals) + len(times)} shapes: {refusals[0]}" if refusals else ""
    return Finding(op, backend, "ok", f"{taken:.2f} ms{partly}", speed_up)


def _versions() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column("part", no_wrap=True)
    table.add_column("found", overflow="fold")
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


def _override_problem() -> str:
    """A backend that the environment asks for and that cannot serve, as a line; empty where all is well."""
    name = os.environ.get("LDMQ_BACKEND")
    if not name:
        return ""
    if name not in backends():
        return f"LDMQ_BACKEND={name} is not a backend: choose one of {', '.join(backends())}, or unset it"
    if served_device(name) is None:
        return f"LDMQ_BACKEND={name} asks for a backend that does not serve here: unset it"
    return ""


def served_device(backend: str) -> torch.device | None:
    """The best device of this machine that a backend serves, if any."""
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    return next((device for device in [*devices, torch.device("cpu")] if backends()[backend].serves(device)), None)


def _setting_problem(devices: set[torch.device]) -> str:
    """A file of measurements that is damaged, or LDMQ_PDL with another word, as a line; empty where all is well."""
    try:
        asked_for()
        for device in devices:
            for backend in backends().values():
                if backend.tiles is not None:
                    backend.tiles.check(device)
            measurements.read_file(measurements.user_file(device))
    except ValueError as error:
        return str(error)
    except OSError:  # a user without a home that can be read, of which a warning tells; the ops run there
        return ""
    return ""


def _is_usable(device: torch.device) -> bool:
    """Whether anything can still run on a device: an illegal access ends all work of this process on a GPU."""
    try:
        return float(torch.ones(1, dtype=torch.float32, device=device).sum()) == 1
    except RuntimeError:
        return False


def _findings(served: dict[str, torch.device]) -> list[Finding]:
    """Check every op; what is switched off comes last, since it may leave its device unusable."""
    asked = [(op, backend) for backend in served for op in ops.specs()]
    ordered = sorted(asked, key=lambda pair: measurements.switched_off(pair[0], pair[1], served[pair[1]]) is not None)
    found, unusable = {}, ""
    for op, backend in track(ordered, "ops", len(ordered), show=True):
        device = served[backend]
        if unusable and device.type == "cuda":
            found[op, backend] = Finding(op, backend, "not checked", f"{unusable} left the GPU unusable: run it again")
            continue
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        found[op, backend] = check_op(op, backend, device, dtype)
        if found[op, backend].verdict == "fails" and not _is_usable(device):
            unusable = f"{op} on {backend}"
    return [found[pair] for pair in asked]


def _switch(found: Finding, device: torch.device) -> str:
    """Switch off what fails, and on again what holds; the line that says so, empty where nothing changes."""
    name = f"{found.op} on {found.backend}"
    try:
        if found.is_the_kernels_fault:
            measurements.switch_off(found.op, found.backend, device, f"{found.verdict}: {found.detail}")
            return f"switched off: {name}, {found.verdict}: {found.detail}; the next backend serves"
        if found.verdict in ("ok", "refuses") and measurements.switch_on(found.op, found.backend, device):
            return f"switched on again: {name}"
    except (OSError, ValueError) as error:
        return f"{name} could not be switched: {error}; LDMQ_BACKEND=reference computes without it"
    return ""


def _print_table(console: Console, backend: str, device: torch.device, findings: list[Finding]) -> None:
    """Print what was found of a backend's ops."""
    columns = (
        Column("op", is_number=False),
        Column("verdict", is_number=False),
        Column("time or reason", is_number=False, wraps=True),
        Column("over\nfp16"),
    )
    rows = []
    for found in findings:
        gain = "-" if found.speed_up is None else f"{found.speed_up:.2f}x"
        rows.append((found.op, Text(found.verdict, COLOURS.get(found.verdict, "red")), found.detail, gain))
    print_fitted(console, f"{backend} on {device.type}, every op against its definition", columns, rows)


def run_doctor() -> bool:
    """Print what was found, and switch off what fails; whether everything that should work does."""
    console = output_console()
    console.print(_versions())
    devices = {backend: served_device(backend) for backend in backends()}
    served = {backend: device for backend, device in devices.items() if device is not None}
    problem = _setting_problem(set(served.values()))
    if problem:
        console.print(problem, markup=False)
        return False
    findings = _findings(served)
    for backend, device in served.items():
        _print_table(console, backend, device, [found for found in findings if found.backend == backend])
        if remark := backends()[backend].remark(device):
            console.print(f"{backend}: {remark}", markup=False)
    on_gpu = any(device.type == "cuda" for device in served.values())
    console.print(op_speed.LEGEND if on_gpu else "times are of a small call; gains over fp16 are measured on a GPU")
    for backend in (name for name in devices if name not in served):
        device = torch.device(backends()[backend].device_type or "cpu")
        console.print(f"{backend}: does not serve here; {backends()[backend].why_not(device)}", markup=False)
    for found in findings:
        line = _switch(found, served[found.backend])
        if line:
            console.print(line, markup=False)
    if on_gpu and (line := check_early_launches(torch.device("cuda"))):
        console.print(line, markup=False)
        if not _is_usable(torch.device("cuda")):
            console.print("that left the GPU unusable: run it again, kernels are launched as usual then")
            return False
    problem = _override_problem()
    if problem:
        console.print(problem, markup=False)
    bad = [found for found in findings if found.is_bad]
    if bad:
        console.print(f"not right: {', '.join(f'{found.op} on {found.backend}' for found in bad)}", markup=False)
    elif not problem:
        is_equal, line = check_batches(torch.device("cuda" if on_gpu else "cpu"))
        console.print(line, markup=False)
        if is_equal:
            console.print("all is well")
        return is_equal
    return not bad and not problem
