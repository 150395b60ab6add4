"""Every kernel in a process of its own, a row each whatever happens: python -m benchmarks smoke --rows ROWS.jsonl

A process that has everything imported and has touched no GPU is forked for each case; one that ends, hangs or leaves
its GPU unusable costs its own case alone. What is wrong is switched off as `ldmq doctor` does, or refused where only
a tile is wrong that no op takes unless it is measured to be the fastest; both hold through tuning.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_run import cases
from benchmarks.gpu_run.cases import FAILED, MISSING, OK, REFUSED, Case
from benchmarks.harness import machine, results

HUNG, CUT_SHORT, NOT_STARTED = "hung", "cut short", "not started"
FINE = (OK, REFUSED, MISSING, CUT_SHORT, NOT_STARTED)  # says nothing against a kernel
LIMIT = 20.0  # seconds of a case
UNUSABLE = 4  # exit code where the GPU cannot be used by this process any more


@dataclass(frozen=True)
class Outcome:
    """How a case ended, after so many seconds, and why."""

    case: Case
    outcome: str
    seconds: float
    detail: str

    @property
    def row(self) -> dict[str, Any]:
        """A row of results."""
        return {
            "name": self.case.name,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 2),
            "detail": self.detail,
        }


@dataclass
class _Child:
    """A process with the cases that it has before it; `at` is the one under way."""

    cases: list[Case]
    process: Any
    pipe: connection.Connection
    begin: float
    at: int = 0
    ended: bool = False


def _check_all(pipe: connection.Connection, device: str, batch: list[Case]) -> None:
    """In a child: the outcome of each case as soon as it is known; ends where the GPU is unusable."""
    machine.use_device(device)
    for case in batch:
        outcome, detail = cases.check(case)
        pipe.send((outcome, detail))
        if outcome == FAILED and not cases.is_usable():
            raise SystemExit(UNUSABLE)


def _send(pipe: connection.Connection, device: str, function: Callable[..., Any], *arguments: Any) -> None:
    machine.use_device(device)
    pipe.send(function(*arguments))


def _context() -> Any:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["benchmarks.gpu_run.preloaded"])
    return made


def in_child(function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> Any:
    """What a function returns in a process of its own, so that this one touches no GPU.

    Raises:
        RuntimeError: the process ends or hangs.
    """
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, machine.device().type, function, *arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise RuntimeError(f"{function.__name__} did not end within {seconds:.0f} s")
        return ours.recv()
    except EOFError:
        process.join(5)
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}") from None
    finally:
        process.kill()


def outcomes(batches: list[list[Case]], *, workers: int, seconds: float, limit: float = LIMIT) -> Iterator[Outcome]:
    """The outcome of every case, in the order in which they end.

    Args:
        batches: cases that share a process as long as it lives; the others of one that ends get a new one.
        workers: processes at a time.
        seconds: for all; cases that are left then are "cut short" or "not started".
        limit: seconds of a case, after which its process is killed and the case is "hung".
    """
    context = _context()
    waiting, running = collections.deque(batches), list[_Child]()
    deadline = time.monotonic() + seconds
    while waiting or running:
        if time.monotonic() >= deadline:
            break
        while waiting and len(running) < workers:
            batch = waiting.popleft()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_check_all, args=(theirs, machine.device().type, batch))
            process.start()
            theirs.close()
            running.append(_Child(batch, process, ours, time.monotonic()))
        first = min(min(child.begin for child in running) + limit, deadline)
        ready = connection.wait([child.pipe for child in running], max(0.0, first - time.monotonic()))
        for child in running:
            yield from _listen(child, child.pipe in ready, limit)
            if child.ended and child.at < len(child.cases):
                waiting.appendleft(child.cases[child.at :])
        running = [child for child in running if not child.ended]
    for child in running:
        child.process.kill()
        case, *others = child.cases[child.at :]
        yield Outcome(case, CUT_SHORT, time.monotonic() - child.begin, "time was up")
        waiting.append(others)
    for batch in waiting:
        yield from (Outcome(case, NOT_STARTED, 0.0, "time was up") for case in batch)


def _listen(child: _Child, is_ready: bool, limit: float) -> Iterator[Outcome]:
    """What a child tells, or that it has ended or hangs: its case is over then, and `ended` is set."""
    taken = time.monotonic() - child.begin
    case = child.cases[child.at]
    if is_ready:
        try:
            outcome, detail = child.pipe.recv()
        except (EOFError, ConnectionError):
            child.process.join(5)
            code = child.process.exitcode
            if code != UNUSABLE:  # then the outcome of its last case is told already
                yield Outcome(case, FAILED, taken, f"the process ended with exit code {code}")
                child.at += 1
            child.ended = True
            return
        yield Outcome(case, outcome, taken, detail)
        child.at, child.begin = child.at + 1, time.monotonic()
        if child.at == len(child.cases):
            child.process.kill()  # it has nothing more to do
            child.ended = True
    elif taken >= limit:
        child.process.kill()  # one that waits in the driver for ever is left behind
        yield Outcome(case, HUNG, taken, f"killed after {limit:.0f} s")
        child.at, child.ended = child.at + 1, True


# -- what follows ----------------------------------------------------------------------------------------------


def remember(found: list[Outcome]) -> list[str]:
    """Switch off or refuse what is wrong, for every later process on this kind of GPU; a line for each."""
    from ldmq_kernels.kernels import measurements
    from ldmq_kernels.kernels.backend import DEFINITION, backends

    device, lines = machine.device(), []
    for each in found:
        case = each.case
        if each.outcome in FINE or case.backend == DEFINITION:
            continue
        reason = f"{each.outcome}: {each.detail}, {case.name}"
        if case.is_default:
            measurements.switch_off(case.op, case.backend, device, reason)
            lines.append(f"switched off: {case.op} on {case.backend}, {reason}")
        tiles = backends()[case.backend].tiles
        if case.tile is not None and tiles is not None:
            measurements.refuse(device, [tiles.mark(key) for key in case.keys], case.written, reason)
            lines.append(f"refused: {case.name}")
    return lines


def seen_keys() -> set[str]:
    """Products that were tuned before on this kind of GPU."""
    from ldmq_kernels.kernels import measurements

    return set(measurements.read_file(measurements.user_file(machine.device())).get("milliseconds", {}))


def listed(backend: str, is_tuning: bool) -> list[list[Case]]:
    """The cases, as a process that may touch the GPU finds them."""
    return cases.tuned_cases(seen_keys()) if is_tuning else cases.every_case(backend)


def tune(seconds: float) -> int:
    """Measure the tiles of the two main ops at the shapes of the UNets, those with the most work first."""
    from ldmq_kernels.tuning import TuningError
    from ldmq_kernels.tuning import tune as measure

    try:
        path, left = measure(machine.device(), seconds=seconds, names=cases.TUNED, models=cases.MODELS, show=False)
    except TuningError as error:
        print(error)
        return UNUSABLE
    print(f"{path}; {left} shapes are left")
    return 0


def main(arguments: list[str]) -> int:
    """Print what is not fine, and a count; 1 where a kernel is not, or where all are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks smoke", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--backend", help="each op and tile of this one, in a process each")
    what.add_argument("--tuning", action="store_true", help="the tiles that the tuner measures, which compiles them")
    what.add_argument("--tune", action="store_true", help="measure these tiles, the shapes with the most work first")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a case")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without: the GPU where there is one")
    parser.add_argument("--rows", type=Path, help="append each row to this file of JSON lines")
    options = parser.parse_args(arguments)
    if options.device:
        machine.use_device(options.device)
    if options.tune:
        return tune(options.seconds)
    begin = time.monotonic()
    batches = in_child(listed, options.backend, options.tuning, seconds=options.seconds)
    left = options.seconds - (time.monotonic() - begin)
    counts: collections.Counter[str] = collections.Counter()
    bad = []
    for found in outcomes(batches, workers=options.workers, seconds=left, limit=options.limit):
        counts[found.outcome] += 1
        if options.rows:
            results.append(options.rows, "smoke", found.row)
        if found.outcome not in FINE:
            bad.append(found)
            print(f"{found.outcome}: {found.case.name}: {found.detail}", flush=True)
    print(*remember(bad), sep="\n")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return int(bool(bad) or 0 < counts[MISSING] == counts.total())
