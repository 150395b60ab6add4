"""What would make 8-bit activations finer, in the final latent: python -m benchmarks remedies

Each remedy rounds the inputs of every layer along the float trajectory, in float arithmetic, with float weights. What
that does to the final latent is estimated by the adjoint of the sampler: rounding errors of different values are taken
for independent, so that their squares, each weighted with the square of its adjoint, add up. Estimates of this kind
compare remedies; they leave out what is alike from step to step, and what weights add.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.study.subjects import SUBJECTS, Subject
from ldmq_kernels.calibration.adjoint import LATENT, sampler_adjoint
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.probes import EndRecord, chunks_of_layers, end_records
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import record_trajectory
from ldmq_kernels.demo.run import calibration_captions
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.hadamard import block_size, rotate, unrotate
from ldmq_kernels.plans.layers import quantizable_layers

PICTURES, PROBES = 4, 2
LEFT_OUT = {"demo": ("conv_in", "conv_out"), "second": ("pos_embed.proj",)}  # which SDNQ computes in float
GROUPS = (32, 64, 128)
Round = Callable[[Tensor, bool], Tensor]  # (N, ..., C), whether each token has its scale -> the rounded values


def _axes(x: Tensor, per_token: bool) -> tuple[int, ...]:
    return (-1,) if per_token else tuple(range(1, x.dim()))


def as_it_is(x: Tensor, per_token: bool) -> Tensor:
    """One symmetric scale for each token or sample."""
    scale = x.abs().amax(_axes(x, per_token), keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def _clipped(x: Tensor, per_token: bool) -> Tensor:
    scale = 0.8 * x.abs().amax(_axes(x, per_token), keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round().clamp(-127, 127) * scale


def _zero_point(x: Tensor, per_token: bool) -> Tensor:
    axes = _axes(x, per_token)
    low, high = x.amin(axes, keepdim=True).clamp_max(0), x.amax(axes, keepdim=True).clamp_min(0)
    scale = ((high - low) / 254).clamp_min(1e-12)
    zero = (-low / scale).round() - 127
    return ((x / scale).round() + zero).clamp(-127, 127).sub(zero) * scale


def _rotated(x: Tensor, per_token: bool) -> Tensor:
    return unrotate(as_it_is(rotate(x), per_token)) / block_size(x.shape[-1])


def _grouped(size: int) -> Round:
    """A scale for each group of channels, of each token or sample."""

    def rounded(x: Tensor, per_token: bool) -> Tensor:
        if x.shape[-1] % size:
            return as_it_is(x, per_token)
        groups = x.unflatten(-1, (-1, size))
        axes = (-1,) if per_token else (*range(1, x.dim() - 1), -1)
        scale = groups.abs().amax(axes, keepdim=True).clamp_min(1e-12) / 127
        return ((groups / scale).round() * scale).flatten(-2)

    return rounded


def _rotated_in_groups(size: int) -> Round:
    return lambda x, per_token: unrotate(_grouped(size)(rotate(x), per_token)) / block_size(x.shape[-1])


@dataclass
class Seen:
    """What a layer's inputs (N, ..., C) were in calibration, each channel of all of them together, (C,)."""

    low: Tensor
    high: Tensor
    total: Tensor
    calls: int = 1

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        """What one input was."""
        flat = x.flatten(0, -2)
        return cls(flat.amin(0), flat.amax(0), flat.mean(0))

    def __add__(self, other: Seen) -> Seen:
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Seen(low, high, self.total + other.total, self.calls + other.calls)


def remedies(seen: Seen) -> dict[str, Round]:
    """The remedies for a layer by their words."""
    middle, reach, mean = (seen.low + seen.high) / 2, (seen.high - seen.low).clamp_min(1e-9), seen.total / seen.calls
    factor = torch.exp2(torch.log2(reach / reach.mean()).round())

    def shifted(by: Tensor, inner: Round) -> Round:
        return lambda x, per_token: inner(x - by, per_token) + by

    return {
        "one scale a token or sample": as_it_is,
        "its range cut to 0.8": _clipped,
        "a zero point": _zero_point,
        **{f"a scale for each {size} channels": _grouped(size) for size in GROUPS},
        "Hadamard rotation": _rotated,
        **{f"Hadamard rotation, a scale for each {size} channels": _rotated_in_groups(size) for size in GROUPS},
        "the middle of each channel's range taken off": shifted(middle, as_it_is),
        "that middle taken off, and channels brought to one range": shifted(
            middle, lambda x, per_token: as_it_is(x / factor, per_token) * factor
        ),
        "each channel's mean taken off, Hadamard rotation": shifted(mean, _rotated),
        "a scale for each pixel": lambda x, _: as_it_is(x, True),
    }


def axis_of(layer: Any) -> int:
    """Where the channels of a layer's input are."""
    return -1 if kind_of(layer) == "linear" else 1


def has_a_scale_a_token(layer: Any) -> bool:
    """Whether dynamic scales are of tokens and not of samples."""
    return axis_of(layer) == -1 or (layer.kernel_size == (1, 1) and layer.stride == (1, 1))


def layer_noise(layer: Any, records: list[EndRecord]) -> dict[str, float]:
    """By each remedy, what the rounding of one layer's inputs adds to the squared error of the final latents."""
    axis, per_token = axis_of(layer), has_a_scale_a_token(layer)
    known = [record for record in records if record.gradients is not None]
    found = remedies(functools.reduce(Seen.__add__, (Seen.of(r.x.movedim(axis, -1)) for r in known))) if known else {}
    sums = dict.fromkeys(found, 0.0)
    for record in known:
        x = record.x.detach().requires_grad_()
        with torch.enable_grad():
            output = layer(x)
        weights = [torch.autograd.grad(output, x, g, retain_graph=True)[0].square() for g in record.gradients]
        weight = torch.stack(weights).mean(0).movedim(axis, -1)
        plain = record.x.movedim(axis, -1)
        for words, rounded in found.items():
            sums[words] += float(((rounded(plain, per_token) - plain).square() * weight).sum())
    return sums


def measured(subject: Subject) -> list[dict[str, Any]]:
    """A row for each layer of a model."""
    pipe = subject.load(torch.float32)
    for name, part in list(pipe.components.items()):  # one encoder in two places is patched once only
        if name.endswith("_2") and isinstance(part, nn.Module):
            setattr(pipe, name, copy.deepcopy(part))
    settings, texts = SamplingSettings(subject.steps, subject.guidance_scale, 0), calibration_captions(PICTURES)
    model, trajectory = denoiser(pipe), record_trajectory(pipe, texts, settings)
    ends = sampler_adjoint(pipe, trajectory, texts, settings, range(len(texts)), ends=(LATENT,), probes=PROBES)
    layers, rows = quantizable_layers(model), []
    power = sum(ends.scale[LATENT].values())
    names = [name for name in layers if name not in LEFT_OUT[subject.name]]
    for chunk in chunks_of_layers(model, [c.call for c in ends.calls], PROBES, names):
        records: dict[str, list[EndRecord]] = {name: [] for name in chunk}
        for name, of_call in end_records(model, ends, chunk):
            records[name].append(of_call)
        for name in chunk:
            noise = {words: value / power for words, value in layer_noise(layers[name], records.pop(name)).items()}
            rows.append({"op": "layer", "model": subject.name, "layer": name, "noise": noise})
    return rows


def _db(noise: float) -> str:
    return f"{-10 * math.log10(noise):.1f}"


def table(data: dict[str, Any]) -> str:
    """Decibels in the final latent of each remedy, everywhere and where it is better, for the pages."""
    lines = []
    for name in SUBJECTS:
        rows = [row["noise"] for row in data["rows"] if row["model"] == name and row["noise"]]
        first = next(iter(rows[0])) if rows else ""
        for words in rows[0] if rows else ():
            everywhere = sum(noise[words] for noise in rows)
            better = sum(min(noise[words], noise[first]) for noise in rows)
            lines.append([name, words, _db(everywhere), _db(better)])
    words = (
        f"**What would make 8-bit activations finer** ({PICTURES} captions, SQNR of the final latents in dB, estimated "
        "by the sampler's adjoint from what rounding does to the layers' inputs, without the layers that SDNQ computes "
        f"in float; {data['device']}, torch {data['torch']}, commit {(data.get('commit') or 'none')[:10]}). Hadamard "
        "rotation is built in (`w8a8-rotated`): it changes what is rounded, and no product. A zero point, or a value "
        "taken off each channel, needs products that put it back where zeros pad a convolution; scales for pixels or "
        "for groups of channels need sums that are scaled within a product."
    )
    return f"{words}\n\n" + markdown(["model", "rounding", "everywhere", "where it is better"], lines)


def main(arguments: list[str]) -> None:
    """Measure both models and write the results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks remedies", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=results.ROOT / "build" / "remedies.json", help="kept in between")
    options = parser.parse_args(arguments)
    rows = json.loads(options.rows.read_text()) if options.rows.exists() else []
    for name, subject in SUBJECTS.items():
        if all(row["model"] != name for row in rows):
            rows += measured(subject)
            options.rows.parent.mkdir(parents=True, exist_ok=True)
            options.rows.write_text(json.dumps(rows))
    print(f"written: {results.keep('remedies', rows, {})}")
