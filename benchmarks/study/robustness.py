"""One plan at other settings than it was made at, on the demo model: python -m benchmarks robustness --record

Plans are made at the demo's own settings. Each is then drawn with other guidance, numbers of steps, schedulers and
another size, beside the float pictures of the same settings; and at each setting it is counted which layers'
calibrated ranges clip. The unclipped plan measures its scales in each call where the static one clips at any of the
settings, as the calibration's captions show it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import results
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from benchmarks.study.evaluation import TEST_SEED, Setup, decode, draw_latents, with_unet
from benchmarks.study.own_plans import quantized
from benchmarks.study.subjects import DEMO, SUBJECTS
from ldmq_kernels.calibration.calibrate import calibrate
from ldmq_kernels.calibration.clipping import ClippingObserver, LayerClipping, observe_clipping, unclip
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.settings import SamplingSettings, changed, recorded
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, TARGET_DB, calibration_captions, held_out_captions
from ldmq_kernels.numerics.formats import parse_schemes
from ldmq_kernels.numerics.sqnr import to_db
from ldmq_kernels.planning.planner import held_out_settings
from ldmq_kernels.planning.request import DEFAULT_FORMATS, split_calls
from ldmq_kernels.planning.session import Session
from ldmq_kernels.planning.target import Target
from ldmq_kernels.plans.plan import Plan
from ldmq_kernels.sensitivity.analysis import analyze

WHAT = "robustness"
CAPTIONS = 4
MOST_DB = 100.0
STATIC, UNCLIPPED = "static", "static, unclipped"
UNIFORM = {STATIC: "w8a8-static", "timestep": "w8a8-timestep", "dynamic": "w8a8-dynamic"}
MIXED = "mixed"
PLANS = (*UNIFORM, MIXED, UNCLIPPED)
SETTINGS: dict[str, dict[str, Any]] = {
    "as planned": {},
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 7.5": {"guidance_scale": 7.5},
    "guidance 12": {"guidance_scale": 12.0},
    "4 steps": {"num_inference_steps": 4},
    "10 steps": {"num_inference_steps": 10},
    "50 steps": {"num_inference_steps": 50},
    "DPM++": {"scheduler": "DPMSolverMultistepScheduler"},
    "Euler ancestral": {"scheduler": "EulerAncestralDiscreteScheduler"},
    "96x96 pixels": {"height": 96, "width": 96},
}


@dataclass(frozen=True)
class Drawn:
    """What the float pipeline draws at one setting, and how the ranges of each plan fit there."""

    settings: SamplingSettings
    latents: Tensor
    pictures: Tensor
    clipping: dict[str, list[LayerClipping]]


def make_plans(pipe: Any, base: SamplingSettings, settings: list[SamplingSettings], *, show: bool) -> dict[str, Plan]:
    """The plans of one analysis at the base settings, by name; the unclipped one knows the other settings too."""
    calibrated_on, verified_on = split_calls(calibration_captions(CALIBRATION_PROMPTS))
    calibration = calibrate(pipe, calibrated_on, base, show=show)
    schemes = parse_schemes(DEFAULT_FORMATS)
    analysis = analyze(pipe, calibration, schemes, show=show)
    held_out = record_trajectory(pipe, verified_on, held_out_settings(base), show=show)
    names = [str(scheme) for scheme in schemes]
    most = Target(layers=len(calibration.absmax))
    plans = {}
    for name, scheme in UNIFORM.items():
        kept = {n: [c for c in found if str(c.scheme) == scheme] for n, found in analysis.candidates.items()}
        plans[name] = Session(denoiser(pipe), replace(analysis, candidates=kept), held_out, [scheme]).plan(most).plan
    plans[MIXED] = Session(denoiser(pipe), analysis, held_out, names).plan(Target(sqnr_db=TARGET_DB)).plan
    found = observe_clipping(pipe, plans[STATIC], calibrated_on[:CAPTIONS], settings, show=show)
    plans[UNCLIPPED] = unclip(plans[STATIC], found)
    return plans


def drawn_in_float(pipe: Any, plans: dict[str, Plan], texts: list[str], settings: SamplingSettings) -> Drawn:
    """The float pictures of a setting, drawn once with the observers of all plans."""
    observers = {name: ClippingObserver(denoiser(pipe), plan) for name, plan in plans.items()}
    try:
        latents = draw_latents(pipe, texts, settings)
    finally:
        for observer in observers.values():
            observer.close()
    found = {name: observer.found() for name, observer in observers.items()}
    return Drawn(settings, latents, decode(pipe, latents), found)


def measured(pipe: Any, model: Any, texts: list[str], drawn: Drawn, plan: str, setting: str) -> dict[str, Any]:
    """The row of a quantized model at a setting: figures of each caption, and the layers that clip."""
    latents = with_unet(pipe, model, lambda: draw_latents(pipe, texts, drawn.settings))
    pictures = decode(pipe, latents)
    errors = (latents.double() - drawn.latents.double()).square().flatten(1).sum(1)
    powers = errors / drawn.latents.double().square().flatten(1).sum(1)
    squared = (pictures.double() - drawn.pictures.double()).square().flatten(1).mean(1)
    clipping = [found for found in drawn.clipping[plan] if found.clips]
    return {
        "op": "unet",
        "name": f"{plan}, {setting}",
        "plan": plan,
        "setting": setting,
        "settings": recorded(drawn.settings),
        "latent_sqnr_db": [min(MOST_DB, to_db(power)) for power in powers.tolist()],
        "psnr_db": [min(MOST_DB, to_db(error)) for error in squared.tolist()],
        "layers_with_ranges": len(drawn.clipping[plan]),
        "clipping": [
            {"layer": f.layer, "share": f.share, "largest": max(f.largest), "lost_db": f.lost_db} for f in clipping
        ],
    }


def rows(captions: int, *, show: bool = False) -> Iterator[dict[str, Any]]:
    """Every plan at every setting, one setting after the other."""
    subject = SUBJECTS[DEMO]
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    pipe = subject.load(dtype).to(device())
    base = SamplingSettings(subject.steps, subject.guidance_scale, 0)
    plans = make_plans(pipe, base, list(changed(base, list(SETTINGS.values()))), show=show)
    setup = Setup(pipe, None, None)  # type: ignore[arg-type] - quantizing asks for the pipeline alone
    models = {name: quantized(setup, plan) for name, plan in plans.items()}
    texts = [text for text, _ in held_out_captions(captions)]
    tested = replace(base, seed=TEST_SEED)
    for setting, changes in SETTINGS.items():
        drawn = drawn_in_float(pipe, plans, texts, changed(tested, [changes])[0])
        for name, model in models.items():
            yield measured(pipe, model, texts, drawn, name, setting)


def table(data: dict[str, Any]) -> str:
    """Latents, pictures and clipping layers of each plan at each setting, for the page of all results."""
    found = {(row["plan"], row["setting"]): row for row in data["rows"]}
    plans = [plan for plan in PLANS if any(key[0] == plan for key in found)]
    settings = [setting for setting in SETTINGS if all((plan, setting) in found for plan in plans)]
    captions = len(data["rows"][0]["psnr_db"])
    parts = [
        "**One plan at other settings** (the demo model, every layer in W8A8 or planned for "
        f"{TARGET_DB:g} dB; {captions} captions, one seed each): mean / worst of the captions against the float "
        "pictures of the same setting"
    ]
    for key, words in (("latent_sqnr_db", "SQNR of the latent, dB"), ("psnr_db", "PSNR of the picture, dB")):
        lines = [[s, *(_mean_and_worst(found[plan, s][key]) for plan in plans)] for s in settings]
        parts.append(markdown([words, *plans], lines))
    ranged = [plan for plan in plans if any(found[plan, s]["layers_with_ranges"] for s in settings)]
    clipping = [[s, *(_clipping(found[plan, s]) for plan in ranged)] for s in settings]
    parts.append(markdown(["layers that clip, and the most that one loses", *ranged], clipping))
    return "\n\n".join(parts)


def _mean_and_worst(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f} / {min(values):.1f}"


def _clipping(row: dict[str, Any]) -> str:
    most = max((found["lost_db"] for found in row["clipping"]), default=0.0)
    return f"{len(row['clipping'])} of {row['layers_with_ranges']}" + (f", {most:.1f} dB" if most else "")


def main(arguments: list[str]) -> None:
    """Measure every plan at every setting; rows are kept as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks robustness", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=CAPTIONS, help="held out, that each setting is drawn for")
    results.add_options(parser)
    options = parser.parse_args(arguments)
    output = results.Output.of(WHAT, options)
    for row in rows(options.captions):
        output.add(row)
        print(f"{row['name']}: {_mean_and_worst(row['psnr_db'])} dB of PSNR, {_clipping(row)} clip", flush=True)
    print(*output.files, sep="\n")
