"""Frames of a video UNet and pictures of a transformer, float beside quantized: python -m benchmarks gallery

Both draw the demo's scenes. The video UNet is the demo's trained UNet, whose layers are all kept, with the temporal
layers of a motion adapter between them (diffusers' AnimateDiff), as they are initialized: no adapter was trained for
it, and what moves is the noise that frames start from. The transformer is the study's second model. Each is planned
through its pipeline's own calls, every layer in W8A8, and draws the same captions before and after.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ldmq_kernels as ldmq
from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.study import second_model
from ldmq_kernels import demo
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import PICTURES, draw
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.conversion import summarize
from ldmq_kernels.demo import scenes
from ldmq_kernels.demo.run import GUIDANCE, calibration_captions, held_out_captions
from ldmq_kernels.files import check_place, write_whole
from ldmq_kernels.report.measure import PicturePairs
from ldmq_kernels.report.side_by_side import side_by_side

WHAT = "gallery"
DOCS = results.ROOT / "docs"
FORMATS, TARGET_DB = ("w8a8-static", "w8a8-dynamic"), 33.0
STEPS = 10
CALLS = 4  # that plans are made from
FRAMES, SHOWN = 6, 6
TURN = math.pi / 2  # of the frames' noise from the first to the last: the last has nothing of the first's
AMPLIFIED = 10
SHOWN_SEED = 7_000
Call = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A pipeline, the calls that it is planned from, and those that are shown.

    Attributes:
        words: what the page says of it.
        build: -> pipeline, calls to plan from, calls to show, and what stands below each picture.
    """

    name: str
    words: str
    build: Callable[[int], tuple[Any, list[Call], list[Call], list[str]]]


def turned_noise(seed: int, frames: int = FRAMES, size: int = 8) -> Tensor:
    """(1, 4, frames, size, size) noise of unit variance that turns from one draw to another over the frames."""
    first, last = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(seed))
    angles = torch.linspace(0, TURN, frames).view(-1, 1, 1, 1)
    return (angles.cos() * first + angles.sin() * last).movedim(0, 1)[None]


def video_pipeline() -> Any:
    """AnimateDiffPipeline of the demo's UNet and a motion adapter as diffusers initializes it."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    trained = demo.load_demo_pipeline(torch.float32)
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=trained.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
    ).eval()
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    return AnimateDiffPipeline(**{name: getattr(trained, name) for name in names}, motion_adapter=adapter)


def _video(steps: int) -> tuple[Any, list[Call], list[Call], list[str]]:
    def call(caption: str, seed: int) -> Call:
        return {
            "prompt": caption,
            "latents": turned_noise(seed),
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE,
            "height": scenes.IMAGE_SIZE,
            "width": scenes.IMAGE_SIZE,
        }

    planned = [call(caption, seed) for seed, caption in enumerate(calibration_captions(CALLS))]
    caption = held_out_captions(1)[0][0]
    below = [f"frame {frame + 1}: {caption}" for frame in range(FRAMES)]
    return video_pipeline(), planned, [call(caption, SHOWN_SEED)], below


def _transformer(steps: int) -> tuple[Any, list[Call], list[Call], list[str]]:
    def call(caption: str) -> Call:
        return {"prompt": caption, "num_inference_steps": steps, "guidance_scale": second_model.GUIDANCE}

    shown = [caption for caption, _ in held_out_captions(SHOWN)]
    pipe = second_model.load_pipeline(torch.float32)
    return pipe, [call(c) for c in calibration_captions(CALLS)], [call(c) for c in shown], shown


SUBJECTS = (
    Subject(
        "video",
        "a video UNet (UNetMotionModel: the demo's trained UNet, temporal layers as diffusers initializes them, the "
        "noise turning from frame to frame)",
        _video,
    ),
    Subject("transformer", "a diffusion transformer (SD3Transformer2DModel: the study's second model)", _transformer),
)


def picture_of(name: str) -> Path:
    """Where a subject's picture is, below docs."""
    return Path(f"float-and-quantized-{name}.png")


def _drawn(pipe: Any, calls: list[Call]) -> Tensor:
    """(N, 3, H, W) in [0, 1]: the pictures of the calls, or all frames of their videos."""
    found = torch.cat(draw(pipe, calls, SamplingSettings(None, None, SHOWN_SEED), PICTURES)).float().cpu()
    return found.flatten(0, 1) if found.dim() == 5 else found


def measured(
    subject: Subject,
    folder: Path,
    steps: int = STEPS,
    formats: tuple[str, ...] = FORMATS,
    work: Path | None = None,
) -> dict[str, Any]:
    """Plan and quantize a subject, write its picture, and give its row of the results file.

    Args:
        folder: that the picture is written to.
        steps: sampling steps of every call.
        work: folder that keeps the analysis, so that the same goes on after a stop.
    """
    from python_tests.breadth.operations import share_in_8_bits

    pipe, planned, shown, below = subject.build(steps)
    pipe.set_progress_bar_config(disable=True)
    before = _drawn(pipe, shown)
    place = None if work is None else work / subject.name
    plan = ldmq.plan(
        pipe, calls=planned, target_sqnr_db=TARGET_DB, formats=formats, work_dir=place, show_progress=False
    )
    model: nn.Module = denoiser(pipe)
    call = record_trajectory(pipe, shown[:1], SamplingSettings(None, None, SHOWN_SEED)).calls[0]
    share = share_in_8_bits(model, call, plan)
    ldmq.quantize(pipe, plan, calls=planned, show_progress=False)
    pairs = PicturePairs(below, range(len(below)), before, _drawn(pipe, shown))
    write_whole(folder / picture_of(subject.name), side_by_side(pairs, AMPLIFIED))
    summary = summarize(model)
    return {
        "op": WHAT,
        "name": subject.name,
        "words": subject.words,
        "model": type(model).__name__,
        "steps": steps,
        "captions": sorted({call["prompt"] for call in shown}),
        "pictures": len(below),
        "amplified": AMPLIFIED,
        "convolutions": [summary.quantized_convolutions, summary.convolutions],
        "linears": [summary.quantized_linears, summary.linears],
        "share_of_fp16": summary.bytes_after / summary.bytes_before,
        "share_in_8_bits": share,
        "held_out_db": plan.measured["held_out_sqnr_db"],
        "psnr_db": pairs.psnr_db,
    }


HEAD = [
    "model",
    "convolutions",
    "linears",
    "of fp16",
    "MACs in 8 bits",
    "held out, dB",
    "PSNR of each picture, dB",
]


def table(data: dict[str, Any]) -> str:
    """The figures of the pictures in docs/models.md."""
    lines = [
        [
            row["model"],
            *(f"{done} of {total}" for done, total in (row["convolutions"], row["linears"])),
            f"{row['share_of_fp16']:.3f}x",
            f"{100 * row['share_in_8_bits']:.0f} %",
            f"{row['held_out_db']:.1f}",
            ", ".join(f"{db:.1f}" for db in row["psnr_db"]),
        ]
        for row in data["rows"]
    ]
    words = f"**Frames and pictures beside float's** ({TARGET_DB:g} dB asked; [docs/models.md](models.md) shows them)"
    return f"{words}\n\n" + markdown(HEAD, lines)


def figures(data: Mapping[str, Any]) -> str:
    """The pictures with what they show, for docs/models.md."""
    parts = []
    for row in data["rows"]:
        mean = sum(row["psnr_db"]) / len(row["psnr_db"])
        layers = f"{row['convolutions'][0]} of {row['convolutions'][1]} convolutions and "
        layers += f"{row['linears'][0]} of {row['linears'][1]} linears"
        name = picture_of(row["name"])
        parts.append(
            f"![{row['model']}: float, quantized, and their difference]({name})\n\n"
            f"{row['words'][0].upper()}{row['words'][1:]}: float above quantized from the same noise, and their "
            f"difference {row['amplified']} times. {layers} in W8A8; {row['steps']} steps; PSNR "
            f"{min(row['psnr_db']):.1f} to {max(row['psnr_db']):.1f} dB, {mean:.1f} dB in the mean; SQNR of the "
            f"model's output, held out, {row['held_out_db']:.1f} dB."
        )
    return "\n\n".join(parts)


def main(arguments: list[str]) -> None:
    """Draw both, write the pictures and the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gallery", description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the pictures")
    parser.add_argument("--work", type=Path, help="folder that keeps analyses, so that a run goes on after a stop")
    options = parser.parse_args(arguments)
    results.check_keep(WHAT)
    for subject in SUBJECTS:
        check_place(options.docs / picture_of(subject.name))
    rows = []
    for subject in SUBJECTS:
        rows.append(measured(subject, options.docs, work=options.work))
        print(f"{subject.name}: {', '.join(f'{db:.1f}' for db in rows[-1]['psnr_db'])} dB", flush=True)
    summary = {f"gallery/{row['name']}/psnr_db": sum(row["psnr_db"]) / len(row["psnr_db"]) for row in rows}
    print(f"written: {results.keep(WHAT, rows, summary)}")
