"""The study: its cases, how it goes on after a stop, and its pages."""

from __future__ import annotations

import copy
import json
import sys
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

from benchmarks import common, own_plans, study, study_cases, study_questions, study_report
from benchmarks.exam import Exam, Sitting, Workbench
from benchmarks.rivals_measure import anatomy
from benchmarks.rivals_tools import OURS, Contender
from benchmarks.samples import MEASURES, interval, value
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.ranges import ALL_STEPS, FIRST_STEP
from ldmq_kernels.calibration.trajectory import SamplingSettings, record_trajectory
from ldmq_kernels.demo.models import build_unet
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.cost import weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.output_noise import output_noise
from python_tests.benchmarks.measured import made_samples

WORDS = "abcdefghijklm"


# -- plans and cases -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(shared_pipe: Any) -> Workbench:
    settings = SamplingSettings(4, 3.0, 0)
    calibration = calibrate(shared_pipe, [WORDS, WORDS[::-1]], settings)
    return Workbench(shared_pipe, calibration, record_trajectory(shared_pipe, [WORDS], replace(settings, seed=9)))


def test_plain_scales_are_the_whole_range_of_their_steps(bench: Workbench) -> None:
    plans = own_plans.OwnPlans(bench)
    text = max(float(call.kwargs["encoder_hidden_states"].abs().amax()) for call in bench.calibration.trajectory.calls)
    for mode, steps in ((FIRST_STEP, slice(0, 1)), (ALL_STEPS, slice(None))):
        plan = plans.plain("w8a8-static", mode)
        for name, choice in plan.layers(bench.unet).items():
            largest = float(bench.calibration.absmax[name][steps].amax())
            wanted = text if name in bench.calibration.text_layers else largest
            assert choice.input_scale == pytest.approx(wanted / 127)
            assert choice.smoothing is None
    assert bench.calibration.text_layers


def test_timestep_scales_are_of_each_group(bench: Workbench) -> None:
    plans = own_plans.OwnPlans(bench)
    plan = plans.plain("w8a8-timestep")
    assert plan.timestep_groups == list(bench.calibration.timestep_groups)
    wanted = [float(row.amax()) / 127 for row in bench.calibration.grouped_absmax("conv_in")]
    assert plan.layer("conv_in").input_scale == pytest.approx(tuple(wanted))


@pytest.mark.slow
def test_a_plan_keeps_its_budget_or_its_noise(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_plans, "ALL_FORMATS", ("w8a8-dynamic", "w4a8-dynamic", "fp16"))
    plans = own_plans.OwnPlans(bench)
    whole = own_plans.float_bytes(bench.unet)
    budget = int(0.4 * whole)
    plan = plans.planned(budget, ("w8a8", "w4a8", "fp16"), study_cases.BOTH_SIGNALS)
    assert own_plans.plan_bytes(bench.unet, plan) <= budget
    schemes = {choice.scheme.format.weight_bits for choice in plan.layers(bench.unet).values()}
    assert 4 in schemes
    reached = plans.reaching(35.0, ("w8a8", "fp16"))
    assert reached.measured["held_out_sqnr_db"] >= 35
    assert own_plans.plan_bytes(bench.unet, reached) < 0.75 * whole
    assert all(choice.scheme.format.weight_bits >= 8 for choice in reached.layers(bench.unet).values())


@pytest.mark.slow
def test_what_the_search_finds_is_less_noisy_than_the_plain_range(bench: Workbench) -> None:
    plans = own_plans.OwnPlans(bench)
    plain, searched = (
        output_noise(own_plans.quantized(bench, plan), bench.calibration.trajectory).mean_db
        for plan in (plans.plain("w4a8-static"), plans.searched("w4a8-static"))
    )
    assert searched > plain


def test_other_tools_layers_are_taken_over(bench: Workbench) -> None:
    plans = own_plans.OwnPlans(bench)
    choices = plans.plain_choices("w8a8-dynamic", plans.whole)
    names = list(choices)
    stored, computed = names[:5], names[:3]
    plan = own_plans.plan_of(bench.unet, own_plans.on_layers(choices, stored, computed), bench.calibration)
    model = own_plans.quantized(bench, plan)
    seen = anatomy(model, bench.unet, bench.calibration.trajectory.calls[0])
    assert (seen.stored, seen.computed) == (frozenset(stored), frozenset(computed))


@pytest.mark.slow
def test_a_plan_on_another_tools_layers_quantizes_exactly_these(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_plans, "ALL_FORMATS", ("w8a8-dynamic", "w8a8x2", "w8a16"))
    plans = own_plans.OwnPlans(bench)
    names = list(quantizable_layers(bench.unet))
    stored, computed = names[:8], names[:5]
    plan = plans.on_layers(stored, computed, 30.0)
    formats = {name: choice.scheme.format.name for name, choice in plan.layers(bench.unet).items()}
    assert {name for name in names if formats[name] == "w8a8"} == set(computed)
    assert {name for name in names if formats[name] == "w8a16"} == set(stored) - set(computed)
    assert all(formats[name] == "fp16" for name in names[8:])
    assert plan.measured["held_out_sqnr_db"] >= 30


def test_patterns_change_only_the_layers_that_they_name(bench: Workbench) -> None:
    plans = own_plans.OwnPlans(bench)
    choices = plans.plain_choices("w8a8-dynamic", plans.whole)
    changed = own_plans.except_for(choices, ("conv_in", "*.ff.net.2"), own_plans.WEIGHT_ONLY)
    different = {name for name in choices if changed[name] is not choices[name]}
    assert different == {name for name in choices if name == "conv_in" or name.endswith(".ff.net.2")}


def test_a_simulated_model_is_counted_as_what_it_stands_for(bench: Workbench) -> None:
    model = copy.deepcopy(bench.unet)
    on, off = SimpleNamespace(is_enabled=True), SimpleNamespace(is_enabled=False)
    for name, quantizer in (("conv_in", on), ("conv_out", off)):
        layer = model.get_submodule(name)
        layer.weight_quantizer, layer.input_quantizer = on, quantizer
    seen = anatomy(model, bench.unet, bench.calibration.trajectory.calls[0])
    assert seen.simulated
    assert (seen.stored, seen.computed) == (frozenset({"conv_in", "conv_out"}), frozenset({"conv_in"}))
    whole = anatomy(bench.unet, bench.unet, bench.calibration.trajectory.calls[0])
    layers = quantizable_layers(bench.unet)
    saved = sum(
        weight_bytes(layers[name], SCHEMES["fp16"]) - weight_bytes(layers[name], SCHEMES[scheme])
        for name, scheme in (("conv_in", "w8a8-static"), ("conv_out", "w8a16"))
    )
    assert seen.bytes == whole.bytes - saved


def test_cases_have_names_of_their_own_and_questions_ask_for_them() -> None:
    names = [case.name for case in study_cases.cases()]
    assert len(set(names)) == len(names)
    for question in study_questions.questions():
        if not question.what.startswith("beside "):
            assert set(question.options.values()) <= set(names), question.what


def test_followers_of_a_peer_are_what_the_questions_ask_for() -> None:
    asked = {case for question in study_questions.questions() for case in question.options.values()}
    peers = [case for case in study_cases.cases() if case.section == study_cases.PEERS]
    row = {"layers": {"stored": ["a"], "computed": ["a"], "bytes_fp16": 9}, "figures": {"share_of_fp16": 0.5}}
    for peer in peers:
        following = study_cases.followers(peer, row, set())
        assert {case.name for case in following} <= asked
        assert len(following) == 4
    known: set[Any] = set()
    assert sum(len(study_cases.followers(peer, row, known)) for peer in peers) < 4 * len(peers)


def test_published_lists_name_layers_of_the_demo_model() -> None:
    names = list(quantizable_layers(build_unet()))
    absent = {"*add_embedding*", "*pos_embed*", "*time_text_embed*", "*context_embedder*", "*norm_out*", "*x_embedder*"}
    for skips in study_cases.SKIP_LISTS:
        for pattern in set(skips.patterns) - absent:
            assert any(fnmatchcase(name, pattern) for name in names), pattern


# -- running -------------------------------------------------------------------------------------------------


@pytest.fixture
def exam(bench: Workbench) -> Exam:
    settings = SamplingSettings(2, 3.0, 50)
    sittings = []
    for seed in (50, 60):
        trajectory = record_trajectory(bench.pipe, [WORDS, WORDS[::-1], WORDS], replace(settings, seed=seed))
        sittings.append(Sitting(replace(settings, seed=seed), trajectory, torch.zeros(3, 3, 16, 16)))
    captions = [(text, None) for text in (WORDS, WORDS[::-1], WORDS)]
    return Exam(bench.pipe, bench.unet, captions, sittings, None)  # type: ignore[arg-type]


def test_the_float_model_has_no_noise_and_pictures_differ_from_black(bench: Workbench, exam: Exam) -> None:
    samples = exam.sit(bench.unet)
    assert samples.arrays["output_noise"].shape == (3, 2, 2)
    assert not samples.arrays["output_noise"].any()
    assert not samples.arrays["latent_noise"].any()
    assert bool((samples.arrays["squared_error"] > 0).all())
    exact = sum(float(call.output.double().square().sum()) for s in exam.sittings for call in s.trajectory.calls)
    assert samples.arrays["output_signal"].sum() == pytest.approx(exact)
    assert bench.pipe.unet is bench.unet


def _case(name: str, build: Callable[[Workbench], nn.Module]) -> study_cases.Case:
    return study_cases.Case(study_cases.FORMATS, Contender(OURS, name, build))


def test_a_stopped_study_goes_on_where_it_was(
    bench: Workbench, exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def make(name: str, fails: bool = False) -> study_cases.Case:
        def build(bench: Workbench) -> nn.Module:
            built.append(name)
            if fails:
                raise RuntimeError("no such layer")
            return own_plans.quantized(bench, own_plans.OwnPlans(bench).plain("w8a16"))

        return _case(name, build)

    path, settings, console = tmp_path / "rows.jsonl", {"captions": 3}, Console(quiet=True)
    planned = [make("one"), make("two", fails=True)]
    rows = list(study.Study(path, settings, console).run(planned, bench, exam))
    assert [row["failed"] for row in rows] == [None, "RuntimeError: no such layer"]
    assert 20 < rows[0]["figures"]["sqnr_db"]["value"] < 80
    with path.open("a") as file:
        file.write('{"what": "study", "ro')  # killed while it wrote
    list(study.Study(path, settings, console).run([*planned, make("three")], bench, exam))
    assert built == ["one", "two", "two", "three"]
    monkeypatch.setattr(study, "machine", lambda: {"device": "d", "torch": "t", "commit": "another"})
    list(study.Study(path, settings, console).run([make("one")], bench, exam))
    list(study.Study(path, settings | {"captions": 4}, console).run([make("one")], bench, exam))
    assert built[4:] == ["one", "one"]


# -- answers and pages ---------------------------------------------------------------------------------------


def test_a_later_option_has_to_be_better_to_be_taken() -> None:
    samples = {name: made_samples(louder=louder) for name, louder in (("a", 1.0), ("b", 1.0), ("c", 0.5), ("d", 0.6))}
    options = {name.upper(): name for name in "abcxd"}
    found = study_questions.answers(study_questions.Question("what", options), samples)
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
        section = next(c.section for c in study_cases.cases() if c.name == name)
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
    questions = study_questions.as_records(kept)
    return head | {
        "settings": settings,
        "float": {"attribute_accuracy": 0.9, "feature_variance": 70.0},
        "rows": rows,
        "questions": questions,
    }


def test_the_pages_tell_every_case_and_what_did_not_help(tmp_path: Path) -> None:
    plain, searched = (study_cases.own_name(study_cases.words(s)) for s in ("w8a8-static", "w8a8-timestep"))
    data = _data([plain, searched, "sdnq: as it comes", "torchao: weight-only"], failed="RuntimeError: missing")
    page = study_report.text(data)
    for row in data["rows"]:
        assert row["configuration"] in page
    assert "failed, RuntimeError: missing" in page
    (question,) = [q for q in data["questions"] if q["what"] == "activation scales, plain"]
    negative = page.split("## What did not help")[1].split("##")[0]
    assert ("timestep is" in negative) == (not question["answers"][0]["better"])
    assert f"**{question['kept']}**" in page
    written = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        results = tmp_path / "results.json"
        results.write_text(json.dumps(data))
        written.append([path.read_bytes() for path in study_report.write(results, folder)])
    assert written[0] == written[1]
    assert b"sdnq, as it comes" in written[0][1]


def test_no_results_are_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.study"):
        study_report.newest()


@pytest.mark.slow
def test_the_quick_study_writes_results_and_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    docs = tmp_path / "docs"
    command = ["study", "--quick", "--rows", str(tmp_path / "rows.jsonl"), "--docs", str(docs)]
    monkeypatch.setattr(sys, "argv", command)
    study.main()
    data = json.loads(study_report.newest().read_text())
    assert [row["failed"] for row in data["rows"]] == [None, None]
    assert not any("samples" in row for row in data["rows"])
    first = {path.name: path.read_bytes() for path in docs.iterdir()}
    assert set(first) == {"study.md", "study.svg"}
    monkeypatch.setattr(sys, "argv", ["study", "--report", "--docs", str(docs)])
    study.main()
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == first
