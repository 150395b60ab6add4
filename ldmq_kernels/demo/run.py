"""`ldmq demo`: from prompts to quantized pictures with the model that ships, and the page that shows it."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

import ldmq_kernels
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.conversion import Summary, quantize, summarize
from ldmq_kernels.demo import WEIGHTS, load_demo_pipeline, load_evaluator, scenes
from ldmq_kernels.demo.scoring import Scores, score
from ldmq_kernels.files import output_folder, printable, read_json, write_whole
from ldmq_kernels.planning.evaluate import measure_plan
from ldmq_kernels.planning.planner import make_plan
from ldmq_kernels.planning.request import DEFAULT_FORMATS, PlanRequest
from ldmq_kernels.planning.session import PlanResult
from ldmq_kernels.planning.target import Target
from ldmq_kernels.report.measure import PicturePairs, Timing, draw_pictures, time_plan
from ldmq_kernels.report.page import Fact, Report, write_report
from ldmq_kernels.report.rows import layer_rows, schemes_of, to_csv
from ldmq_kernels.report.side_by_side import side_by_side
from ldmq_kernels.sensitivity.output_noise import StepNoise

TARGET_DB = 38.0
STEPS, GUIDANCE = 20, 4.0
CALIBRATION_PROMPTS = 10  # eight to calibrate on, two to verify on
MEASURED_CAPTIONS = 8
SHOWN = 12
CAPTION_SEED, NOISE_SEED = 31, 5_000
RESULTS, PAGE, PICTURES = "results.json", "report.html", "pictures.png"
IN_PICTURES = 6
KIND = "ldmq demo"
PLAN, LAYERS, MODEL = "plan.json", "layers.csv", "quantized"
WRITTEN = frozenset({RESULTS, PAGE, PICTURES, PLAN, LAYERS, MODEL})

console = Console()


@dataclass(frozen=True)
class Outcome:
    """Everything that the demo measured; `sqnr` is of the UNet output, along held-out captions."""

    unet: nn.Module
    result: PlanResult
    sqnr: StepNoise
    summary: Summary
    scores: Scores
    timings: list[Timing]
    pairs: PicturePairs
    seconds: dict[str, float]


class ReloadError(RuntimeError):
    """The saved model does not draw what the one in memory draws."""


def held_out_captions(count: int) -> list[tuple[str, scenes.Scene]]:
    """Captions that the model was never trained on, one and two objects in turn."""
    one, two = ([*scenes.captions(count, objects, held_out=True, seed=CAPTION_SEED)] for objects in (1, 2))
    return [pair for pairs in zip(one, two, strict=True) for pair in pairs][:count]


def calibration_captions(count: int) -> list[str]:
    """Captions like those that the model was trained on, one and two objects in turn."""
    one, two = (scenes.captions(count // 2, objects, held_out=False, seed=CAPTION_SEED) for objects in (1, 2))
    return [caption for pairs in zip(one, two, strict=True) for caption, _ in pairs]


def _is_earlier_demo(out: Path, names: Collection[str]) -> bool:
    """Whether a folder holds what an earlier demo left, and nothing of anybody else."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return WRITTEN.issuperset(names) and bool(read_json(out / RESULTS)["kind"] == KIND)
    return False


def _save(pipe: Any, folder: Path) -> None:
    """In float16, as the float model is stored: its values are float16's, so nothing is lost."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.float16)
    pipe.save_pretrained(folder)


def run_demo(out: Path, count: int, *, weights: Path = WEIGHTS) -> None:
    """Run all of it; write the page, the pictures, the plan, the layers' numbers, the results and the quantized model.

    Args:
        out: a folder that is empty, new, or an earlier demo's.
        count: held-out captions to draw and score, at least 4.

    Raises:
        OSError: `out` holds something else, or cannot be written.
        ReloadError: the saved model draws other pictures than the one in memory.
    """
    began = time.perf_counter()
    with output_folder(out, _is_earlier_demo) as write, tempfile.TemporaryDirectory() as place:
        saved = Path(place) / MODEL
        outcome = _measure(saved, count, weights, show=True)
        outcome.seconds["all"] = time.perf_counter() - began
        results = _results(outcome, count)
        rows = layer_rows(outcome.unet, outcome.result.analysis, outcome.result.plan)

        def fill(folder: Path) -> None:
            shutil.copytree(saved, folder / MODEL)
            outcome.result.plan.save(folder / PLAN)
            write_whole(folder / LAYERS, to_csv(rows, schemes_of(outcome.result.analysis)))
            write_report(folder / PAGE, outcome.unet, _report(outcome, count, results))
            write_whole(folder / PICTURES, side_by_side(outcome.pairs.first(IN_PICTURES)))
            write_whole(folder / RESULTS, (json.dumps(results, indent=1) + "\n").encode())

        write(fill)
    _print(outcome, count, out)


def _measure(saved: Path, count: int, weights: Path, *, show: bool) -> Outcome:
    pipe, evaluator = load_demo_pipeline(torch.float32, weights), load_evaluator(weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device)
    seconds: dict[str, float] = {}
    pairs = held_out_captions(count)
    prompts = [caption for caption, _ in pairs]
    sampling = SamplingSettings(STEPS, GUIDANCE, NOISE_SEED)

    start = time.perf_counter()
    before = draw_pictures(pipe, prompts, sampling, "float pictures", show=show)
    seconds["float pictures"] = time.perf_counter() - start

    start = time.perf_counter()
    calibrated = SamplingSettings(STEPS, GUIDANCE, 0)
    captions = calibration_captions(CALIBRATION_PROMPTS)
    request = PlanRequest(captions, Target(sqnr_db=TARGET_DB), DEFAULT_FORMATS, settings=calibrated, show=show)
    result = make_plan(pipe, request)
    seconds["plan"] = time.perf_counter() - start
    summary = summarize(pipe.unet, result.plan)
    held_out = record_trajectory(pipe, prompts[:MEASURED_CAPTIONS], sampling, show=show)
    sqnr = measure_plan(pipe.unet, result.plan, held_out)
    one = record_trajectory(pipe, prompts[:1], SamplingSettings(1, GUIDANCE, NOISE_SEED))
    timings = [time_plan(pipe.unet, result.plan, run.calls[0], rounds=15) for run in (held_out, one)]

    quantize(pipe, result.plan)
    pipe.unet.to(torch.float16).to(torch.float32)  # corrected biases are rounded when they are stored: draw with those
    start = time.perf_counter()
    after = draw_pictures(pipe, prompts, sampling, "quantized pictures", show=show)
    seconds["quantized pictures"] = time.perf_counter() - start
    again = _reload(pipe, saved, device)
    if not torch.equal(draw_pictures(again, prompts[:8], sampling, "pictures after loading", show=show), after[:8]):
        raise ReloadError("the quantized model that was saved and loaded again draws other pictures")
    drawn = PicturePairs(prompts, range(NOISE_SEED, NOISE_SEED + count), before, after)
    scores = score(evaluator, drawn, [scene for _, scene in pairs])
    return Outcome(pipe.unet, result, sqnr, summary, scores, timings, drawn, seconds)


def _reload(pipe: Any, folder: Path, device: str) -> Any:
    _save(pipe, folder)
    again = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    return again.to(device)


# -- results --------------------------------------------------------------------------------------------


def _commit() -> str | None:
    """The commit of this checkout, where it is one and git is there."""
    root = Path(ldmq_kernels.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _results(outcome: Outcome, count: int) -> dict[str, Any]:
    plan, summary = outcome.result.plan, outcome.summary
    return {
        "kind": KIND,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "ldmq_kernels": ldmq_kernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "captions": count,
        "calibration": plan.calibration,
        "target": plan.target,
        "sqnr": {
            "plan": plan.measured,
            "held_out_captions_db": outcome.sqnr.mean_db,
            "by_step_db": outcome.sqnr.db_by_step,
        },
        "layers": {
            "convolutions": summary.convolutions,
            "linears": summary.linears,
            "quantized_convolutions": summary.quantized_convolutions,
            "quantized_linears": summary.quantized_linears,
            "by_scheme": {name: asdict(share) for name, share in summary.schemes.items()},
        },
        "unet_bytes": {
            "fp16": summary.bytes_before,
            "quantized": summary.bytes_after,
            "ratio": summary.bytes_after / summary.bytes_before,
        },
        "scores": asdict(outcome.scores),
        "times": [asdict(timing) | {"speedup": timing.speedup} for timing in outcome.timings],
        "seconds": outcome.seconds,
    }


def _report(outcome: Outcome, count: int, results: dict[str, Any]) -> Report:
    summary, scores = outcome.summary, outcome.scores
    change = 100 * (scores.accuracy_after["all"] - scores.accuracy_before["all"])
    facts = [
        Fact(f"{summary.bytes_after / summary.bytes_before:.2f}x", "bytes of UNet weights, of fp16"),
        Fact(f"{outcome.sqnr.mean_db:.1f} dB", "SQNR of the UNet output, held-out captions"),
        Fact(f"{scores.psnr_db:.1f} dB", f"PSNR against float, {count} pictures"),
        Fact(f"{change:+.1f} points", f"attributes right, from {100 * scores.accuracy_before['all']:.1f} %"),
        Fact(f"{outcome.timings[0].speedup:.2f}x", f"as fast as float32, {outcome.timings[0].what}"),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    notes = [
        f"{results['device']} ({results['cpu_capability']}, {results['threads']} threads), {results['date']}.",
        f"{versions}.",
        f"Frechet distance between the float and the quantized pictures, in the features of the demo's own evaluator: "
        f"{scores.frechet_distance:.3f}, where their variance is {scores.feature_variance:.0f}.",
    ]
    return Report(
        title="The demo model, before and after",
        lead="A small text-to-image latent diffusion model, calibrated, analysed, planned and quantized here: "
        "the same captions, the same seeds, the same pictures, from about half the bytes.",
        analysis=outcome.result.analysis,
        result=outcome.result,
        summary=summary,
        facts=facts,
        pictures=outcome.pairs.first(SHOWN),
        timings=outcome.timings,
        notes=notes,
    )


def _print(outcome: Outcome, count: int, out: Path) -> None:
    scores = outcome.scores
    table = Table(title=f"the demo model, {count} held-out captions", show_header=True)
    table.add_column("")
    table.add_column("float", justify="right")
    table.add_column("quantized", justify="right")
    for kind, share in scores.accuracy_before.items():
        table.add_row(f"attributes right, {kind}", f"{share:.1%}", f"{scores.accuracy_after[kind]:.1%}")
    summary = outcome.summary
    table.add_row("bytes of UNet weights (fp16)", f"{summary.bytes_before:,}", f"{summary.bytes_after:,}")
    for timing in outcome.timings:
        table.add_row(timing.what, f"{timing.before * 1000:.1f} ms", f"{timing.after * 1000:.1f} ms")
    table.add_section()
    table.add_row("SQNR of the UNet output", "", f"{outcome.sqnr.mean_db:.1f} dB")
    table.add_row("PSNR of the pictures", "", f"{scores.psnr_db:.1f} dB")
    table.add_row("Frechet distance to float", "", f"{scores.frechet_distance:.3f}")
    table.add_row("(variance of the features)", "", f"{scores.feature_variance:.0f}")
    console.print(summary.table())
    console.print(table)
    console.print(f"planned in {outcome.seconds['plan']:.0f} s, all done in {outcome.seconds['all']:.0f} s")
    console.print(f"open {printable((out / PAGE).resolve())} in a browser", soft_wrap=True, markup=False)
