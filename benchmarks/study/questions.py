"""What the study asks: a decision each, its options from the simplest on, and what the measurements say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.study.cases import (
    BOTH_SIGNALS,
    DYNAMIC,
    MODES,
    PARTS,
    ROTATED,
    SKIP_LISTS,
    SMOOTHQUANT_ALPHA,
    STATIC,
    TIMESTEP,
    W4_STATIC,
    planned_words,
    skip_words,
    words,
)
from benchmarks.study.samples import Interval, Samples, difference
from benchmarks.study.subjects import DEMO, Subject

CALIBRATION_QUESTIONS = "calibration of static scales"
FLOAT8_QUESTIONS = "int8 or FP8"
PART_QUESTIONS = {  # how the questions begin that a part of the study answers
    "search": ("activation scales", "smoothing", "search of", "bias correction", "rounding"),
    "calibration": (CALIBRATION_QUESTIONS,),
    "fp8": (FLOAT8_QUESTIONS,),
    "lists": ("layers", "signals"),
}


def kind_of(subject: Subject, part: str) -> str:
    """The kind of the results file of a part of the study of a model."""
    return f"study_{part}" if subject.name == DEMO else f"study_{subject.name}_{part}"


@dataclass(frozen=True)
class Question:
    """A decision between options, cheapest or simplest first; each later one has to be better to be taken.

    Attributes:
        options: words for each option -> the configuration that stands for it.
        measure: what better means; higher is better.
    """

    what: str
    options: dict[str, str]
    measure: str = "sqnr_db"


@dataclass(frozen=True)
class Answer:
    """How much more the next option has than the one kept so far, and which is kept then."""

    kept: str
    tried: str
    more: Interval
    better: bool


def _search_question(part: str) -> Question:
    without = words(STATIC, how=f"searched without {part}")
    return Question(f"search of {part}", {"without": without, f"with {part}": words(STATIC, how="searched")})


def _list_questions() -> list[Question]:
    found = []
    for skips in SKIP_LISTS:
        by_sqnr, by_both = planned_words(skips), planned_words(skips, BOTH_SIGNALS)
        budget = f"within the bytes of {skips.name}"
        found.append(Question(f"layers in float {budget}", {skips.name: skip_words(skips), "planned by SQNR": by_sqnr}))
        found.append(Question(f"signals {budget}", {"SQNR": by_sqnr, "SQNR and SSIM": by_both}, "ssim"))
    return found


def questions() -> list[Question]:
    """All of them."""
    return [
        *(
            Question(
                f"{CALIBRATION_QUESTIONS}, {how}", {word: words(STATIC, mode, how) for mode, word in MODES.items()}
            )
            for how in ("searched", "plain")
        ),
        *(
            Question(
                f"activation scales, {how}",
                {s.split("-")[1]: words(s, how=how) for s in (STATIC, TIMESTEP, DYNAMIC, ROTATED)},
            )
            for how in ("plain", "searched")
        ),
        *(
            Question(
                f"{FLOAT8_QUESTIONS}, {scale} scales, plain",
                {name: words(f"{scheme}-{scale}") for name, scheme in (("FP8", "fp8"), ("int8", "w8a8"))},
            )
            for scale in ("static", "dynamic")
        ),
        Question(
            "smoothing",
            {
                "none": words(STATIC),
                f"SmoothQuant {SMOOTHQUANT_ALPHA}": words(STATIC, how=f"SmoothQuant {SMOOTHQUANT_ALPHA}"),
                "all of the search": words(STATIC, how="searched"),
            },
        ),
        *(_search_question(part) for part in PARTS),
        Question(
            "bias correction of weights alone",
            {"without": words("w8a16"), "with": words("w8a16", how="searched")},
        ),
        Question("rounding of 4-bit weights", {"nearest": words(W4_STATIC), "GPTQ": words(W4_STATIC, how="GPTQ")}),
        *_list_questions(),
    ]


def answers(question: Question, samples: Mapping[str, Samples]) -> list[Answer]:
    """Go through the options that were measured: a later one is taken where the interval of the gain is above 0."""
    found: list[Answer] = []
    kept: str | None = None
    for option, case in question.options.items():
        if case not in samples:
            continue
        if kept is None:
            kept = option
            continue
        more = difference(samples[question.options[kept]], samples[case], question.measure)
        better = more.low > 0
        found.append(Answer(kept, option, more, better))
        kept = option if better else kept
    return found


def as_records(samples: Mapping[str, Samples], part: str) -> list[dict[str, Any]]:
    """Each question of a part that at least two measured cases answer, for a results file."""
    records = []
    for question in questions():
        found = answers(question, samples) if question.what.startswith(PART_QUESTIONS[part]) else []
        if found:
            kept = found[-1].tried if found[-1].better else found[-1].kept
            records.append(asdict(question) | {"answers": [asdict(answer) for answer in found], "kept": kept})
    return records
