"""The adjoint of the whole sampler: how much each value of each UNet output weighs in the end of the trajectory.

A small error e of the UNet's output in call i moves the final latent by J_i e, J_i going through guidance, the
scheduler and all later calls of the UNet. For a random v with independent entries of variance 1 at the end,
lambda_i = J_i^T v has v . J_i e = lambda_i . e, and the mean of its square over v is |J_i e|^2. One pass from the
end to the beginning gives the lambda of every call.

The pipeline draws once more with its recorded outputs (`redrawn`). Then the calls are walked backwards, each computed
again with gradients: the activations of one call are in memory at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.decoding import decoded
from ldmq_kernels.calibration.denoisers import denoiser, whole_pipeline
from ldmq_kernels.calibration.drawings import LATENT as LATENTS
from ldmq_kernels.calibration.drawings import Call, drawings
from ldmq_kernels.calibration.ranges import spread_steps
from ldmq_kernels.calibration.recording import Ran, give, recording
from ldmq_kernels.calibration.redrawn import NoAdjoint, Redrawn, frozen
from ldmq_kernels.calibration.settings import Settings, sample_number
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall
from ldmq_kernels.progress import track

End = Literal["latent", "picture"]
LATENT: End = "latent"
PICTURE: End = "picture"
WHOLE_MODEL = 100_000_000  # parameters up to which all pictures and calls count
LARGE_PICTURES = 2  # of a larger model
LARGE_CALLS = 8  # of each run of a larger model: in the median sizes come out smaller than by all


@dataclass(frozen=True)
class CallWeights:
    """What a call's contribution counts for, (probes,) float64: as an amplitude, and its square as a power."""

    amplitude: Tensor
    power: Tensor


@dataclass(frozen=True)
class EndCall:
    """One call of the UNet for some pictures, and what its output weighs at their ends.

    Attributes:
        adjoints: (probes, *output.shape) float32; probes of the first end come first.
        weights: for how many calls of its run this one stands.
    """

    call: UNetCall
    adjoints: Tensor
    weights: CallWeights


@dataclass(frozen=True)
class EndTrajectory:
    """The calls of a float trajectory for some of its pictures with their adjoints.

    Attributes:
        calls: of one run of the pipeline after the other.
        ends: where probes were drawn, in order: "latent", "picture"; `probes` of them each.
        scale: end -> picture, all of them -> what a squared amplitude is divided by: the latent's sum of squares, so
            that noise is relative, or a picture's number of values, so that it is the mean squared error.
    """

    calls: list[EndCall]
    ends: tuple[End, ...]
    probes: int
    scale: dict[End, dict[int, float]]

    @property
    def pictures(self) -> list[int]:
        """The indices of the pictures' prompts, ascending."""
        return sorted(self.scale[self.ends[0]])

    @classmethod
    def without_calls(cls, pictures: Sequence[int], ends: Sequence[End], probes: int) -> EndTrajectory:
        """The end of some pictures before anything is known of it."""
        return cls([], tuple(ends), probes, {end: dict.fromkeys(sorted(pictures), 0.0) for end in ends})

    def thinned(self, count: int) -> EndTrajectory:
        """So many calls of each run, spread over it, each standing for its share of all.

        Contributions in between are interpolated, in proportion to the size of the adjoints, which are known of all
        calls: the last steps' are several times larger than the ones before.
        """
        runs: dict[tuple[int, ...], list[EndCall]] = {}
        for of_call in self.calls:
            runs.setdefault(of_call.call.prompts, []).append(of_call)
        return replace(self, calls=[kept for run in runs.values() for kept in _spread_over(run, count)])


def _spread_over(run: Sequence[EndCall], count: int) -> list[EndCall]:
    """Some calls of a run, the first and the last among them, with their shares."""
    if len(run) <= count:
        return list(run)
    places, every = spread_steps(len(run), count), np.arange(len(run))
    size = torch.stack([of_call.adjoints.double().square().flatten(1).sum(1).cpu() for of_call in run]).sqrt()
    kept = []
    for place, row in zip(places, np.eye(len(places)), strict=True):
        share = torch.from_numpy(np.interp(every, places, row))[:, None]
        times = torch.where(size[place] > 0, size / size[place], 0.0)  # 0: a call that the end does not depend on
        weights = CallWeights((share * times).sum(0), (share * times.square()).sum(0))
        kept.append(replace(run[place], weights=weights))
    return kept


def is_whole(model: nn.Module) -> bool:
    """Whether a model is so small that all pictures and calls of a calibration count at the end."""
    return sum(parameter.numel() for parameter in model.parameters()) <= WHOLE_MODEL


def pictures_that_count(model: nn.Module, calls: int, settings: int, most: int | None = None) -> list[int]:
    """The samples of a calibration that are followed to the end: all, or of a large model the first of each setting.

    Args:
        calls, settings: how many there are of the calibration.
        most: of a small model, at each setting; None for all.
    """
    count = min(calls, most or calls) if is_whole(model) else min(calls, LARGE_PICTURES)
    return [sample_number(call, setting, settings) for setting in range(settings) for call in range(count)]


def rademacher(like: Tensor, seed: int) -> Tensor:
    """A tensor of -1 and 1 at random, of another's shape, dtype and device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, like.shape, generator=generator, device="cpu") * 2 - 1).to(like)


def _gradients(of: Sequence[Tensor], by: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(list(of), list(by), list(weights), retain_graph=True, allow_unused=True))


def _add(sums: list[Tensor | None], more: Sequence[Tensor | None]) -> None:
    for index, value in enumerate(more):
        if value is not None:
            before = sums[index]
            sums[index] = value if before is None else before + value


def scale_of(adjoints: Tensor) -> float:
    """What adjoints are divided by, so that gradients in 16 bit neither vanish nor overflow: a power of two."""
    largest = float(adjoints.abs().amax())
    return 2.0 ** math.frexp(largest)[1] if largest else 1.0


def _through_the_model(
    model: nn.Module,
    call: UNetCall,
    rows: Tensor,
    given: Sequence[Tensor],
    adjoints: Sequence[Tensor],
    layers: Sequence[str],
) -> tuple[list[list[Tensor | None]], list[Ran]]:
    """For each probe the gradients by the floating tensors that a call was given, through the model computed again.

    Args:
        call: cut to some rows of the batch.
        rows: which; the others have no gradient.
        given: the whole tensors, as far as they are wanted.
        layers: that are recorded on the way.
    """
    leaves, form = pytree.tree_flatten((call.args, call.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    wanted = [place for place, tensor in zip(places, given, strict=True) if tensor.requires_grad]
    cut = [adjoint[rows] for adjoint in adjoints]
    size = scale_of(torch.stack(cut))
    with torch.enable_grad(), recording(model, layers, True) as recorder:
        for place in wanted:
            leaves[place] = leaves[place].detach().clone().requires_grad_()
        args, kwargs = pytree.tree_unflatten(leaves, form)
        output = replace(call, args=args, kwargs=kwargs).run(model)
        ran, outputs = recorder.taken()
        found: list[list[Tensor | None]] = [[None] * len(wanted) for _ in cut]
        for probe, adjoint in enumerate(cut if output.requires_grad else ()):
            gradients = torch.autograd.grad(
                output,
                [*(leaves[place] for place in wanted), *outputs],
                (adjoint / size).to(output.dtype),
                retain_graph=probe + 1 < len(adjoints),
                allow_unused=True,
            )
            by_given = [None if g is None else g * size for g in gradients[: len(wanted)]]
            found[probe] = [_spread(g, t, rows) for g, t in zip(by_given, _in_graph(given), strict=True)]
            give(ran, gradients[len(wanted) :], probe, len(cut), size)
    return found, ran


def _in_graph(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def _spread(gradient: Tensor | None, whole: Tensor, rows: Tensor) -> Tensor | None:
    """A gradient by some rows as that by the whole tensor."""
    if gradient is None or gradient.shape == whole.shape:
        return gradient
    return torch.zeros_like(whole).index_copy(0, rows, gradient)


def _walk_back(
    model: nn.Module,
    calls: Sequence[UNetCall],
    rows: Sequence[Tensor],
    run: Redrawn,
    weights: Sequence[Tensor],
    layers: Sequence[str],
    show: bool,
) -> Iterator[tuple[list[Tensor], list[Ran]]]:
    """For each call, from the last to the first, the adjoint of its output of each probe, and what ran of the layers.

    Args:
        calls: cut to the rows of the batch that are wanted.
        weights: for each probe, the gradient at the latents.
    """
    adjoints = [_gradients([run.latents], run.outputs, [weight]) for weight in weights]  # as far as no call is between
    for index in track(range(len(calls) - 1, -1, -1), "adjoint of the sampler", len(calls), show=show):
        of_call = [of_probe[index] for of_probe in adjoints]
        known = [adjoint for adjoint in of_call if adjoint is not None and bool((adjoint != 0).any())]
        if len(known) < len(of_call):
            raise NoAdjoint(f"no gradient runs from its latents to the output of call {index} of its model")
        given = run.inputs[index] if index else [tensor.detach() for tensor in run.inputs[0]]
        ran: list[Ran] = []
        if _in_graph(given) or layers:
            found, ran = _through_the_model(model, calls[index], rows[index], given, known, layers)
            for of_probe, gradients in zip(adjoints, found, strict=True):
                pairs = [(t, g) for t, g in zip(_in_graph(given), gradients, strict=True) if g is not None]
                if pairs:
                    _add(of_probe, _gradients([t for t, _ in pairs], run.outputs[:index], [g for _, g in pairs]))
        yield known, ran


def _weights(
    vae: Any, latents: Tensor, rows: Mapping[int, Sequence[int]], ends: Sequence[End], probes: int
) -> tuple[list[Tensor], dict[End, dict[int, float]]]:
    """The gradient at the latents of every probe, and the `scale` of each end and picture.

    Args:
        rows: picture -> its rows.
    """
    weights: list[Tensor] = []
    scale: dict[End, dict[int, float]] = {}
    for end in ends:
        of_end = [torch.zeros_like(latents) for _ in range(probes)]
        scale[end] = dict.fromkeys(rows, 0.0)
        for picture, of_picture in rows.items():
            for place, row in enumerate(of_picture):
                seeds = [1_000_000 * picture + 1000 * place + 500 * (end == PICTURE) + i for i in range(probes)]
                size, drawn = _probes(vae, latents[row : row + 1].detach(), end, seeds)
                scale[end][picture] += size
                for weight, value in zip(of_end, drawn, strict=True):
                    weight[row] = value[0]
        weights += of_end
    return weights, scale


def _probes(vae: Any, latent: Tensor, end: End, seeds: Sequence[int]) -> tuple[float, list[Tensor]]:
    """What one picture adds to the scale, and the gradient by its latent of a probe for each seed."""
    if end == LATENT:
        return float(latent.double().square().sum()), [rademacher(latent, seed) for seed in seeds]
    with torch.enable_grad():
        picture = decoded(vae, latent.requires_grad_())
    signs = [rademacher(picture.detach(), seed) for seed in seeds]
    return float(picture.numel()), [torch.autograd.grad(picture, latent, v, retain_graph=True)[0] for v in signs]


def sampler_adjoint(
    pipe: Any,
    trajectory: Trajectory,
    calls: Sequence[Call],
    settings: Settings,
    pictures: Sequence[int],
    *,
    ends: Sequence[End] = (LATENT,),
    probes: int,
    show: bool = False,
) -> EndTrajectory:
    """The adjoint of every call of a recorded float trajectory, for some of its pictures.

    Args:
        pipe: the pipeline that the trajectory was recorded of, with `calls` and `settings`; it is left as it is.
        pictures: numbers of samples, see `sample_number`; a call that draws several pictures counts as one.
        ends: where noise counts: the final latent, the decoded picture, or both.
        probes: random probes at each end; each is a backward pass of the model for every call.

    Raises:
        NoAdjoint: gradients do not run through the pipeline from its end to all calls of its model, such as where a
            scheduler rounds or leaves torch; the pipeline draws other pictures from the same seeds; or it has no VAE
            that its latents could be decoded with.
    """
    found = EndTrajectory.without_calls(pictures, ends, probes)
    runs: dict[tuple[int, ...], list[EndCall]] = {}
    for of_call, _ in walk(pipe, trajectory, calls, settings, found, show=show):
        runs.setdefault(of_call.call.prompts, []).append(of_call)
    return replace(found, calls=[of_call for run in runs.values() for of_call in reversed(run)])


def walk(
    pipe: Any,
    trajectory: Trajectory,
    calls: Sequence[Call],
    settings: Settings,
    found: EndTrajectory,
    *,
    layers: Sequence[str] = (),
    show: bool = False,
) -> Iterator[tuple[EndCall, list[Ran]]]:
    """The calls of each run of the pipeline, from its last to its first, with their adjoints; see `sampler_adjoint`.

    Args:
        found: without calls: its pictures are walked to, and its scale is filled.
        layers: of the model, that are recorded on the way.

    Yields:
        A call, and what ran of the layers in it, with the gradients by their outputs.
    """
    model, vae = denoiser(pipe), getattr(whole_pipeline(pipe), "vae", None)
    if PICTURE in found.ends and vae is None:
        raise NoAdjoint("it has no VAE that decodes its latents to pictures")
    once = torch.ones(len(found.ends) * found.probes, dtype=torch.float64, device="cpu")
    for drawing in drawings(calls, settings):
        taken = [sample for sample in drawing.samples if sample in set(found.pictures)]
        if not taken:
            continue
        recorded = [call for call in trajectory.calls if call.prompts == drawing.samples]
        run = Redrawn(pipe, recorded, partial(drawing.run, pipe, LATENTS))
        if PICTURE in found.ends and run.latents.dim() != 4:
            raise NoAdjoint(f"its latents are {tuple(run.latents.shape)}, which its VAE does not decode as they are")
        count = len(drawing.samples)
        rows = {sample: range(drawing.samples.index(sample), run.latents.shape[0], count) for sample in taken}
        with frozen(vae) if isinstance(vae, nn.Module) else contextlib.nullcontext():
            weights, scale = _weights(vae, run.latents, rows, found.ends, found.probes)
        for end in found.ends:
            found.scale[end].update(scale[end])
        cut = [call.of_prompts(taken) for call in recorded]
        rows_of_calls = [torch.tensor(call.rows_of(taken), device=run.latents.device) for call in recorded]
        walked = _walk_back(model, cut, rows_of_calls, run, weights, layers, show)
        for index, (of_call, ran) in zip(range(len(cut) - 1, -1, -1), walked, strict=True):
            adjoints = torch.stack([adjoint[rows_of_calls[index]].float() for adjoint in of_call])
            yield EndCall(cut[index], adjoints, CallWeights(once, once)), ran
