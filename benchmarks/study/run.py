"""The study of the method: formats, calibration, search, planners, and other tools.

    pip install --no-deps -r benchmarks/requirements-peers.txt
    python -m benchmarks study                  # about half an hour on two cores; goes on where it was stopped
    python -m benchmarks study --model second   # the same of a transformer
    python -m benchmarks study --part search    # the cases of some decisions, all at this state
    python -m benchmarks study --report         # docs/study.md and its figures again, from the newest results alone

Every case is measured on the same held-out captions, drawn from several sets of seeds, which neither calibration
nor planning sees. A result is written as soon as it is there, and a case that this commit has measured in the same
way is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import results
from benchmarks.harness.machine import machine
from benchmarks.study import report
from benchmarks.study.cases import PEERS, Case, cases, followers, quick_cases
from benchmarks.study.evaluation import Evaluation, Setup, prepare
from benchmarks.study.inspect_model import inspect_model
from benchmarks.study.own_plans import twice_computed
from benchmarks.study.peers import NOT_INSTALLED, OURS
from benchmarks.study.questions import PART_QUESTIONS, as_records, questions
from benchmarks.study.samples import Samples, interval, measures_of, value
from benchmarks.study.subjects import DEMO, SUBJECTS, Subject
from ldmq_kernels.files import check_place

ROWS = results.ROOT / "build" / "study.jsonl"
CAPTIONS, SEED_SETS = 24, 3
QUICK_CAPTIONS, QUICK_STEPS = 4, 3


def measured(case: Case, setup: Setup, evaluation: Evaluation) -> dict[str, Any]:
    """The row of a case: its figures with intervals, and the samples that questions are answered from."""
    began = time.perf_counter()
    quantization = case.quantization
    row: dict[str, Any] = {
        "name": case.name,
        "section": case.section,
        "tool": quantization.tool,
        "configuration": quantization.configuration,
        "note": quantization.note,
        "source": case.source,
        "failed": None,
    }
    try:
        row["version"] = quantization.version
        model = quantization.build(setup)
        seen = inspect_model(model, evaluation.original, evaluation.call)
        row["note"] = quantization.note or twice_computed(model, setup)
        samples = evaluation.evaluate(model)
    except importlib.metadata.PackageNotFoundError:
        return row | {"failed": NOT_INSTALLED}
    except Exception as error:  # a peer may fail in any way, and its row says how
        if quantization.tool == OURS:
            traceback.print_exc()
        return row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    sets = [samples.of_seed_set(index) for index in range(samples.seed_sets)]
    row["figures"] = {
        "convolutions": asdict(seen.counts["conv2d"]),
        "linears": asdict(seen.counts["linear"]),
        "bytes": seen.bytes,
        "share_of_fp16": seen.bytes / evaluation.fp16_bytes,
        **{name: asdict(interval(samples, name)) for name in measures_of(samples)},
        "by_seed_set": {name: [value(one, m) for one in sets] for name, m in measures_of(samples).items()},
    }
    row["layers"] = {
        "stored": sorted(seen.stored),
        "computed": sorted(seen.computed),
        "bytes_fp16": evaluation.fp16_bytes,
    }
    row["samples"] = samples.to_json()
    row["seconds"] = time.perf_counter() - began
    return row


class Study:
    """Cases, one by one, with what an earlier run has measured in the same way."""

    def __init__(self, path: Path, settings: dict[str, Any], console: Console) -> None:
        self.path, self.settings, self.console = path, settings, console
        self.key = settings | {name: machine()[name] for name in ("device", "torch", "commit")}
        self.known: dict[str, dict[str, Any]] = {}
        if path.exists():
            for record in results.read(path):
                if record["row"].get("key") == self.key and record["row"]["failed"] is None:
                    self.known[record["row"]["name"]] = record["row"]

    def run(self, planned: list[Case], setup: Setup, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
        """Rows of all cases and of what follows each peer."""
        beside: set[Any] = set()
        queue = list(planned)
        while queue:
            case = queue.pop(0)
            row = self.row(case, setup, evaluation)
            yield row
            if case.section == PEERS and case.quantization.tool != OURS and row["failed"] is None:
                queue = [*followers(case, row, beside), *queue]

    def row(self, case: Case, setup: Setup, evaluation: Evaluation) -> dict[str, Any]:
        """One case: what is known of it, or measured now and written at once."""
        row = self.known.get(case.name)
        if row is None:
            row = measured(case, setup, evaluation) | {"key": self.key}
            results.append(self.path, "study", row)
        told = row["failed"] or (
            f"{row['figures']['sqnr_db']['value']:.2f} dB, {row['figures']['share_of_fp16']:.3f} of fp16, "
            f"{row['seconds']:.0f} s"
        )
        self.console.print(f"{case.name}: {told}", soft_wrap=True, highlight=False)
        return row


def fitting(planned: list[Case], patterns: list[str]) -> list[Case]:
    """The cases whose configuration fits an fnmatch pattern.

    Raises:
        SystemExit: none does.
    """
    found = [case for case in planned if any(fnmatchcase(case.quantization.configuration, p) for p in patterns)]
    if not found:
        names = ", ".join(case.quantization.configuration for case in planned)
        raise SystemExit(f"--only {' --only '.join(patterns)} fits no case: there are {names}")
    return found


def of_part(planned: list[Case], part: str) -> list[Case]:
    """The cases that the questions of a part compare, in the order of their options."""
    asked = [question for question in questions() if question.what.startswith(PART_QUESTIONS[part])]
    by_name = {case.name: case for case in planned}
    compared = dict.fromkeys(case for question in asked for case in question.options.values())
    return [by_name[name] for name in compared if name in by_name]


def summary(found: list[dict[str, Any]]) -> dict[str, float | None]:
    """The figures that later measurements are compared with: SQNR of every case of this package."""
    return {
        f"study/{row['configuration']}/sqnr_db": row["figures"]["sqnr_db"]["value"]
        for row in found
        if row["failed"] is None and row["tool"] == OURS
    }


def write(
    subject: Subject,
    found: list[dict[str, Any]],
    settings: dict[str, Any],
    float_figures: dict[str, float],
    commit: str,
) -> Path:
    """The results file: figures and answers, without the samples that they come from.

    Args:
        settings: of the measurements; "part" where these are the cases of a part alone.
        commit: that the cases were measured at, which may be older than the tree is now.
    """
    samples = {row["name"]: Samples.from_json(row["samples"]) for row in found if row["failed"] is None}
    kept = [{k: v for k, v in row.items() if k not in ("samples", "layers", "key")} for row in found]
    part = settings.get("part")
    asked = [
        record for record in as_records(samples) if record["what"].startswith(PART_QUESTIONS[part] if part else "")
    ]
    record = machine() | {"commit": commit, "settings": settings, "float": float_figures, "questions": asked}
    kind = f"{subject.results}_{part}" if part else subject.results
    return results.keep(kind, [{"op": "unet", **row} for row in kept], summary(found), record)


def main(arguments: list[str]) -> None:
    """Run what is not measured yet, then write the results and the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks study", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default=DEMO, help="which model it is made on")
    parser.add_argument(
        "--part", choices=PART_QUESTIONS, help="the cases of some decisions; a results file of their own"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="cases whose words fit, kept for a later run of all; may be repeated",
    )
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="held out; eights keep batches equal")
    parser.add_argument("--seed-sets", type=int, default=SEED_SETS, help="how often each caption is drawn")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where results go as they come")
    parser.add_argument("--docs", type=Path, default=report.DOCS, help="folder for the page and its figure")
    parser.add_argument("--quick", action="store_true", help="two cases in seconds, for tests")
    parser.add_argument("--report", action="store_true", help="the page again, from the newest results files")
    options = parser.parse_args(arguments)
    subject = SUBJECTS[options.model]
    if options.report:
        print("written: " + ", ".join(map(str, report.write_newest(options.docs))))
        return
    planned = fitting(quick_cases() if options.quick else cases(subject.name), options.only or ["*"])
    planned = of_part(planned, options.part) if options.part else planned
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # the numbers are the same, and nothing is timed here
    captions = QUICK_CAPTIONS if options.quick else options.captions
    settings = {
        "captions": captions,
        "seed_sets": options.seed_sets,
        "steps": QUICK_STEPS if options.quick else subject.steps,
    }
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    check_place(options.rows)
    results.check_keep(subject.results)
    console = Console(stderr=True)
    study = Study(options.rows, settings | {"model": subject.name}, console)
    setup, evaluation = prepare(subject, **settings, show=console.is_terminal)
    found = list(study.run(planned, setup, evaluation))
    if options.only:  # a results file of a few cases would stand for the whole study
        print(f"measured: {len(found)} cases, in {options.rows}; the same without --only goes on and writes results")
        return
    part = {"part": options.part} if options.part else {}
    path = write(subject, found, study.settings | part, evaluation.float_figures, study.key["commit"])
    pages = report.write_newest(options.docs)
    print("written: " + ", ".join(map(str, (path, *pages))))
    ours_failed = [row["name"] for row in found if row["failed"] and row["tool"] == OURS]
    if ours_failed:
        raise SystemExit(f"failed: {', '.join(ours_failed)}")
