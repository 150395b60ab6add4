"""Every pipeline is planned through its own calls, and keeps what its plan promises when it is called again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.calibration import SamplingSettings, record_trajectory
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.trajectory import replay
from ldmq_kernels.conversion import summarize
from ldmq_kernels.plans.plan import PlanError, uniform_plan
from python_tests.breadth.matrix import all_rows
from python_tests.breadth.measure import measured
from python_tests.breadth.rows import Row

TARGET_DB = 18.0
DAILY = (  # one of each way to call a pipeline; `python -m benchmarks breadth` plans all rows
    "sd15, its own timesteps",
    "gligen",
    "inpaint, 9 channels",
    "controlnet",
    "ip-adapter",
    "wan 2.2, the second transformer",
    "dit, class labels",
    "cogvideox",
    "stable cascade, the prior",
)


@pytest.mark.parametrize("row", [all_rows()[name] for name in DAILY], ids=lambda row: row.name)
def test_a_plan_made_through_the_pipelines_own_calls_holds_at_other_seeds(row: Row) -> None:
    found = measured(row, TARGET_DB, ("w8a8-static", "fp16"), calls=2)
    assert found.held_out_db >= TARGET_DB
    assert found.called_db >= TARGET_DB - 2
    assert found.summary.quantized_linears >= 0.8 * found.summary.linears
    assert found.is_reloaded
    assert 0.5 < found.share_in_8_bits < 1
    assert (found.plan.calibration["calls"], found.plan.measured["verified_on"]) == (1, "held-out calls")


def _built(name: str) -> tuple[Any, list[Any]]:
    pipe, calls = all_rows()[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe, calls


@pytest.mark.parametrize("name", ["pag", "gligen", "t2i-adapter", "controlnet, two nets, each for some of the steps"])
def test_calls_can_be_made_again_whatever_the_pipeline_did_with_model_and_arguments(name: str) -> None:
    pipe, calls = _built(name)
    trajectory = record_trajectory(pipe, calls[:2], SamplingSettings(None, None))
    for _ in range(2):
        for call, output in replay(denoiser(pipe), trajectory):
            assert torch.equal(output, call.output)


def test_a_plan_of_one_denoiser_is_of_its_part_and_the_other_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, _ = _built("wan 2.2, the first transformer")
    plan = uniform_plan(pipe.transformer_2, "w8a16")
    plan.model["part"] = "transformer_2"
    plan.save(tmp_path / "plan.json")
    ldmq.quantize(pipe, tmp_path / "plan.json")
    assert summarize(pipe.transformer_2).quantized_linears == 26
    assert summarize(pipe.transformer).quantized_linears == 0
    assert "transformer stays in float: plan it too, by ldmq.plan(pipe, ..., part='transformer')" in caplog.text
    assert summarize(pipe.transformer_2).quantized_convolutions == 1


def test_a_scheme_is_given_to_every_denoiser() -> None:
    pipe, _ = _built("wan 2.2, the first transformer")
    ldmq.quantize(pipe, scheme="w8a8-dynamic")
    assert [summarize(model).quantized_linears for model in (pipe.transformer, pipe.transformer_2)] == [26, 26]


def test_a_part_that_is_no_denoiser_is_refused() -> None:
    pipe, calls = _built("wan 2.2, the first transformer")
    with pytest.raises(TypeError, match="no part 'text_encoder': choose transformer or transformer_2 or vae"):
        ldmq.plan(pipe, calls=calls, part="text_encoder", target_sqnr_db=20)


def test_gptq_takes_the_calls_again(shallow_pipe: Any) -> None:
    pipe = copy.copy(shallow_pipe)
    pipe.unet = copy.deepcopy(shallow_pipe.unet)
    plan = uniform_plan(pipe.unet, "w4a16")
    plan.details = {"mid_block.attentions.0.transformer_blocks.0.ff.net.2": {"rounding": "gptq"}}
    plan.calibration = {"calls": 1, "num_inference_steps": None, "guidance_scale": None}
    with pytest.raises(PlanError, match="takes again the 1 calls that it was made from, and has 0"):
        ldmq.quantize(pipe, plan, show_progress=False)
    calls = [{"prompt": "a cat", "num_inference_steps": 1, "height": 16, "width": 16}]
    ldmq.quantize(pipe, plan, calls=calls, show_progress=False)
    assert summarize(pipe.unet).quantized_linears == 17
