"""Everything that a GPU machine should bring home, in order of value, within a time limit, in one command.

    python -m benchmarks gpu --seconds 540                 # a first run
    python -m benchmarks gpu --seconds 540 --resume DIR    # goes on where the run that left DIR stopped

First the CUDA kernels are built, and every tile is proved exact; then the machine's ceilings and the two main ops
beside their baselines, the tests that need a GPU, the models, all other tests and ops, and tuning, after which ops and
models are measured again with the tiles that it found. It runs from a plain copy of the tree, without network, git,
diffusers or an installed package; `make wheels`, run just before, leaves what the models need in build/wheels, and
the commit. Below $OUT (or beside this file, in results/run) it keeps four files: rows.jsonl, to which every result is
appended as soon as it is there; log.txt; state.json; and tuned.json. `python -m benchmarks collect` makes results
files of the rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELS, INSTALLED = ROOT / "build" / "wheels", ROOT / "build" / "gpu-packages"
FILES = ("rows.jsonl", "log.txt", "state.json", "tuned.json")
SMALLEST_STAGE = 10.0  # seconds; less than this only starts Python
SHARED = ("-n", "8") if importlib.util.find_spec("xdist") else ()  # most of these tests' time is compilation
PYTEST = ("-m", "pytest", "-q", "--maxfail=20", "--no-header", "-p", "no:cacheprovider", *SHARED)
OPS_TESTS = ("python_tests/kernels", "--ignore=python_tests/kernels/cpu", "--ignore=python_tests/kernels/cuda")
OPS = (
    "linear_w8a8",
    "conv2d_w8a8",
    "group_norm_silu_quantize",
    "layer_norm_quantize",
    "geglu_quantize",
    "gelu_quantize",
    "linear_w4a8",
    "quantize_per_token",
    "quantize_static",
    "quantize_per_sample",
    "rotate_quantize_per_token",
    "rotate_quantize_per_sample",
    "conv2d_w4a8",
    "linear_static_w8a8",
    "linear_w8a16",
    "conv2d_w8a16",
    "linear_w4a16",
    "silu_quantize",
)


@dataclass(frozen=True)
class Stage:
    """Arguments of Python, and the most seconds that they may take."""

    name: str
    command: tuple[str, ...]
    limit: float


def _op(name: str, limit: float = 60, again: str = "") -> Stage:
    return Stage(f"{name}{again}", ("-m", "benchmarks", "op", name, "--rows", "{rows}"), limit)


def _model(name: str, again: str = "") -> Stage:
    return Stage(f"model {name}{again}", ("-m", "benchmarks", "model", name, "--rows", "{rows}"), 240)


AGAIN = ", tuned"
STAGES = (
    Stage("packages", ("-m", "benchmarks", "gpu", "--install"), 60),
    Stage("CUDA kernels", ("setup.py", "-q", "build_ext", "--inplace"), 200),
    Stage("every tile", (*PYTEST, "python_tests/kernels/triton/test_backend.py", "-k", "tile or split"), 120),
    Stage("every CUDA tile", (*PYTEST, "python_tests/kernels/cuda/test_gemm.py", "-k", "gpu"), 60),
    Stage("ceilings", ("-m", "benchmarks", "machine", "ceilings", "--rows", "{rows}"), 60),
    _op("linear_w8a8", 120),
    _op("conv2d_w8a8", 120),
    Stage("truth on the GPU", (*PYTEST, "python_tests/gpu"), 200),
    _model("sdxl"),
    Stage("ops on the GPU", (*PYTEST, *OPS_TESTS, "-k", "(triton or cuda) and not compiles"), 300),
    Stage("doctor", ("-m", "ldmq_kernels", "doctor"), 200),
    _model("sd15"),
    *(_op(name) for name in OPS[2:6]),
    Stage("host time", ("-m", "benchmarks", "machine", "host_time", "--rows", "{rows}"), 60),
    Stage("cold start", ("-m", "benchmarks", "cold-start", "--rows", "{rows}"), 200),
    _model("vae_decoder"),
    Stage("tuning", ("-m", "ldmq_kernels", "bench", "--tune", "--out", "{tuned}", "--seconds", "400"), 480),
    _op("linear_w8a8", 120, AGAIN),
    _op("conv2d_w8a8", 120, AGAIN),
    _model("sdxl", AGAIN),
    _model("sd15", AGAIN),
    *(_op(name) for name in OPS[6:]),
    Stage("sanitizer", (*PYTEST, "python_tests/gpu/test_sanitizer_on_gpu.py"), 400),
    Stage("ops of the reference", (*PYTEST, *OPS_TESTS, "-k", "reference"), 200),
)


def _environment(out: Path) -> dict[str, str]:
    """The tree and the unpacked wheels on the path; tiles that were tuned where the ops look for them."""
    cache = ROOT / "build" / "tiles"
    cache.mkdir(parents=True, exist_ok=True)
    tuned = out / "tuned.json"
    if tuned.exists():
        named = json.loads(tuned.read_text())["gpu"]
        name = "".join(c if c.isalnum() else "-" for c in named.lower()).strip("-")
        shutil.copy(tuned, cache / f"{name}.json")
    path = os.pathsep.join([str(ROOT), str(INSTALLED), os.environ.get("PYTHONPATH", "")])
    caches = {name: str(ROOT / "build" / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    return os.environ | caches | {"PYTHONPATH": path, "LDMQ_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}


def _run(stage: Stage, seconds: float, out: Path) -> str:
    """How a stage ended; its output goes to the log."""
    places = {"rows": str(out / "rows.jsonl"), "tuned": str(out / "tuned.json")}
    command = [sys.executable, *(part.format(**places) for part in stage.command)]
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n=== {stage.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(out), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.wait()
            return "cut short"
    return "passed" if code == 0 else f"failed ({code})"


def run(stages: tuple[Stage, ...], seconds: float, out: Path) -> dict[str, str]:
    """Run what has not passed yet, until time is up; the outcomes of all stages, by name."""
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "state.json"
    state: dict[str, str] = json.loads(state_file.read_text()) if state_file.exists() else {}
    # what has never been started comes before what was cut short or failed
    for stage in sorted(stages, key=lambda stage: stage.name != "packages" and stage.name in state):
        if state.get(stage.name) == "passed" and stage.name != "packages":
            print(f"{stage.name}: passed before")
            continue
        left = deadline - time.monotonic()
        if left < SMALLEST_STAGE:
            print(f"{stage.name}: not started, no time left")
            continue
        begin, start = time.monotonic(), (out / "log.txt").stat().st_size if (out / "log.txt").exists() else 0
        state[stage.name] = outcome = _run(stage, min(left, stage.limit), out)
        state_file.write_text(json.dumps(state, indent=1) + "\n")
        print(f"{stage.name}: {outcome} in {time.monotonic() - begin:.0f} s", flush=True)
        if outcome.startswith("failed"):
            with (out / "log.txt").open("rb") as log:
                log.seek(start)
                print(log.read()[-1500:].decode(errors="replace"), flush=True)
    return state


def missing_wheels() -> list[str]:
    """Wheels of what is not installed: the machine's own versions go together, and none is to be hidden."""
    found = []
    for path in sorted(WHEELS.glob("*.whl")):
        try:
            importlib.metadata.version(path.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            found.append(str(path))
    return found


def install() -> None:
    """Unpack the wheels of packages that this machine lacks; they need nothing more."""
    wheels = missing_wheels()
    if not WHEELS.is_dir():
        print(f"there is no {WHEELS}: `make wheels` on a machine with a network makes it; models are left out")
    if wheels:
        target = ["--no-deps", "--no-index", "--upgrade", "--target", str(INSTALLED)]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *target, *wheels], check=True)


def main(arguments: list[str]) -> int:
    """Run the stages and print a line for each; 1 where any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--resume", type=Path, help="the folder that an earlier run left")
    parser.add_argument("--install", action="store_true", help="unpack the wheels, and stop")
    options = parser.parse_args(arguments)
    if options.install:
        install()
        return 0
    out = Path(os.environ.get("OUT") or Path(__file__).parent / "results" / "run")
    out.mkdir(parents=True, exist_ok=True)
    if options.resume and options.resume.resolve() != out.resolve():
        for name in FILES:
            if (options.resume / name).exists():
                shutil.copy(options.resume / name, out / name)
    state = run(STAGES, options.seconds, out)
    return int(any(outcome.startswith("failed") for outcome in state.values()))
