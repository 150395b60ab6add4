"""The study: its cases, how it goes on after a stop, and its pages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
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
from benchmarks.study.peers import OURS, Quantization
from benchmarks.study.samples import MEASURES, interval, value
from benchmarks.study.subjects import DEMO, SUBJECTS
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP, MODES
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.models import build_unet
from ldmq_kernels.numerics.formats import SCHEMES
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
def test_a_plan_keeps_its_budget_or_its_noise(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_plans, "ALL_FORMATS", ("w8a8-dynamic", "w4a8-dynamic", "fp16"))
    plans = own_plans.OwnPlans(setup)
    whole = own_plans.float_bytes(setup.unet)
    budget = int(0.4 * whole)
    plan = plans.planned(budget, ("w8a8", "w4a8", "fp16"), cases.BOTH_SIGNALS)
    assert own_plans.plan_bytes(setup.unet, plan) <= budget
    schemes = {choice.scheme.format.name for choice in plan.layers(setup.unet).values()}
    assert "w4a8" in schemes
    reached = plans.reaching(35.0, ("w8a8", "fp16"))
    assert reached.measured["held_out_sqnr_db"] >= 35
    assert own_plans.plan_bytes(setup.unet, reached) < 0.75 * whole
    assert all(not choice.scheme.format.weight.is_coarse for choice in reached.layers(setup.unet).values())


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


@pytest.mark.slow
def test_a_plan_on_another_tools_layers_quantizes_exactly_these(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_plans, "ALL_FORMATS", ("w8a8-dynamic", "w8a8x2", "w8a16"))
    plans = own_plans.OwnPlans(setup)
    names = list(quantizable_layers(setup.unet))
    stored, computed = names[:8], names[:5]
    plan = plans.on_layers(stored, computed, 30.0)
    formats = {name: choice.scheme.format.name for name, choice in plan.layers(setup.unet).items()}
    assert {name for name in names if formats[name] == "w8a8"} == set(computed)
    assert {name for name in names if formats[name] == "w8a16"} == set(stored) - set(computed)
    assert all(formats[name] == "fp16" for name in names[8:])
    assert plan.measured["held_out_sqnr_db"] >= 30


def test_patterns_change_only_the_layers_that_they_name(setup: Setup) -> None:
    plans = own_plans.OwnPlans(setup)
    choices = plans.plain_choices("w8a8-dynamic", plans.whole)
    changed = own_plans.except_for(choices, ("conv_in", "*.ff.net.2"), own_plans.WEIGHT_ONLY)
    different = {name for name in choices if changed[name] is not choices[name]}
    assert different == {name for name in choices if name == "conv_in" or name.endswith(".ff.net.2")}


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
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names)
    for question in questions.questions():
        if not question.what.startswith("beside "):
            assert set(question.options.values()) <= set(names), question.what


def test_followers_of_a_peer_are_what_the_questions_ask_for() -> None:
    asked = {case for question in questions.questions() for case in question.options.values()}
    peers = [case for case in cases.cases() if case.section == cases.PEERS]
    row = {"layers": {"stored": ["a"], "computed": ["a"], "bytes_fp16": 9}, "figures": {"share_of_fp16": 0.5}}
    for peer in peers:
        following = cases.followers(peer, row, set())
        assert {case.name for case in following} <= asked
        assert len(following) == 4
    known: set[Any] = set()
    assert sum(len(cases.followers(peer, row, known)) for peer in peers) < 4 * len(peers)


def test_published_lists_name_layers_of_the_demo_model() -> None:
    names = list(quantizable_layers(build_unet()))
    absent = {"*add_embedding*", "*pos_embed*", "*time_text_embed*", "*context_embedder*", "*norm_out*", "*x_embedder*"}
    for skips in cases.SKIP_LISTS:
        for pattern in set(skips.patterns) - absent:
            assert any(fnmatchcase(name, pattern) for name in names), pattern


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
    return cases.Case(cases.FORMATS, Quantization(OURS, name, build))


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
    rows = list(run.Study(path, settings, console).run(planned, setup, evaluation))
    assert [row["failed"] for row in rows] == [None, "RuntimeError: no such layer"]
    assert 20 < rows[0]["figures"]["sqnr_db"]["value"] < 80
    with path.open("a") as file:
        file.write('{"what": "study", "ro')  # killed while it wrote
    list(run.Study(path, settings, console).run([*planned, make("three")], setup, evaluation))
    assert built == ["one", "two", "two", "three"]
    monkeypatch.setattr(run, "machine", lambda: {"device": "d", "torch": "t", "commit": "another"})
    list(run.Study(path, settings, console).run([make("one")], setup, evaluation))
    list(run.Study(path, settings | {"captions": 4}, console).run([make("one")], setup, evaluation))
    assert built[4:] == ["one", "one"]


def test_some_cases_are_chosen_by_their_words() -> None:
    of_static, everything = (run.fitting(cases.cases(), patterns) for patterns in (["w8a8 static, all*plain"], ["*"]))
    assert {case.quantization.configuration for case in of_static} == {cases.words("w8a8-static")}
    assert [case.name for case in everything] == [case.name for case in cases.cases()]
    with pytest.raises(SystemExit, match=r"w9a9.*there are w8a16, plain"):
        run.fitting(cases.cases(), ["w9a9"])


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


def _data(names: list[str], failed: str | None = None) -> dict[str, Any]:
    rows = []
    for place, name in enumerate(names):
        samples = made_samples(place)
        section = next(c.section for c in cases.cases() if c.name == name)
        tool, configuration = name.split(": ", 1)
        counts = {"all": 3, "stored": 2, "computed": 1}
        figures = {"convolutions": counts, "linears": counts, "share_of_fp16": 0.5 + 0.01 * place, "bytes": 10}
        figures |= {key: vars(interval(samples, key)) for key in MEASURES}
        figures["by_seed_set"] = {
            key: [value(samples.of_seed_set(i), m) for i in range(3)] for key, m in MEASURES.items()
        }
        row = {
            "section": section,
            "tool": tool,
            "configuration": configuration,
            "note": "",
            "source": "",
            "version": "1",
        }
        rows.append(row | {"name": name, "failed": None, "figures": figures})
    if failed:
        rows[-1] |= {"failed": failed}
        del rows[-1]["figures"]
    kept = {row["name"]: made_samples(place) for place, row in enumerate(rows) if row["failed"] is None}
    head = {"device": "a device", "torch": "2", "date": "2026-01-01", "commit": "c" * 40}
    settings = {"captions": 7, "seed_sets": 3, "steps": 4}
    return head | {
        "settings": settings,
        "float": {"attribute_accuracy": 0.9, "feature_variance": 70.0},
        "rows": rows,
        "questions": questions.as_records(kept),
    }


def test_the_pages_tell_every_case_and_what_did_not_help(tmp_path: Path) -> None:
    plain, searched = (cases.own_name(cases.words(s)) for s in ("w8a8-static", "w8a8-timestep"))
    data = _data([plain, searched, "sdnq: as it comes", "torchao: weight-only"], failed="RuntimeError: missing")
    page = report.text(data)
    for row in data["rows"]:
        assert row["configuration"] in page
    assert "failed, RuntimeError: missing" in page
    (question,) = [q for q in data["questions"] if q["what"] == "activation scales, plain"]
    negative = page.split("## What did not help")[1].split("##")[0]
    assert ("timestep is" in negative) == (not question["answers"][0]["better"])
    assert f"**{question['kept']}**" in page
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        measured = tmp_path / "results.json"
        measured.write_text(json.dumps(data))
        written.append([path.read_bytes() for path in report.write([measured], folder)])
    assert written[0] == written[1]
    assert b"sdnq, as it comes" in written[0][1]


def test_a_part_of_the_study_has_its_cases_and_its_question_alone(tmp_path: Path) -> None:
    planned = run.of_part(cases.cases(), "calibration")
    modes = {case.quantization.configuration for case in planned}
    assert modes == {cases.words("w8a8-static", mode, how) for mode in MODES for how in ("plain", "searched")}
    data = _data([case.name for case in planned])
    data["settings"]["part"] = "calibration"
    page = report.text(data)
    assert "python -m benchmarks study --part calibration" in page
    assert "## What the defaults should be" in page
    assert "drawn steps against" in page
    assert not {f"## {title}" for title in cases.SECTIONS.values()} & set(page.splitlines())
    measured = tmp_path / "results.json"
    measured.write_text(json.dumps(data))
    assert report.write([measured], tmp_path / "docs") == [tmp_path / "docs" / report.PAGE]
    for case in planned:
        assert f"| {case.quantization.configuration} |" in report.table(data)


def test_a_part_may_answer_several_questions() -> None:
    planned = [case.quantization.configuration for case in run.of_part(cases.cases(), "search")]
    assert cases.words("w8a8-dynamic", how="searched") in planned
    assert cases.words("w4a8-static", how="GPTQ") in planned
    assert not [configuration for configuration in planned if "fp8" in configuration or "planned" in configuration]
    assert len(planned) == len(set(planned))


def test_a_few_cases_are_kept_and_are_no_study(
    setup: Setup, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "prepare", lambda *_arguments, **_options: (setup, evaluation))
    monkeypatch.setattr(run, "quick_cases", lambda: [_case("w8a16, plain", lambda s: s.unet)])
    rows = tmp_path / "rows.jsonl"
    run.main(["--quick", "--only", "w8a16*", "--rows", str(rows), "--docs", str(tmp_path / "docs")])
    assert len(rows.read_text().splitlines()) == 1
    assert not (tmp_path / "results").exists()
    assert "1 cases" in capsys.readouterr().out


def test_one_seed_set_has_no_distance_to_another() -> None:
    data = _data([cases.own_name(cases.words("w8a8-static"))])
    assert "## Seeds" in report.text(data)
    data["settings"]["seed_sets"] = 1
    page = report.text(data)
    assert "## Seeds" not in page
    assert "in 1 set of seeds" in page


def test_no_results_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m benchmarks study"):
        report.newest(SUBJECTS[DEMO])


@pytest.mark.slow
def test_the_quick_study_writes_results_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    docs = tmp_path / "docs"
    run.main(["--quick", "--rows", str(tmp_path / "rows.jsonl"), "--docs", str(docs)])
    data = json.loads(report.newest(SUBJECTS[DEMO]).read_text())
    assert [row["failed"] for row in data["rows"]] == [None, None]
    assert not any("samples" in row for row in data["rows"])
    first = {path.name: path.read_bytes() for path in docs.iterdir()}
    assert set(first) == {"study.md", "study.svg"}
    run.main(["--report", "--docs", str(docs)])
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == first
