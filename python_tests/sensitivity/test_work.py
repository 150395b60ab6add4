"""Long work goes on where it stopped, gives the same in several processes, and keeps to its settings."""

import dataclasses
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing

from ldmq_kernels.calibration import SamplingSettings, calibrate
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.sensitivity import analyze
from ldmq_kernels.sensitivity.stored import Stored
from ldmq_kernels.sensitivity.work import Work
from ldmq_kernels.sensitivity.work_folder import WorkError
from python_tests.tiny import PROMPTS, SHALLOW, tiny_pipeline

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)
SCHEMES = ["w8a8-static", "w4a8-dynamic"]


class Killed(Exception):
    pass


def counting(done, stop_at=None):
    def compute(items):
        for item in items:
            if item == stop_at:
                raise Killed
            done.append(item)
            yield item, {"value": item * 2}

    return compute


def run(folder, settings, items, compute):
    work = Work(folder, settings)
    return work.run("stage", items, compute, store=Stored, restore=lambda _item, stored: stored.data, show=False)


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path):
    done = []
    with pytest.raises(Killed):
        run(tmp_path, {"a": 1}, ["x", "y", "z"], counting(done, stop_at="z"))
    results = run(tmp_path, {"a": 1}, ["x", "y", "z"], counting(done))
    assert done == ["x", "y", "z"]
    assert list(results.items()) == [(item, {"value": item * 2}) for item in ("x", "y", "z")]


def test_work_of_other_settings_is_refused_and_kept(tmp_path):
    run(tmp_path, {"steps": 2}, ["x"], counting([]))
    with pytest.raises(WorkError, match=r"another steps \(2, now 3\)"):
        Work(tmp_path, {"steps": 3})
    done = []
    run(tmp_path, {"steps": 2}, ["x"], counting(done))
    assert done == []


def test_work_of_an_earlier_version_is_refused_and_kept(tmp_path):
    (tmp_path / "settings.json").write_text('{"steps": 2}')
    with pytest.raises(WorkError, match="another version of ldmq_kernels: give another folder"):
        Work(tmp_path, {"steps": 2})
    assert (tmp_path / "settings.json").read_text() == '{"steps": 2}'


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None, {}, ["x"], counting([]))
    assert not list(tmp_path.iterdir())


def as_numbers(layer_plan):
    vectors = (layer_plan.smoothing, layer_plan.bias_correction)
    rest = dataclasses.replace(layer_plan, smoothing=None, bias_correction=None)
    return [rest, *(None if vector is None else vector.tolist() for vector in vectors)]


def as_values(analysis):
    """All numbers of an analysis, for comparison to the bit."""
    layers = {
        name: [(c.noise, c.label, c.estimate, *map(as_numbers, (c.layer_plan, *c.judged))) for c in found]
        for name, found in analysis.candidates.items()
    }
    weights = {
        (name, str(c.scheme)): {key: t.tolist() for key, t in c.quantized_layer.state_dict().items()}
        for name, found in analysis.candidates.items()
        for c in found
        if c.quantized_layer is not None
    }
    return layers, weights, analysis.output, analysis.blocks


def run_analysis(folder, work_dir=None):
    torch.set_num_threads(1)
    pipe = tiny_pipeline(folder, **SHALLOW)
    calibration = calibrate(pipe, PROMPTS, SETTINGS)
    found = analyze(pipe, calibration, parse_schemes(SCHEMES), analysed_steps=1, exact=3, work_dir=work_dir)
    return as_values(found)


def run_as(rank, folder):
    """The analysis as one of two processes that share the work."""
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", meeting, timedelta(minutes=5), rank=rank, world_size=2)
    try:
        values = run_analysis(folder / f"tokenizer{rank}", folder / "work")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    return values


def in_process(folder, queue):
    queue.put(run_as(1, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    threads = torch.get_num_threads()
    values = run_analysis(tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(threads)
    return values


@pytest.mark.slow
def test_two_processes_give_the_same_to_the_bit_as_one(tmp_path, alone):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    other = context.Process(target=in_process, args=(tmp_path, queue))
    other.start()
    threads = torch.get_num_threads()
    assert run_as(0, tmp_path) == alone
    torch.set_num_threads(threads)
    assert queue.get(timeout=60) == alone
    other.join(60)
    assert other.exitcode == 0
    assert any(alone[1].values())


def test_an_analysis_that_was_killed_goes_on_and_gives_the_same(tmp_path, alone, monkeypatch):
    from ldmq_kernels.sensitivity import analysis

    search = analysis.LayerSearch.candidates
    calls = []

    def killed(self, schemes):
        calls.append(self.name)
        if len(calls) == 10:
            raise Killed
        return search(self, schemes)

    threads = torch.get_num_threads()
    monkeypatch.setattr(analysis.LayerSearch, "candidates", killed)
    with pytest.raises(Killed):
        run_analysis(tmp_path / "a", tmp_path / "work")
    assert run_analysis(tmp_path / "b", tmp_path / "work") == alone
    torch.set_num_threads(threads)
    assert len(calls) == len(set(calls)) + 1  # only the one that was killed was done again


def test_an_analysis_of_other_prompts_or_another_seed_is_refused_the_work_of_the_first(tmp_path):
    pipe = tiny_pipeline(tmp_path / "a", **SHALLOW)

    def analyzed(calibration):
        return analyze(
            pipe, calibration, parse_schemes(["w8a16"]), analysed_steps=1, exact=0, work_dir=tmp_path / "work"
        )

    first = calibrate(pipe, PROMPTS, SETTINGS)
    analyzed(first)
    with pytest.raises(WorkError, match="another prompts"):
        analyzed(calibrate(pipe, ["something else"], SETTINGS))
    with pytest.raises(WorkError, match="another seed"):
        analyzed(dataclasses.replace(first, settings=dataclasses.replace(SETTINGS, seed=1)))
