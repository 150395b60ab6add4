"""The benchmark of full-size planning, on a small pipeline."""

from benchmarks.study import plan_large
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.planning.request import PlanRequest
from ldmq_kernels.planning.target import Target
from python_tests.tiny import PROMPTS


def test_every_stage_is_timed_and_the_plan_told(shallow_pipe, tmp_path):
    settings, formats = SamplingSettings(2, 4.0, 0, 16, 16), ("w8a8-dynamic", "w8a16", "fp16")
    calls, target = [*PROMPTS, "a green circle"], Target(sqnr_db=30.0)
    request = PlanRequest(calls, target, formats=formats, settings=settings, work_dir=tmp_path)
    row = plan_large.measured(shallow_pipe, request)
    stages = [row[f"{stage}_seconds"] for stage in ("calibration", "analysis", "plan")]
    assert all(seconds > 0 for seconds in stages)
    assert abs(sum(stages) - row["seconds"]) < 1e-6
    assert row["measured_db"] >= 30
    assert 0.4 < row["share_of_fp16"] < 1
    assert row["peak_bytes"] > 100 << 20
    assert row["candidates"] > row["layers"] > 10
