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
from ldmq_kernels.planning.planner import end_check, held_out_settings
from ldmq_kernels.planning.request import PlanRequest
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


def measured(pipe: Any, request: PlanRequest) -> dict[str, Any]:
    """Seconds of each stage of `ldmq.plan` with its default formats, and what the plan is."""
    marks = [time.perf_counter()]
    began = time.process_time()

    def mark(stage: str) -> None:
        marks.append(time.perf_counter())
        cpu = time.process_time() - began
        words = f"{stage}: {marks[-1] - marks[-2]:.0f} s, {cpu:.0f} s of processors, {peak_bytes() / 2**30:.1f} GiB"
        print(words, flush=True)

    calibration = calibrate(pipe, request.calibration_calls, request.settings, show=True)
    mark("calibration")
    schemes = parse_schemes(request.schemes)
    analysis = analyze(pipe, calibration, schemes, ends=request.ends, work_dir=request.work_dir, show=True)
    mark("analysis")
    held_out = record_trajectory(pipe, request.held_out_calls, held_out_settings(request.settings), show=True)
    ends = end_check(pipe, request, analysis) if request.ends else None
    assert request.target is not None
    result = Session(pipe.unet, analysis, held_out, request.schemes, ends=ends).plan(request.target)
    mark("plan")
    found = result.plan.measured
    stages = [later - earlier for earlier, later in itertools.pairwise(marks)]
    return {
        **dict(zip(("calibration_seconds", "analysis_seconds", "plan_seconds"), stages, strict=True)),
        "seconds": marks[-1] - marks[0],
        "cpu_seconds": time.process_time() - began,
        "peak_bytes": peak_bytes(),
        "layers": len(analysis.candidates),
        "candidates": len(analysis.output),
        "run_alone": len(analysis.exact),
        "target": request.target.to_dict(),
        "keeps": request.measure,
        "predicted_db": found[f"predicted_{request.measure}_db"],
        "measured_db": found[f"held_out_{request.measure}_db"],
        "share_of_fp16": found["weight_bytes"] / found["weight_bytes_fp16"],
    }


def table(data: dict[str, Any]) -> str:
    """Minutes of each stage, memory and the plan's noise, for the pages."""
    row = data["rows"][0]
    name = {"plan_sd15": "Stable Diffusion 1.5's", "plan_sdxl": "SDXL's"}[row["op"]]
    words = (
        f"**The method at {name} size**{', for the final latents' if row.get('keeps') == 'latent' else ''} "
        f"({row['parameters'] / 1e6:.0f} million random weights in {row['dtype']}, "
        f"{row['prompts']} prompts, {row['steps']} steps, {row['pixels']} pixels, {data['threads']} threads)"
    )
    stages = [f"{row[f'{stage}_seconds'] / 60:.1f}" for stage in ("calibration", "analysis", "plan")]
    cells = [*stages, f"{row['seconds'] / 60:.1f}"]
    cells += [f"{row['cpu_seconds'] / 60:.1f}" if "cpu_seconds" in row else "", f"{row['peak_bytes'] / 2**30:.1f}"]
    cells += [str(row["candidates"]), f"{row['predicted_db']:.1f} / {row['measured_db']:.1f} dB"]
    head = ["calibration, min", "analysis", "plan", "all", "of processors", "peak GiB", "candidates"]
    return f"{words}\n\n" + markdown([*head, "predicted / held out"], [cells])


def main(arguments: list[str]) -> None:
    """Measure one model and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("sd15", "sdxl"))
    parser.add_argument("--pixels", type=int, default=256, help="height and width of the pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=4)
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument("--target-sqnr", type=float, help="in dB; without it, the highest within 0.55 of fp16's bytes")
    limits.add_argument("--target-latent", type=float, help="in dB, of the final latents")
    parser.add_argument("--keeps", choices=("sqnr", "latent"), default="sqnr", help="without a target in dB")
    options = parser.parse_args(arguments)
    at_end = options.target_latent is not None or options.keeps == "latent"
    what = f"plan_{options.model}" + ("_end" if at_end else "")
    results.check_keep(what)
    record = machine()
    pipe = random_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    has_db = options.target_sqnr is not None or options.target_latent is not None
    size = None if has_db else int(0.55 * 2 * parameters)
    target = Target(options.target_sqnr, size, latent_db=options.target_latent)
    settings = SamplingSettings(options.steps, 7.5, 0, options.pixels, options.pixels)
    prompts = calibration_captions(options.prompts)
    with tempfile.TemporaryDirectory() as work:
        signals = (options.keeps,)
        request = PlanRequest(prompts, target, settings=settings, signals=signals, work_dir=Path(work), show=True)
        row = measured(pipe, request.with_room(pipe.unet))
    row |= {
        "op": f"plan_{options.model}",
        "parameters": parameters,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "pixels": options.pixels,
        "steps": options.steps,
        "prompts": len(prompts),
    }
    summary = {f"{what}/minutes": row["seconds"] / 60, f"{what}/GiB": row["peak_bytes"] / 2**30}
    print(f"written: {results.keep(what, [row], summary, record)}")
