"""The study: its cases, how it goes on after a stop, and its pages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.harness import results
from benchmarks.study import cases, own_plans, questions, report, run
from benchmarks.study.evaluation import Evaluation, SeedSet, Setup
from benchmarks.study.inspect_model import inspect_model
from benchmarks.study.samples import MEASURES, interval, value
from benchmarks.study.subjects import DEMO, SUBJECTS
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP, MODES
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.models import build_unet
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.plans.cost import weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.output_noise import output_noise
from python_tests.benchmarks.study.synthetic import made_samples

WORDS = "abcdefghijklm"


# -- plans and cases -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup(shallow_pipe: Any) -> Setup:
    settings = SamplingSettings(4, 3.0, 0)
    calibration = calibrate(shallow_pipe, [WORDS, WORDS[::-1]], settings)
    return Setup(shallow_pipe, calibration, record_trajectory(shallow_pipe, [WORDS], replace(settings, seed=9)))


def test_plain_scales_are_the_whole_range_of_their_steps(setup: Setup) -> None:
    plans = own_plans.OwnPlans(setup)
    text = max(float(call.kwargs["encoder_hidden_states"].abs().amax()) for call in setup.calibration.trajectory.calls)
    for mode, steps in ((FIRST_STEP, slice(0, 1)), (ALL_STEPS, slice(None))):
        plan = plans.plain("w8a8-static", mode)
        for name, choice in plan.layers(setup.unet).items():
            largest = float(setup.calibration.absmax[name][steps].amax())
            wanted = text if name in setup.calibration.text_layers else largest
            assert choice.input_scale == pytest.approx(wanted / 127)
            assert choice.smoothing is None
    assert setup.calibration.text_layers


def test_timestep_scales_are_of_each_group(setup: Setup) -> None:
    plans = own_plans.OwnPlans(setup)
    plan = plans.plain("w8a8-timestep")
    assert plan.timestep_groups == list(setup.calibration.timestep_groups)
    wanted = [float(row.amax()) / 127 for row in setup.calibration.grouped_absmax("conv_in")]
    assert plan.layer("conv_in").input_scale == pytest.approx(tuple(wanted))


@pytest.mark.slow
def test_a_plan_keeps_the_bytes_of_a_list(setup: Setup) -> None:
    plans = own_plans.OwnPlans(setup)
    budget = int(0.6 * sum(weight_bytes(layer, FLOAT) for layer in quantizable_layers(setup.unet).values()))
    plan = plans.planned(budget, cases.BOTH_SIGNALS)
    assert 0.9 * budget < own_plans.plan_bytes(setup.unet, plan) <= budget
    assert {str(choice.scheme) for choice in plan.layers(setup.unet).values()} == set(own_plans.LISTED)


@pytest.mark.slow
def test_what_the_search_finds_is_less_noisy_than_the_plain_range(setup: Setup) -> None:
    plans = own_plans.OwnPlans(setup)
    plain, searched = (
        output_noise(own_plans.quantized(setup, plan), setup.calibration.trajectory).mean_db
        for plan in (plans.plain("w4a8-static"), plans.searched("w4a8-static"))
    )
    assert searched > plain


def test_other_tools_layers_are_taken_over(setup: Setup) -> None:
    plans = own_plans.OwnPlans(setup)
    choices = plans.plain_choices("w8a8-dynamic", plans.whole)
    names = list(choices)
    stored, computed = names[:5], names[:3]
    plan = own_plans.plan_of(setup.unet, own_plans.on_layers(choices, stored, computed), setup.calibration)
    model = own_plans.quantized(setup, plan)
    seen = inspect_model(model, setup.unet, setup.calibration.trajectory.calls[0])
    assert (seen.stored, seen.computed) == (frozenset(stored), frozenset(computed))


def test_layers_of_a_list_stay_in_float(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    plans, skips = own_plans.OwnPlans(setup), cases.SkipList("a list", ("conv_in", "*.ff.net.2"), "somewhere")
    monkeypatch.setattr(plans, "searched_choices", lambda scheme: plans.plain_choices(scheme, plans.whole))
    choices = cases._skipping(plans, skips).layers(setup.unet)
    kept = {name for name, choice in choices.items() if not choice.scheme.quantizes}
    assert kept == {name for name in choices if name == "conv_in" or name.endswith(".ff.net.2")}


def test_a_simulated_model_is_counted_as_what_it_stands_for(setup: Setup) -> None:
    model = copy.deepcopy(setup.unet)
    on, off = SimpleNamespace(is_enabled=True), SimpleNamespace(is_enabled=False)
    for name, quantizer in (("conv_in", on), ("conv_out", off)):
        layer = model.get_submodule(name)
        layer.weight_quantizer, layer.input_quantizer = on, quantizer
    seen = inspect_model(model, setup.unet, setup.calibration.trajectory.calls[0])
    assert seen.simulated
    assert (seen.stored, seen.computed) == (frozenset({"conv_in", "conv_out"}), frozenset({"conv_in"}))
    whole = inspect_model(setup.unet, setup.unet, setup.calibration.trajectory.calls[0])
    layers = quantizable_layers(setup.unet)
    saved = sum(
        weight_bytes(layers[name], SCHEMES["fp16"]) - weight_bytes(layers[name], SCHEMES[scheme])
        for name, scheme in (("conv_in", "w8a8-static"), ("conv_out", "w8a16"))
    )
    assert seen.bytes == whole.bytes - saved


def test_cases_have_names_of_their_own_and_questions_ask_for_them() -> None:
    names = [case.configuration for case in cases.cases()]
    assert len(set(names)) == len(names)
    asked = {case for question in questions.questions() for case in question.options.values()}
    assert asked == set(names)


def test_published_lists_name_layers_of_the_demo_model() -> None:
    names = list(quantizable_layers(build_unet()))
    absent = {"*add_embedding*", "*pos_embed*", "*time_text_embed*", "*context_embedder*", "*norm_out*", "*x_embedder*"}
    for skips in cases.SKIP_LISTS:
        for pattern in set(skips.patterns) - absent:
            assert any(replace(skips, patterns=(pattern,)).has(name) for name in names), pattern


# -- running -------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(setup: Setup) -> Evaluation:
    settings = SamplingSettings(2, 3.0, 50)
    seed_sets = []
    for seed in (50, 60):
        trajectory = record_trajectory(setup.pipe, [WORDS, WORDS[::-1], WORDS], replace(settings, seed=seed))
        seed_sets.append(SeedSet(replace(settings, seed=seed), trajectory, torch.zeros(3, 3, 16, 16)))
    captions = [(text, None) for text in (WORDS, WORDS[::-1], WORDS)]
    return Evaluation(setup.pipe, setup.unet, captions, seed_sets, None)  # type: ignore[arg-type]


def test_the_float_model_has_no_noise_and_pictures_differ_from_black(setup: Setup, evaluation: Evaluation) -> None:
    samples = evaluation.evaluate(setup.unet)
    assert samples.arrays["output_noise"].shape == (3, 2, 2)
    assert not samples.arrays["output_noise"].any()
    assert not samples.arrays["latent_noise"].any()
    assert bool((samples.arrays["squared_error"] > 0).all())
    exact = sum(float(call.output.double().square().sum()) for s in evaluation.seed_sets for call in s.trajectory.calls)
    assert samples.arrays["output_signal"].sum() == pytest.approx(exact)
    assert setup.pipe.unet is setup.unet


def _case(name: str, build: Callable[[Setup], nn.Module]) -> cases.Case:
    return cases.Case(name, build)


def test_a_stopped_study_goes_on_where_it_was(
    setup: Setup, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def make(name: str, fails: bool = False) -> cases.Case:
        def build(setup: Setup) -> nn.Module:
            built.append(name)
            if fails:
                raise RuntimeError("no such layer")
            return own_plans.quantized(setup, own_plans.OwnPlans(setup).plain("w8a16"))

        return _case(name, build)

    path, settings, console = tmp_path / "rows.jsonl", {"captions": 3}, Console(quiet=True)
    planned = [make("one"), make("two", fails=True)]

    def measure(planned: list[cases.Case], settings: dict[str, Any]) -> list[dict[str, Any]]:
        study = run.Study(path, settings, console)
        return [study.row(case, setup, evaluation) for case in planned]

    rows = measure(planned, settings)
    assert [row["failed"] for row in rows] == [None, "RuntimeError: no such layer"]
    assert 20 < rows[0]["figures"]["sqnr_db"]["value"] < 80
    with path.open("a") as file:
        file.write('{"what": "study", "ro')  # killed while it wrote
    measure([*planned, make("three")], settings)
    assert built == ["one", "two", "two", "three"]
    monkeypatch.setattr(run, "machine", lambda: {"device": "d", "torch": "t", "commit": "another"})
    measure([make("one")], settings)
    measure([make("one")], settings | {"captions": 4})
    assert built[4:] == ["one", "one"]


# -- answers and pages ---------------------------------------------------------------------------------------


def test_a_later_option_has_to_be_better_to_be_taken() -> None:
    samples = {name: made_samples(louder=louder) for name, louder in (("a", 1.0), ("b", 1.0), ("c", 0.5), ("d", 0.6))}
    options = {name.upper(): name for name in "abcxd"}
    found = questions.answers(questions.Question("what", options), samples)
    assert [(answer.kept, answer.tried, answer.better) for answer in found] == [
        ("A", "B", False),
        ("A", "C", True),
        ("C", "D", False),
    ]
    assert found[2].more.high < 0


def _data(names: list[str], part: str, failed: str | None = None) -> dict[str, Any]:
    rows = []
    for place, name in enumerate(names):
        samples = made_samples(place)
        counts = {"all": 3, "stored": 2, "computed": 1}
        figures = {"convolutions": counts, "linears": counts, "share_of_fp16": 0.5 + 0.01 * place, "bytes": 10}
        figures |= {key: vars(interval(samples, key)) for key in MEASURES}
        figures["by_seed_set"] = {
            key: [value(samples.of_seed_set(i), m) for i in range(3)] for key, m in MEASURES.items()
        }
        row = {"configuration": name, "note": "", "source": "", "failed": None}
        rows.append(row | {"figures": figures})
    if failed:
        rows[-1] |= {"failed": failed}
        del rows[-1]["figures"]
    kept = {row["configuration"]: made_samples(place) for place, row in enumerate(rows) if row["failed"] is None}
    head = {"device": "a device", "torch": "2", "date": "2026-01-01", "commit": "c" * 40}
    settings = {"captions": 7, "seed_sets": 3, "steps": 4, "model": DEMO, "part": part}
    return head | {
        "settings": settings,
        "float": {"attribute_accuracy": 0.9, "feature_variance": 70.0},
        "rows": rows,
        "questions": questions.as_records(kept, part),
    }


def test_the_page_tells_every_case_and_what_did_not_help(tmp_path: Path) -> None:
    names = [cases.words(s) for s in ("w8a8-static", "w8a8-timestep", "w8a8-dynamic")]
    data = _data(names, "search", failed="RuntimeError: missing")
    page = report.text(data)
    assert all(f"| {name} |" in page for name in names)
    assert "failed, RuntimeError: missing" in page
    (question,) = [q for q in data["questions"] if q["what"] == "activation scales, plain"]
    negative = page.split("## What did not help")[1].split("##")[0]
    assert ("timestep is" in negative) == (not question["answers"][0]["better"])
    assert f"**{question['kept']}**" in page
    measured = tmp_path / "results.json"
    measured.write_text(json.dumps(data))
    one, two = (report.write([measured], tmp_path / folder).read_text() for folder in ("one", "two"))
    assert one == two
    assert page.strip() in one


def test_a_part_of_the_study_has_its_cases_and_its_question_alone() -> None:
    planned = [case.configuration for case in run.of_part(cases.cases(), "calibration")]
    assert set(planned) == {cases.words("w8a8-static", mode, how) for mode in MODES for how in ("plain", "searched")}
    data = _data(planned, "calibration")
    page = report.text(data)
    assert "python -m benchmarks study --part calibration" in page
    assert "drawn steps against" in page
    assert all(f"| {name} |" in report.table(data) for name in planned)


def test_a_part_may_answer_several_questions() -> None:
    planned = [case.configuration for case in run.of_part(cases.cases(), "search")]
    assert cases.words("w8a8-dynamic", how="searched") in planned
    assert cases.words("w4a8-static", how="GPTQ") in planned
    assert not [configuration for configuration in planned if "fp8" in configuration or "planned" in configuration]
    assert len(planned) == len(set(planned))


def test_one_seed_set_has_no_distance_to_another() -> None:
    data = _data([cases.words("w8a8-static")], "search")
    assert "## Seeds" in report.text(data)
    data["settings"]["seed_sets"] = 1
    page = report.text(data)
    assert "## Seeds" not in page
    assert "in 1 set of seeds" in page


def test_no_results_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m benchmarks study"):
        report.write_newest(tmp_path)


def test_a_part_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main([])
    assert "give --part, one of search, calibration, fp8, lists, or --report" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", SUBJECTS)
def test_a_part_writes_results_and_the_page(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(SUBJECTS, model, replace(SUBJECTS[model], steps=3))
    two = [case for case in cases.cases(model) if case.configuration.startswith("fp8")]
    monkeypatch.setattr(run, "cases", lambda _model: two)
    docs = tmp_path / "docs"
    arguments = ["--part", "fp8", "--model", model, "--captions", "4"]
    run.main([*arguments, "--rows", str(tmp_path / "rows.jsonl"), "--docs", str(docs)])
    (path,) = (tmp_path / "results").glob(f"*/*-{questions.kind_of(SUBJECTS[model], 'fp8')}.json")
    data = json.loads(path.read_text())
    assert [row["failed"] for row in data["rows"]] == [None, None]
    assert not any("samples" in row for row in data["rows"])
    assert data["settings"]["model"] == model
    page = (docs / "study.md").read_text()
    assert SUBJECTS[model].words in page
    run.main(["--report", "--docs", str(docs)])
    assert (docs / "study.md").read_text() == page
