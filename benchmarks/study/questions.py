"""What the study asks: a decision each, its options from the simplest on, and what the measurements say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.study.cases import (
    BOTH_SIGNALS,
    BUDGETS,
    DYNAMIC,
    MIXED_BUDGET,
    MODES,
    PARTS,
    SKIP_LISTS,
    SMOOTHQUANT_ALPHA,
    STATIC,
    TIMESTEP,
    W4_BUDGET,
    W4_STATIC,
    own_name,
    planned_words,
    skip_words,
    words,
)
from benchmarks.study.peers import baselines
from benchmarks.study.samples import Interval, Samples, difference

CALIBRATION_QUESTIONS = "calibration of static scales"
FLOAT8_QUESTIONS = "int8 or FP8"
PART_QUESTIONS = {  # how the questions begin that a part of the study answers
    "search": ("activation scales", "smoothing", "search of", "bias correction", "rounding"),
    "calibration": (CALIBRATION_QUESTIONS,),
    "fp8": (FLOAT8_QUESTIONS,),
}


@dataclass(frozen=True)
class Question:
    """A decision between options, cheapest or simplest first; each later one has to be better to be taken.

    Attributes:
        options: words for each option -> the case that stands for it.
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
    without = own_name(words(STATIC, how=f"searched without {part}"))
    return Question(f"search of {part}", {"without": without, f"with {part}": own_name(words(STATIC, how="searched"))})


def _planner_questions(budget: str) -> list[Question]:
    skips = next((s for s in SKIP_LISTS if budget.endswith(s.name)), None)
    scheme = W4_STATIC if budget == W4_BUDGET else STATIC
    before = words(scheme, how="searched") if skips is None else skip_words(skips, "searched")
    by_sqnr, by_both = planned_words(budget), planned_words(budget, BOTH_SIGNALS)
    return [
        Question(f"planner within {budget}", {before: own_name(before), "planned by SQNR": own_name(by_sqnr)}),
        _signals_question(budget, by_sqnr, by_both),
    ]


def _signals_question(budget: str, by_sqnr: str, by_both: str) -> Question:
    options = {"SQNR": own_name(by_sqnr), "SQNR and SSIM": own_name(by_both)}
    return Question(f"signals within {budget}", options, "ssim")


def questions() -> list[Question]:
    """All of them."""
    found = [
        Question(
            f"{CALIBRATION_QUESTIONS}, searched",
            {word: own_name(words(STATIC, mode, "searched")) for mode, word in MODES.items()},
        ),
        Question(
            f"{CALIBRATION_QUESTIONS}, plain",
            {word: own_name(words(STATIC, mode)) for mode, word in MODES.items()},
        ),
        *(
            Question(
                f"activation scales, {how}",
                {s.split("-")[1]: own_name(words(s, how=how)) for s in (STATIC, TIMESTEP, DYNAMIC)},
            )
            for how in ("plain", "searched")
        ),
        *(
            Question(
                f"{FLOAT8_QUESTIONS}, {scale} scales, plain",
                {name: own_name(words(f"{scheme}-{scale}")) for name, scheme in (("FP8", "fp8"), ("int8", "w8a8"))},
            )
            for scale in ("static", "dynamic")
        ),
        Question(
            "smoothing",
            {
                "none": own_name(words(STATIC)),
                f"SmoothQuant {SMOOTHQUANT_ALPHA}": own_name(words(STATIC, how=f"SmoothQuant {SMOOTHQUANT_ALPHA}")),
                "all of the search": own_name(words(STATIC, how="searched")),
            },
        ),
        *(_search_question(part) for part in PARTS),
        Question(
            "bias correction of weights alone",
            {"without": own_name(words("w8a16")), "with": own_name(words("w8a16", how="searched"))},
        ),
        Question(
            "rounding of 4-bit weights",
            {"nearest": own_name(words(W4_STATIC)), "GPTQ": own_name(words(W4_STATIC, how="GPTQ"))},
        ),
    ]
    for budget in BUDGETS:
        found += _planner_questions(budget)
    mixed = [planned_words(MIXED_BUDGET, signals) for signals in (("sqnr",), BOTH_SIGNALS)]
    found.append(_signals_question(MIXED_BUDGET, *mixed))
    return [*found, *_peer_questions()]


def _peer_questions() -> list[Question]:
    """Whether this package has a higher SQNR than a peer on the peer's layers, and within its bytes."""
    found = []
    for peer in baselines():
        name, called = f"{peer.tool}: {peer.configuration}", f"{peer.tool} {peer.configuration}"
        kind = "w8a8 static, all steps" if "calibrated" in peer.configuration else "w8a8 dynamic"
        for words_of_ours, configuration in (
            ("this package, plain, on its layers", f"{kind}, layers of {called}"),
            ("this package, searched, on its layers", f"{kind}, searched, layers of {called}"),
            ("this package, planned on its layers", f"planned on the layers of {called}"),
            ("this package, planned within its bytes", planned_words(f"the bytes of {called}")),
        ):
            found.append(Question(f"beside {called}", {called: name, words_of_ours: own_name(configuration)}))
    return found


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


def as_records(samples: Mapping[str, Samples]) -> list[dict[str, Any]]:
    """Each question that at least two measured cases answer, for a results file."""
    records = []
    for question in questions():
        found = answers(question, samples)
        if found:
            kept = found[-1].tried if found[-1].better else found[-1].kept
            records.append(asdict(question) | {"answers": [asdict(answer) for answer in found], "kept": kept})
    return records
