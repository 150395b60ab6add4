"""What remedies for 8-bit activations do to the pictures: python -m benchmarks drawn-remedies

The layers of `remedies` round their inputs by one of them, in float arithmetic and with float weights, and held-out
captions are drawn: what is estimated in the final latent there is held against it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.study import verdict
from benchmarks.study.evaluation import TEST_SEED
from benchmarks.study.remedies import GROUPS, LEFT_OUT, Round, Seen, axis_of, has_a_scale_a_token, remedies
from benchmarks.study.subjects import SUBJECTS, Subject
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import CALIBRATION_PROMPTS, calibration_captions, held_out_captions
from ldmq_kernels.planning.drawn import FloatEnds, Spread
from ldmq_kernels.plans.layers import quantizable_layers

ROTATION = "Hadamard rotation"
DRAWN = (
    "one scale a token or sample",
    *(f"a scale for each {size} channels" for size in GROUPS),
    ROTATION,
    *(f"{ROTATION}, a scale for each {size} channels" for size in GROUPS),
    f"each channel's mean taken off, {ROTATION}",
    "that middle taken off, and channels brought to one range",
)
FED_BACK = (0.25, 0.5, 1.0)  # shares of the error that the next step gets
Hook = Callable[[nn.Module, tuple[Any, ...]], Any]


def _noting(seen: dict[str, Seen], name: str) -> Hook:
    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        one = Seen.of(args[0].movedim(axis_of(layer), -1))
        seen[name] = seen[name] + one if name in seen else one

    return note


def rounding(found: Round) -> Hook:
    """A hook that rounds the input of the layer that it is on."""

    def rounded(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        axis = axis_of(layer)
        x: Tensor = found(args[0].movedim(axis, -1), has_a_scale_a_token(layer)).movedim(-1, axis)
        return (x, *args[1:])

    return rounded


class FedBack:
    """A hook that rounds a layer's input with a share of the error of the step before, all of it as in sigma-delta."""

    def __init__(self, found: Round, share: float = 1.0) -> None:
        self._found, self._share = found, share
        self._left: Tensor | None = None

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Round, and keep what that leaves."""
        wanted: Tensor = args[0] if self._left is None else args[0] + self._share * self._left
        given = rounding(self._found)(layer, (wanted, *args[1:]))
        self._left = wanted - given[0]
        return given

    def forget(self) -> None:
        """Begin anew, as for other pictures."""
        self._left = None


def _forgetting(hooks: Iterable[FedBack]) -> Callable[..., None]:
    """A hook of the model that begins anew where the timestep rises: with other pictures."""
    last = [0.0]

    def look(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now = float(torch.as_tensor(timestep).flatten()[0])
        if now > last[0]:
            for hook in hooks:
                hook.forget()
        last[0] = now

    return look


def measured(subject: Subject, captions: int) -> list[dict[str, Any]]:
    """A row for each remedy on one model."""
    pipe, settings = subject.load(torch.float32), SamplingSettings(subject.steps, subject.guidance_scale, 0)
    layers = {n: x for n, x in quantizable_layers(denoiser(pipe)).items() if n not in LEFT_OUT[subject.name]}
    seen: dict[str, Seen] = {}
    handles = [layer.register_forward_pre_hook(_noting(seen, name)) for name, layer in layers.items()]
    record_trajectory(pipe, calibration_captions(CALIBRATION_PROMPTS), settings)
    for handle in handles:
        handle.remove()
    by_layer = {name: remedies(of_layer) for name, of_layer in seen.items()}
    texts = [text for text, _ in held_out_captions(captions)]
    ends, rows = FloatEnds(pipe, texts, replace(settings, seed=TEST_SEED)), []

    def draw(words: str, hooks: dict[str, Any]) -> None:
        handles = [layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
        fed = [hook for hook in hooks.values() if isinstance(hook, FedBack)]
        handles.append(denoiser(pipe).register_forward_pre_hook(_forgetting(fed), with_kwargs=True))
        by_picture = {measure: list(values) for measure, values in ends.compare().by_picture.items()}
        for handle in handles:
            handle.remove()
        rows.append({"op": "drawn", "model": subject.name, "remedy": words, "by_picture": by_picture})
        print(_line(rows[-1]), flush=True)

    for words in DRAWN:
        draw(words, {name: rounding(found[words]) for name, found in by_layer.items()})
    for share in FED_BACK:
        words = f"{ROTATION}, {share:.0%} of its error fed back to the next step"
        draw(words, {name: FedBack(found[ROTATION], share) for name, found in by_layer.items()})
    return rows


def _line(row: dict[str, Any]) -> list[str]:
    psnr, latent = (Spread.of(row["by_picture"][measure]) for measure in ("psnr", "latent"))
    return [row["model"], row["remedy"], f"{psnr.mean:.2f}", f"{psnr.worst_tenth:.2f}", f"{latent.mean:.2f}"]


def table(data: dict[str, Any]) -> str:
    """What remedies do to the pictures, for the pages."""
    tried = verdict.by_words(data["rows"], "remedy")
    words = (
        f"**The same, drawn** ({len(data['rows'][0]['by_picture']['psnr'])} held-out captions, inputs rounded "
        f"everywhere, weights in float; {data['device']}, torch {data['torch']}, commit "
        f"{(data.get('commit') or 'none')[:10]}). {verdict.told(verdict.paying(tried, tried[ROTATION]), ROTATION)}"
    )
    head = ["model", "rounding", "PSNR, dB: mean of pictures", "worst tenth", "SQNR of the latent, dB"]
    return f"{words}\n\n" + markdown(head, [_line(row) for row in data["rows"]])


def main(arguments: list[str]) -> None:
    """Measure both models and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks drawn-remedies", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=32, help="held out, drawn once each")
    options = parser.parse_args(arguments)
    rows = [row for subject in reversed(SUBJECTS.values()) for row in measured(subject, options.captions)]
    print(f"written: {results.keep('drawn_remedies', rows, {})}")
