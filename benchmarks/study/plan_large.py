"""The whole method on a UNet of full size, timed: python -m benchmarks plan sd15

Calibration, analysis and plan, stage by stage, with the largest size of the process. Weights are random, so these
figures say what the method costs and nothing of quality. SDXL's size is run in bfloat16, in which it fits 24 GB.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.harness import results
from benchmarks.harness.machine import machine
from benchmarks.harness.tables import markdown
from benchmarks.models.cpu import peak_bytes
from benchmarks.models.definitions import SD15, SDXL
from ldmq_kernels import demo
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import calibration_captions
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.planning.planner import HELD_OUT_SEED
from ldmq_kernels.planning.request import DEFAULT_FORMATS, split_calls
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.sensitivity.analysis import analyze

LATENTS_TO_PIXELS = {"block_out_channels": (32,) * 4, "norm_num_groups": 8, "latent_channels": 4}  # a VAE never run
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SD15_TEXT, SDXL_TEXT = (768,), (768, 1280)


def _text_encoder(kind: type, tokenizer: CLIPTokenizer, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def random_pipeline(model: str) -> Any:
    """A pipeline around a UNet of Stable Diffusion 1.5's or SDXL's size, with the demo's words and small text encoders.

    Args:
        model: "sd15", in float32, or "sdxl", in bfloat16.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(demo.WEIGHTS / "tokenizer", local_files_only=True)
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**LATENTS_TO_PIXELS, **BLOCKS).eval(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "tokenizer": tokenizer,
        "feature_extractor": None,
    }
    if model == "sd15":
        return StableDiffusionPipeline(
            **parts,
            unet=UNet2DConditionModel(**SD15).eval(),
            text_encoder=_text_encoder(CLIPTextModel, tokenizer, SD15_TEXT[0]),
            safety_checker=None,
            requires_safety_checker=False,
        )
    torch.set_default_dtype(torch.bfloat16)  # so that float32 weights never stand beside them
    try:
        unet = UNet2DConditionModel(**SDXL).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    pipe = StableDiffusionXLPipeline(
        **parts,
        unet=unet,
        text_encoder=_text_encoder(CLIPTextModel, tokenizer, SDXL_TEXT[0]),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, tokenizer, SDXL_TEXT[1]),
        tokenizer_2=tokenizer,
        image_encoder=None,
    )
    return pipe.to(torch.bfloat16)


def measured(pipe: Any, prompts: list[str], target: Target, settings: SamplingSettings, work: Path) -> dict[str, Any]:
    """Seconds of each stage of `ldmq.plan` with its default formats, and what the plan is."""
    calibrated_on, verified_on = split_calls(prompts)
    marks = [time.perf_counter()]

    def mark(stage: str) -> None:
        marks.append(time.perf_counter())
        print(f"{stage}: {marks[-1] - marks[-2]:.0f} s, peak {peak_bytes() / 2**30:.1f} GiB", flush=True)

    calibration = calibrate(pipe, calibrated_on, settings, show=True)
    mark("calibration")
    analysis = analyze(pipe, calibration, parse_schemes(DEFAULT_FORMATS), work_dir=work, show=True)
    mark("analysis")
    others = SamplingSettings(
        settings.num_inference_steps, settings.guidance_scale, HELD_OUT_SEED, settings.height, settings.width
    )
    held_out = record_trajectory(pipe, verified_on, others, show=True)
    result = Session(pipe.unet, analysis, held_out, DEFAULT_FORMATS).plan(target)
    mark("plan")
    found = result.plan.measured
    stages = [later - earlier for earlier, later in itertools.pairwise(marks)]
    return {
        **dict(zip(("calibration_seconds", "analysis_seconds", "plan_seconds"), stages, strict=True)),
        "seconds": marks[-1] - marks[0],
        "peak_bytes": peak_bytes(),
        "layers": len(analysis.candidates),
        "candidates": len(analysis.output),
        "run_alone": len(analysis.exact),
        "target": target.to_dict(),
        "predicted_db": found["predicted_sqnr_db"],
        "measured_db": found["held_out_sqnr_db"],
        "share_of_fp16": found["weight_bytes"] / found["weight_bytes_fp16"],
    }


def table(data: dict[str, Any]) -> str:
    """Minutes of each stage, memory and the plan's noise, for the pages."""
    row = data["rows"][0]
    name = {"plan_sd15": "Stable Diffusion 1.5's", "plan_sdxl": "SDXL's"}[row["op"]]
    words = (
        f"**The method at {name} size** ({row['parameters'] / 1e6:.0f} million random weights in {row['dtype']}, "
        f"{row['prompts']} prompts, {row['steps']} steps, {row['pixels']} pixels, {data['threads']} threads)"
    )
    stages = [f"{row[f'{stage}_seconds'] / 60:.1f}" for stage in ("calibration", "analysis", "plan")]
    cells = [*stages, f"{row['seconds'] / 60:.1f}", f"{row['peak_bytes'] / 2**30:.1f}"]
    cells += [str(row["candidates"]), f"{row['predicted_db']:.1f} / {row['measured_db']:.1f} dB"]
    head = ["calibration, min", "analysis", "plan", "all", "peak GiB", "candidates", "predicted / held out"]
    return f"{words}\n\n" + markdown(head, [cells])


def main(arguments: list[str]) -> None:
    """Measure one model and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("sd15", "sdxl"))
    parser.add_argument("--pixels", type=int, default=256, help="height and width of the pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--target-sqnr", type=float, help="in dB; without it, the highest within 0.55 of fp16's bytes")
    options = parser.parse_args(arguments)
    results.check_keep(f"plan_{options.model}")
    record = machine()
    pipe = random_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    target = Target(options.target_sqnr, None if options.target_sqnr else int(0.55 * 2 * parameters))
    settings = SamplingSettings(options.steps, 7.5, 0, options.pixels, options.pixels)
    prompts = calibration_captions(options.prompts)
    with tempfile.TemporaryDirectory() as work:
        row = measured(pipe, prompts, target, settings, Path(work))
    row |= {
        "op": f"plan_{options.model}",
        "parameters": parameters,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "pixels": options.pixels,
        "steps": options.steps,
        "prompts": len(prompts),
    }
    summary = {
        f"plan_{options.model}/minutes": row["seconds"] / 60,
        f"plan_{options.model}/GiB": row["peak_bytes"] / 2**30,
    }
    print(f"written: {results.keep(f'plan_{options.model}', [row], summary, record)}")
