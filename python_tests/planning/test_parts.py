"""Plans of what a pipeline has beside its denoiser: autoencoders, for the decoded picture, and nets that steer."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import ldmq_kernels as ldmq
from ldmq_kernels.calibration import SamplingSettings, record_trajectory
from ldmq_kernels.calibration.autoencoders import WHICH, through_forward
from ldmq_kernels.calibration.denoisers import PartOf
from ldmq_kernels.calibration.outputs import output_tensor
from ldmq_kernels.conversion import summarize
from ldmq_kernels.plans.plan import Plan

PSNR_DB = 38.0
CALLS = [{"prompt": text, "num_inference_steps": 1, "height": 32, "width": 32} for text in ("a cat", "rain")]


@pytest.fixture(scope="module")
def whole(shallow_pipe: Any) -> Any:
    """The pipeline with pictures that are larger than a tile, in float."""
    pipe = copy.copy(shallow_pipe)
    pipe.vae = copy.deepcopy(shallow_pipe.vae)
    return pipe


def planned(pipe: Any, **changes: Any) -> Plan:
    settings = {"part": "vae", "target_psnr_db": PSNR_DB, "formats": ["w8a8-static", "fp16"]}
    return ldmq.plan(pipe, calls=CALLS, show_progress=False, **(settings | changes))


@pytest.fixture(scope="module")
def plan(whole: Any) -> Plan:
    return planned(whole)


def latents(seed: int = 3) -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(vae: AutoencoderKL, given: Tensor) -> Tensor:
    sample: Tensor = vae.decode(given).sample
    return sample


def test_the_decoded_picture_keeps_its_psnr_and_comes_back_from_disk(whole: Any, plan: Plan, tmp_path: Path) -> None:
    assert plan.model["part"] == "vae"
    assert plan.target == {"psnr_db": PSNR_DB}
    assert plan.measured["held_out_psnr_db"] >= PSNR_DB
    pipe = copy.copy(whole)
    pipe.vae = copy.deepcopy(whole.vae)
    calls = record_trajectory(PartOf(pipe, "vae"), CALLS[1:], SamplingSettings(None, None, 500)).calls
    ldmq.quantize(pipe, plan)
    assert summarize(pipe.vae).quantized_convolutions > 10
    with torch.no_grad():
        squared = [(call.run(pipe.vae) - call.output).square().mean() for call in calls]
    assert 10 * torch.log10(4 / torch.stack(squared).mean()) > PSNR_DB - 2
    pipe.vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert torch.equal(decoded(again, latents()), decoded(pipe.vae, latents()))


def test_tiles_and_slices_give_the_same_plan(whole: Any, plan: Plan) -> None:
    pipe = copy.copy(whole)
    pipe.vae = copy.deepcopy(whole.vae)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert not torch.equal(decoded(pipe.vae, latents()), decoded(whole.vae, latents()))
    cut = planned(pipe)
    assert cut.input_scales == plan.input_scales
    assert cut.exceptions == plan.exceptions
    assert cut.measured == plan.measured
    assert pipe.vae.use_tiling and pipe.vae.use_slicing  # noqa: PT018
    assert "decode" not in vars(pipe.vae)


def test_ends_of_a_trajectory_are_for_denoisers(whole: Any) -> None:
    with pytest.raises(ValueError, match=r"AutoencoderKL is planned for its own output.* target_psnr_db for the dec"):
        planned(whole, target_psnr_db=None, target_latent_db=30)
    with pytest.raises(TypeError, match="has no part 'controlnet': choose unet or vae"):
        planned(whole, part="controlnet")


@pytest.fixture
def overflowing() -> AutoencoderKL:
    """A decoder whose activations are above what float16 holds, as that of SDXL."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        vae.decoder.conv_in.weight *= 1e5
    return vae


def test_a_decoder_that_overflows_in_float16_is_right_where_the_pipeline_upcasts_it(overflowing: AutoencoderKL) -> None:
    exact = decoded(overflowing, latents())
    ldmq.quantize(overflowing, scheme="w8a8-dynamic")
    quantized = decoded(overflowing, latents())
    assert ldmq.sqnr_db(exact, quantized) > 20
    overflowing.half()
    assert not torch.isfinite(decoded(overflowing, latents().half())).all()
    overflowing.to(torch.float32)  # as `force_upcast` of its config has the pipeline do
    assert ldmq.sqnr_db(quantized, decoded(overflowing, latents())) > 40  # biases and norms were rounded


def test_a_recorded_call_runs_in_the_dtype_that_the_pipeline_had(overflowing: AutoencoderKL) -> None:
    exact = decoded(overflowing, latents())
    overflowing.half()
    with torch.no_grad(), through_forward(overflowing):
        assert ldmq.sqnr_db(exact, overflowing.decode(latents()).sample) > 40
        recorded = output_tensor(overflowing(torch.zeros(1, 3, 16, 16), **{WHICH: "encode"}))
        assert recorded.shape == (1, 8, 8, 8)
    assert {parameter.dtype for parameter in overflowing.parameters()} == {torch.float16}


def test_a_pipeline_that_only_decodes_is_planned() -> None:
    class Decoding:
        def __init__(self) -> None:
            self.vae = AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=4).eval()

        def __call__(self, latents: Tensor) -> SimpleNamespace:
            return SimpleNamespace(images=decoded(self.vae, latents))

    pipe, formats = Decoding(), ["w8a8-dynamic", "fp16"]
    calls = [{"latents": torch.randn(1, 4, 4, 4)} for _ in range(2)]
    plan = ldmq.plan(pipe, calls=calls, part="vae", target_sqnr_db=20, formats=formats, show_progress=False)
    assert plan.model["part"] == "vae"
    ldmq.quantize(pipe, plan)
    assert summarize(pipe.vae).quantized_convolutions > 0
