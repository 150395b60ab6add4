"""Runs a list of jobs within a time limit: one failure stops no other, and a later run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu_run.jobs import Job

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "gpu-packages"
FILES = ("rows.jsonl", "log.txt", "state.json", "tuned.json", "kernels.txt", "trace.json.gz")  # all that comes home
ARCHITECTURES = "90"  # asked for by name: where they cannot be built, that is an error and not a build without them
SMALLEST_JOB = 10.0  # seconds; less than this only starts Python
PASSED, CUT_SHORT = "passed", "cut short"
SHOWN_BYTES = 1500  # of the log of a job that failed


class Machine(Protocol):
    """What the runner asks of time and processes; tests have one of their own."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""

    def start(self, job: Job) -> Any:
        """Start a job, and return a handle of it."""

    def wait(self, handle: Any, seconds: float) -> int | None:
        """The exit code, or None where the job still runs after so many seconds."""

    def kill(self, handle: Any) -> None:
        """End a job with all its children."""

    def progress(self) -> int:
        """Something that grows as rows and measured tiles are added."""

    def log_of(self, handle: Any) -> str:
        """The end of what a job has printed."""


class Processes:
    """The machine itself: every job is a process group of its own, whose output goes to log.txt."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()

    def start(self, job: Job) -> tuple[subprocess.Popen[bytes], int]:
        """Start a job; the handle has the place in the log where its output begins."""
        restore(self.out)
        names = {"rows": "rows.jsonl", "trace": "trace.json.gz", "kernels": "kernels.txt"}
        places = {name: str(self.out / file) for name, file in names.items()}
        command = [sys.executable, *(part.format(**places) for part in job.command)]
        with (self.out / "log.txt").open("ab") as log:
            log.write(f"\n=== {job.name}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        return process, begin

    def wait(self, handle: Any, seconds: float) -> int | None:
        """The exit code, or None where the job still runs after so many seconds."""
        try:
            code: int = handle[0].wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        bring_home(self.out)
        return code

    def kill(self, handle: Any) -> None:
        """End a job with all its children; one that waits in the driver for ever is left behind."""
        os.killpg(handle[0].pid, signal.SIGKILL)
        self.wait(handle, 5)
        bring_home(self.out)

    def progress(self) -> int:
        """Bytes of rows and of measured tiles."""
        files = [self.out / name for name in ("rows.jsonl", "tuned.json")]
        return sum(file.stat().st_size for file in files if file.exists())

    def log_of(self, handle: Any) -> str:
        """The end of what a job has printed; jobs in the background print between."""
        with (self.out / "log.txt").open("rb") as log:
            log.seek(handle[1])
            return log.read()[-SHOWN_BYTES:].decode(errors="replace")


def measurements_folder() -> Path:
    """Where the ops of this run look for measured tiles and for what is switched off."""
    return ROOT / "build" / "measurements"


def environment() -> dict[str, str]:
    """The tree and the unpacked wheels on the path, and every cache inside of the tree."""
    folder = measurements_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(INSTALLED), os.environ.get("PYTHONPATH", "")])
    caches = {name: str(ROOT / "build" / name.lower()) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    own = {"PYTHONPATH": path, "LDMQ_CACHE": str(folder), "PYTHONUNBUFFERED": "1"}
    return {"LDMQ_CUDA_ARCHS": ARCHITECTURES} | dict(os.environ) | caches | own


def restore(out: Path) -> None:
    """Put what an earlier run measured and switched off where the ops look for it, unless there is something."""
    tuned, folder = out / "tuned.json", measurements_folder()
    if tuned.exists() and not any(folder.glob("*.json")):
        named = json.loads(tuned.read_text())["gpu"]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tuned, folder / (re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-") + ".json"))


def bring_home(out: Path) -> None:
    """Copy what is measured and switched off by now to tuned.json."""
    for file in measurements_folder().glob("*.json"):
        shutil.copy(file, out / "tuned.part")
        os.replace(out / "tuned.part", out / "tuned.json")


def code_digest() -> str:
    """A hash of the package, its kernels and the benchmarks: another one means that something was mended."""
    digest = hashlib.sha256()
    for folder in ("ldmq_kernels", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class State:
    """How each job ended, by name, for one state of the code; every change is written at once."""

    def __init__(self, path: Path, code: str) -> None:
        self._path, self._code = path, code
        found = json.loads(path.read_text()) if path.exists() else {}
        self.jobs: dict[str, str] = found.get("jobs", {}) if found.get("code") == code else {}

    def note(self, job: Job, outcome: str) -> None:
        """Keep how a job ended."""
        self.jobs[job.name] = outcome
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"code": self._code, "jobs": self.jobs}, indent=1) + "\n")
        os.replace(part, self._path)  # whole or not at all: a run that is killed while it writes goes on later

    def ordered(self, jobs: Iterable[Job]) -> list[Job]:
        """Preparation, then what was never started, then what failed or was cut short."""
        return sorted(jobs, key=lambda job: (not job.always, job.name in self.jobs))


def run(jobs: tuple[Job, ...], seconds: float, out: Path, machine: Machine | None = None) -> dict[str, str]:
    """Run what has not passed yet with this code, until time is up.

    A job that waits for one in the background lets those after it go first.

    Args:
        jobs: in order of value.
        seconds: for all.
        out: the folder of `FILES`.
        machine: what runs them; this machine by default.

    Returns:
        The outcomes of all jobs, by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    machine, state = machine or Processes(out), State(out / "state.json", code_digest())
    deadline = machine.now() + seconds
    background: dict[str, tuple[Job, Any, float]] = {}

    def finish(names: Iterable[str], patience: float = float("inf")) -> None:
        for name in [name for name in names if name in background]:
            job, handle, begin = background[name]
            left = min(deadline, begin + job.limit) - machine.now()
            code = machine.wait(handle, min(patience, left))
            if code is not None or left <= patience:
                del background[name]
                _end(machine, state, job, handle, code, begin)

    waiting = [job for job in state.ordered(jobs) if job.always or state.jobs.get(job.name) != PASSED]
    for name in [job.name for job in jobs if job not in waiting]:
        print(f"{name}: passed before")
    while waiting:
        finish(list(background), patience=0)
        job = next((job for job in waiting if not background.keys() & set(job.after)), None)
        if job is None:
            finish(waiting[0].after)
            continue
        waiting.remove(job)
        if deadline - machine.now() < SMALLEST_JOB:
            print(f"{job.name}: not started, no time left")
            continue
        for limit in _tries(job, machine, deadline):
            begin = machine.now()
            handle = machine.start(job)
            if job.background:
                background[job.name] = (job, handle, begin)
                break
            code = machine.wait(handle, limit)
            _end(machine, state, job, handle, code, begin)
            if code == 0:
                break
    finish(list(background))
    return state.jobs


def _tries(job: Job, machine: Machine, deadline: float) -> Iterator[float]:
    """The limit of each try: one, or for a job that goes on as many as there is time for and as add something."""
    end = min(deadline, machine.now() + job.limit)
    while True:
        before = machine.progress()
        yield end - machine.now()
        if not job.goes_on or end - machine.now() < SMALLEST_JOB or machine.progress() == before:
            return


def _end(machine: Machine, state: State, job: Job, handle: Any, code: int | None, begin: float) -> None:
    """Note how a job ended, and print it; of one that did not pass, the end of its output as well."""
    if code is None:
        machine.kill(handle)
    outcome = CUT_SHORT if code is None else PASSED if code == 0 else f"failed ({code})"
    state.note(job, outcome)
    print(f"{job.name}: {outcome} in {machine.now() - begin:.0f} s", flush=True)
    if code != 0:
        print(machine.log_of(handle), flush=True)
