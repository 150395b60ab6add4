"""The study of the method, in parts: what the search is worth, calibration, int8 or FP8, published lists of layers.

    python -m benchmarks study --part search                    # a quarter of an hour on one core
    python -m benchmarks study --part search --model second     # the same of a transformer
    python -m benchmarks study --report                         # docs/study.md again, from the newest results alone

Every case is measured on the same held-out captions, drawn from one set of seeds or several, which neither calibration
nor planning sees. A result is written as soon as it is there, and a case that this commit has measured in the same
way is not measured again.
"""

from __future__ import annotations

import argparse
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness import results
from benchmarks.harness.machine import machine
from benchmarks.study import report
from benchmarks.study.cases import Case, cases
from benchmarks.study.evaluation import Evaluation, Setup, prepare
from benchmarks.study.inspect_model import inspect_model
from benchmarks.study.own_plans import twice_computed
from benchmarks.study.questions import PART_QUESTIONS, as_records, kind_of, questions
from benchmarks.study.samples import Samples, interval, measures_of, value
from benchmarks.study.subjects import DEMO, SUBJECTS, Subject
from ldmq_kernels.files import check_place

ROWS = results.ROOT / "build" / "study.jsonl"
CAPTIONS, SEED_SETS = 24, 1


def measured(case: Case, setup: Setup, evaluation: Evaluation) -> dict[str, Any]:
    """The row of a case: its figures with intervals, and the samples that questions are answered from."""
    began = time.perf_counter()
    row: dict[str, Any] = {
        "configuration": case.configuration,
        "note": case.note,
        "source": case.source,
        "failed": None,
    }
    try:
        model = case.build(setup)
        seen = inspect_model(model, evaluation.original, evaluation.call)
        row["note"] = case.note or twice_computed(model, setup)
        samples = evaluation.evaluate(model)
    except Exception as error:  # the others are measured, and its row says how
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
                    self.known[record["row"]["configuration"]] = record["row"]

    def row(self, case: Case, setup: Setup, evaluation: Evaluation) -> dict[str, Any]:
        """One case: what is known of it, or measured now and written at once."""
        row = self.known.get(case.configuration)
        if row is None:
            row = measured(case, setup, evaluation) | {"key": self.key}
            results.append(self.path, "study", row)
        told = row["failed"] or (
            f"{row['figures']['sqnr_db']['value']:.2f} dB, {row['figures']['share_of_fp16']:.3f} of fp16, "
            f"{row['seconds']:.0f} s"
        )
        self.console.print(f"{case.configuration}: {told}", soft_wrap=True, highlight=False)
        return row


def of_part(planned: list[Case], part: str) -> list[Case]:
    """The cases that the questions of a part compare, in the order of their options."""
    asked = [question for question in questions() if question.what.startswith(PART_QUESTIONS[part])]
    by_name = {case.configuration: case for case in planned}
    compared = dict.fromkeys(case for question in asked for case in question.options.values())
    return [by_name[name] for name in compared if name in by_name]


def summary(found: list[dict[str, Any]]) -> dict[str, float | None]:
    """The figures that later measurements are compared with: SQNR of every case."""
    return {
        f"study/{row['configuration']}/sqnr_db": row["figures"]["sqnr_db"]["value"]
        for row in found
        if row["failed"] is None
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
        settings: of the measurements, and the part that they are of.
        commit: that the cases were measured at, which may be older than the tree is now.
    """
    samples = {row["configuration"]: Samples.from_json(row["samples"]) for row in found if row["failed"] is None}
    kept = [{k: v for k, v in row.items() if k not in ("samples", "key")} for row in found]
    record = machine() | {"commit": commit, "settings": settings, "float": float_figures}
    record |= {"questions": as_records(samples, settings["part"])}
    kind = kind_of(subject, settings["part"])
    return results.keep(
        kind, [{"op": "unet", "name": row["configuration"], **row} for row in kept], summary(found), record
    )


def main(arguments: list[str]) -> None:
    """Run what is not measured yet, then write the results and the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks study", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PART_QUESTIONS, help="the decisions whose cases are measured")
    parser.add_argument("--model", choices=SUBJECTS, default=DEMO, help="which model it is made on")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="held out; eights keep batches equal")
    parser.add_argument("--seed-sets", type=int, default=SEED_SETS, help="how often each caption is drawn")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where results go as they come")
    parser.add_argument("--docs", type=Path, default=report.DOCS, help="folder for the page")
    parser.add_argument("--report", action="store_true", help="the page again, from the newest results files")
    options = parser.parse_args(arguments)
    if options.report:
        print(f"written: {report.write_newest(options.docs)}")
        return
    if options.part is None:
        parser.error(f"give --part, one of {', '.join(PART_QUESTIONS)}, or --report")
    subject = SUBJECTS[options.model]
    planned = of_part(cases(subject.name), options.part)
    settings = {"captions": options.captions, "seed_sets": options.seed_sets, "steps": subject.steps}
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    check_place(options.rows)
    results.check_keep(kind_of(subject, options.part))
    console = Console(stderr=True)
    study = Study(options.rows, settings | {"model": subject.name}, console)
    setup, evaluation = prepare(subject, **settings, show=console.is_terminal)
    found = [study.row(case, setup, evaluation) for case in planned]
    asked = study.settings | {"part": options.part}
    path = write(subject, found, asked, evaluation.float_figures, study.key["commit"])
    print(f"written: {path}, {report.write_newest(options.docs)}")
    failed = [row["configuration"] for row in found if row["failed"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
