"""The run on a GPU machine: jobs in time, one failure stops no other, a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import on_gpu
from benchmarks.__main__ import COMMANDS
from benchmarks.gpu_run import install, jobs, runner
from benchmarks.gpu_run.jobs import Job
from benchmarks.gpu_run.runner import run
from benchmarks.harness.results import OPS

ADD = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "SMALLEST_JOB", 0.5)
    monkeypatch.setattr(runner, "ROOT", tmp_path)


def script(name: str, text: str, *arguments: str, limit: float = 60) -> Job:
    return Job(name, ("-c", text, *arguments), limit, 1)


# -- against a clock that is made of what jobs take -------------------------------------------------------------


class Simulated:
    """A machine on which a job takes as long as a function says; it tells when each began and ended."""

    def __init__(self, seconds_of: Callable[[Job], float]) -> None:
        self.seconds_of, self.time = seconds_of, 0.0
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    def now(self) -> float:
        return self.time

    def start(self, job: Job) -> Job:
        self.began[job.name] = self.time
        return job

    def wait(self, handle: Job, seconds: float) -> int | None:
        end = self.began[handle.name] + self.seconds_of(handle)
        if end > self.time + seconds:
            self.time += max(0.0, seconds)
            return None
        self.time = max(self.time, end)
        self.ended[handle.name] = end
        return 0

    def kill(self, handle: Job) -> None:
        pass

    def progress(self) -> int:
        return 0

    def log_of(self, handle: Job) -> str:
        return ""


def assumed(prebuilt: bool) -> Simulated:
    return Simulated(lambda job: jobs.PREBUILT_SECONDS if prebuilt and job.name == "CUDA kernels" else job.expected)


@pytest.mark.parametrize("prebuilt", [True, False])
def test_sdxl_is_measured_within_the_time_to_prove_when_jobs_take_what_is_assumed(
    prebuilt: bool, tmp_path: Path
) -> None:
    machine = assumed(prebuilt)
    state = run(jobs.PROVE, jobs.PROVE_SECONDS, tmp_path, machine)
    assert set(state.values()) == {"passed"}
    assert max(machine.ended.values()) <= 240
    proofs = ["every kernel of Triton", "every kernel of CUDA", "sanitizer"]
    # what waits for nvcc comes after the headline, and nothing else
    before = [name for name in proofs if machine.ended[name] <= machine.began[jobs.HEADLINE]]
    assert before == (proofs if prebuilt else proofs[:1])


@pytest.mark.parametrize("slow", ["all", "CUDA kernels"])
def test_sdxl_has_its_time_even_when_every_job_before_it_takes_all_of_its_own(slow: str, tmp_path: Path) -> None:
    machine = Simulated(
        lambda job: job.expected if job.name == jobs.HEADLINE or slow not in ("all", job.name) else 10_000
    )
    run(jobs.PROVE, jobs.PROVE_SECONDS, tmp_path, machine)
    assert machine.ended[jobs.HEADLINE] < 240


@pytest.mark.parametrize("prebuilt", [True, False])
def test_the_unets_and_the_two_main_ops_are_measured_in_the_time_to_measure(prebuilt: bool, tmp_path: Path) -> None:
    machine = assumed(prebuilt)
    run(jobs.MEASURE, jobs.MEASURE_SECONDS, tmp_path, machine)
    order = ["compile ahead", "tuning", "model sdxl", "model sd15", "linear_w8a8", "conv2d_w8a8"]
    assert [name for name in machine.began if name in order] == order
    assert machine.ended[order[-1]] <= 480


def test_jobs_that_wait_for_the_background_let_others_go_first(tmp_path: Path) -> None:
    build = Job("build", (), 100, 30, background=True)
    machine = Simulated(lambda job: job.expected)
    run((build, Job("needs it", (), 9, 5, after=("build",)), Job("other", (), 9, 5)), 200, tmp_path, machine)
    assert machine.began == {"build": 0, "other": 0, "needs it": 30}


# -- processes --------------------------------------------------------------------------------------------------


def test_jobs_run_in_order_and_a_failed_one_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    wrong = script("wrong", "import sys; print('what went wrong'); sys.exit(3)")
    state = run((script("first", ADD, "{rows}", "1"), wrong, script("last", ADD, "{rows}", "2")), 120, out)
    assert state == {"first": "passed", "wrong": "failed (3)", "last": "passed"}
    assert (out / "rows.jsonl").read_text() == "12"
    assert "what went wrong" in (out / "log.txt").read_text()
    assert "what went wrong" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} <= set(runner.FILES)
    assert len(runner.FILES) <= 6


@pytest.mark.slow
def test_a_job_over_its_limit_is_cut_short_with_its_children_and_none_starts_when_time_is_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sleep = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    parent = "import subprocess, sys; print('under way', flush=True); "
    parent += f"subprocess.run([sys.executable, '-c', {sleep!r}, sys.argv[1]])"
    slow, after = script("slow", parent, "{rows}", limit=3), script("next", "import time; time.sleep(600)", limit=600)
    assert run((slow, after, script("last", "")), 6, tmp_path) == {"slow": "cut short", "next": "cut short"}
    process = Path("/proc", (tmp_path / "rows.jsonl").read_text(), "stat")
    assert not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z"
    assert "under way" in capsys.readouterr().out  # a hang says how far it came


def test_a_later_run_repeats_what_has_not_passed_and_what_a_new_machine_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    built = replace(script("build", ADD, "{rows}", "b"), always=True)
    passes, fails = script("first", ADD, "{rows}", "1"), script("second", "raise SystemExit(1)")
    run((built, passes, fails), 120, earlier)
    later = (built, passes, script("second", ADD, "{rows}", "3"), script("new", ADD, "{rows}", "2"))
    monkeypatch.setitem(on_gpu.LISTS, "prove", (later, 240.0))
    monkeypatch.setenv("OUT", str(out))
    assert on_gpu.main(["--prove", "--seconds", "60", "--resume", str(earlier)]) == 0
    assert (out / "rows.jsonl").read_text() == "b1b23"  # what was never started comes before what failed
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "mended.cu").touch()
    assert on_gpu.main(["--prove", "--seconds", "60"]) == 0
    assert (out / "rows.jsonl").read_text() == "b1b23b132"  # with other code all of it


def test_a_job_that_goes_on_is_started_again_as_long_as_it_adds_something(tmp_path: Path) -> None:
    fails = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); t = p.read_text() if p.exists() else ''; "
    fails += "p.write_text((t + '.')[:3]); sys.exit(4)"
    assert run((replace(script("tuning", fails, "{rows}"), goes_on=True),), 60, tmp_path) == {"tuning": "failed (4)"}
    assert (tmp_path / "log.txt").read_text().count("=== tuning") == 4


def test_what_is_measured_and_switched_off_is_where_the_ops_look_and_comes_home(tmp_path: Path) -> None:
    from ldmq_kernels.kernels.gpu import Gpu, file_name

    out = tmp_path / "out"
    out.mkdir()
    earlier = {"gpu": "NVIDIA H200", "tiles": {}, "switched_off": {"linear_w8a8": {}}}
    (out / "tuned.json").write_text(json.dumps(earlier))
    file = runner.measurements_folder() / file_name(Gpu("NVIDIA H200", 90, 132))
    assert runner.environment()["LDMQ_CACHE"] == str(file.parent)
    add = "import json, os, pathlib, sys; p = pathlib.Path(os.environ['LDMQ_CACHE'], sys.argv[1]); "
    add += "p.write_text(json.dumps(json.loads(p.read_text()) | dict(tiles=dict(a=1))))"
    run((script("tuning", add, file.name),), 60, out)
    assert json.loads((out / "tuned.json").read_text()) == earlier | {"tiles": {"a": 1}}


def test_kernels_that_are_asked_for_by_name_cannot_be_left_out_without_a_word() -> None:
    assert runner.environment()["LDMQ_CUDA_ARCHS"]


def test_only_wheels_of_what_is_missing_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "WHEELS", tmp_path)
    for name in ("torch-1.0-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl", "markdown_it_py-1-py3-none.whl"):
        (tmp_path / name).touch()
    assert install.missing_wheels() == [str(tmp_path / "no_such_package-1.0-py3-none-any.whl")]


@pytest.mark.parametrize("state", ["of these sources", "of others", "that do not load"])
def test_compiled_kernels_that_came_along_are_taken_if_they_are_of_these_sources_and_load(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt, package, built = tmp_path / "prebuilt", tmp_path / "package", list[tuple[str, ...]]()
    for folder in (prebuilt, package):
        folder.mkdir()
    monkeypatch.setattr(install, "PREBUILT", prebuilt)
    monkeypatch.setattr(install, "PLACE", package)
    monkeypatch.setattr(install, "_build_ext", lambda *options: built.append(options))
    loads = [f"raise SystemExit({int(state == 'that do not load')})", "raise SystemExit(0)"]
    monkeypatch.setattr(install, "_loads", lambda: loads.pop(0))
    name = "_binding.abi3.so"
    for file in (name, "libldmq_kernels.so", "kernels.txt"):
        (prebuilt / file).write_text(file)
    (prebuilt / install.DIGEST).write_text("other" if state == "of others" else install.sources_digest())
    install.build(tmp_path / "kernels.txt")
    assert bool(built) == (state != "of these sources")
    assert (package / name).exists() == (state != "of others")


def test_every_job_names_something_that_is_there() -> None:
    root = Path(on_gpu.__file__).parent.parent
    for job in (*jobs.PROVE, *jobs.MEASURE):
        module, command, *others = job.command[1:]
        assert job.command[0] == "-m"
        if module == "benchmarks":
            assert command in COMMANDS, job.name
            assert command != "op" or others[0] in OPS
        elif module != "pytest":
            assert (root / module / "__main__.py").exists(), job.name
        for part in job.command:
            if part.startswith("python_tests"):
                assert (root / part).exists(), job.name
        assert 0 < job.expected <= job.limit
    assert set(OPS) <= {job.name for job in jobs.MEASURE}
    for found, _ in jobs.LISTS.values():
        assert len({job.name for job in found}) == len(found)
