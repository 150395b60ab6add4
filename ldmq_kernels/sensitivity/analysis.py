"""The whole analysis: each candidate of each layer, and each block, at the UNet's output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmq_kernels.calibration.adjoint import End, is_whole
from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.drawings import Call, texts_of
from ldmq_kernels.calibration.in_tiles import in_tiles
from ldmq_kernels.calibration.probes import MEMORY, PROBES, chunks_of_layers, record
from ldmq_kernels.calibration.ranges import range_drift, spread_steps
from ldmq_kernels.calibration.settings import Settings, recorded
from ldmq_kernels.calibration.trajectory import Trajectory
from ldmq_kernels.chunks import chunks_within
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.nn import QuantizedLayer, timestep_groups
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import Scheme
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.sensitivity.beginnings import Beginnings
from ldmq_kernels.sensitivity.candidates import WHOLE, LayerCandidate, LayerSearch, Method
from ldmq_kernels.sensitivity.ends import Following
from ldmq_kernels.sensitivity.identity import call_identity, pipeline_identity
from ldmq_kernels.sensitivity.output_noise import StepNoise, noise_of_calls, output_noise, pooled, summed, swapped
from ldmq_kernels.sensitivity.similarity import (
    SSIM,
    Decoder,
    float_pictures,
    middle_step,
    scored_layers,
    structural_noise,
)
from ldmq_kernels.sensitivity.stored import (
    candidates_of,
    noise_of,
    number_of,
    store_candidates,
    store_noise,
    store_number,
)
from ldmq_kernels.sensitivity.work import Work

ANALYSED_STEPS = 8
ALL = "all"
AUTO = "auto"
SMALL_MODEL = 2_000_000  # parameters up to which every candidate is run on its own, and two prompts at each step
EXACT_RUNS = 24  # of a larger model, with one prompt at each step: the candidates that estimates call the noisiest
LARGE_EXACT_RUNS = 12  # of a model so large that each takes some ten seconds on a CPU, and layers share the noise
TOGETHER = 1 << 30  # bytes of float weights of the layers that are quantized one by one for the same calls

Key = tuple[str, str]


@dataclass(frozen=True)
class Analysis:
    """The noise that every candidate of every layer makes.

    Attributes:
        steps: the sampling steps that noise is measured at.
        candidates: layer -> its candidates, at most one a scheme.
        output: (layer, scheme) -> noise at the UNet's output with this layer alone quantized so.
        blocks: (block, scheme) -> noise at the output with this block alone quantized so.
        exact: the keys of `output` that were measured by a run; the others are estimated by backward probes.
        signals: other measures by name, "ssim" -> (layer, scheme) -> 1 - structural similarity.
        estimates: (layer, scheme) -> the estimate by backward probes, also of those that were run.
        decoder: draws the pictures that structural similarity was measured on, with the signal "ssim".
    """

    calibration: Calibration
    steps: list[int]
    candidates: dict[str, list[LayerCandidate]]
    output: dict[Key, StepNoise]
    blocks: dict[Key, StepNoise]
    exact: frozenset[Key] = frozenset()
    signals: dict[str, dict[Key, float]] = field(default_factory=dict)
    estimates: dict[Key, StepNoise] = field(default_factory=dict)
    decoder: Decoder | None = None

    def drift(self) -> dict[str, float]:
        """Layer -> how many times larger its input gets than at the first step."""
        return {name: range_drift(by_step) for name, by_step in self.calibration.absmax.items()}

    def candidate(self, layer: str, scheme: str) -> LayerCandidate | None:
        """The candidate of a layer for a scheme, if the layer can have it."""
        return next((c for c in self.candidates[layer] if str(c.scheme) == scheme), None)


def quantized_as(name: str, layer: FloatLayer, candidate: LayerCandidate) -> nn.Module:
    """The layer quantized as a candidate has it; the float one stays as it is."""
    if candidate.quantized_layer is not None:
        return candidate.quantized_layer
    return quantize_layer(name, layer, candidate.layer_plan)


def cross_validated_noise(
    model: nn.Module, chosen: Mapping[str, LayerCandidate], folds: Mapping[int, Trajectory], calibration: Calibration
) -> StepNoise:
    """Noise at the output with these layers quantized, on each fold of the prompts as the other fold makes them.

    Args:
        chosen: layer -> a candidate that GPTQ does not round.
        folds: of a float trajectory of `calibration`, see `Trajectory.by_fold`.

    Raises:
        ValueError: the output is not finite, or GPTQ rounds one of the layers.
    """
    modules, noises = quantizable_layers(model), []
    for fold, trajectory in folds.items():
        quantized = _quantized_on(fold, modules, chosen)
        with swapped(model, quantized), timestep_groups.following(model, calibration.timestep_groups):
            noises.append(output_noise(model, trajectory, by_sample=True))
    return pooled(noises)


def _quantized_on(
    fold: int, modules: Mapping[str, FloatLayer], chosen: Mapping[str, LayerCandidate]
) -> dict[str, QuantizedLayer]:
    """Layers quantized as candidates are judged on a fold."""
    return {name: quantize_layer(name, modules[name], c.judged_on(fold)) for name, c in chosen.items()}


class _TrialModel:
    """The float model, the analysed part of its trajectory, and runs along it with some layers quantized."""

    def __init__(self, pipe: Any, calibration: Calibration, steps: list[int], prompts: int) -> None:
        self.pipe, self.model, self.calibration = pipe, denoiser(pipe), calibration
        self.modules = quantizable_layers(self.model)
        self.trajectory = analysed_part(calibration.trajectory, steps, prompts)
        self.folds = self.trajectory.by_fold()

    @contextlib.contextmanager
    def quantized(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """The model with these layers in place of its own, inside this block."""
        with swapped(self.model, layers), timestep_groups.following(self.model, self.calibration.timestep_groups):
            yield

    def noise_of_each(self, sets: Mapping[str, Mapping[str, LayerCandidate]]) -> dict[str, StepNoise]:
        """Noise at the UNet's output with each of some sets of layers quantized, as `cross_validated_noise` has it."""
        layers = {name for of_set in sets.values() for name in of_set}
        noises: dict[str, list[StepNoise]] = {item: [] for item in sets}
        is_right = True  # as far as is known: once it is not, nothing is skipped any more
        with in_tiles(self.model) as tiles, tiles:
            for fold, trajectory in self.folds.items():
                made = {item: _quantized_on(fold, self.modules, of_set) for item, of_set in sets.items()}
                for number, call in enumerate(trajectory.calls):
                    beginnings = Beginnings(self.model, call, layers if is_right else (), thorough=number == 0)
                    is_right = is_right and beginnings.is_right
                    for item, quantized in made.items():
                        with self.quantized(quantized), beginnings.skipped(quantized):
                            noises[item].append(noise_of_calls([(call, call.run(self.model))], by_sample=True))
        return {item: pooled(of_calls) for item, of_calls in noises.items()}


def analysed_part(trajectory: Trajectory, steps: Sequence[int], prompts: int) -> Trajectory:
    """The calls of some steps, each with `prompts` of its prompts: others at each step, in turn."""
    part = trajectory.at_steps(steps)
    calls = []
    for place, step in enumerate(sorted({call.step for call in part.calls})):
        drawn = sorted({prompt for call in part.calls if call.step == step for prompt in call.prompts})
        taken = {drawn[(place * prompts + i) % len(drawn)] for i in range(min(prompts, len(drawn)))}
        calls += [
            call.of_prompts(sorted(taken & set(call.prompts)))
            for call in part.calls
            if call.step == step and taken & set(call.prompts)
        ]
    return replace(part, calls=calls)


def _search(
    trial: _TrialModel,
    schemes: list[Scheme],
    method: Method,
    probes: int,
    following: Following | None,
    work: Work,
    show: bool,
) -> Any:
    def search(names: list[str]) -> Iterator[tuple[str, list[LayerCandidate]]]:
        if not names:
            return
        for chunk in chunks_of_layers(trial.model, trial.trajectory.calls, probes, names):
            records = record(trial.model, trial.trajectory, chunk, probes)
            for name in chunk:
                layer_search = LayerSearch(name, trial.modules[name], records.pop(name), trial.calibration, method)
                candidates = layer_search.candidates(schemes)
                if following is None:
                    yield name, candidates
                    continue
                following.add(name, candidates, layer_search.judges)
                if following.bytes > MEMORY:
                    yield from following.followed()
        if following is not None:
            yield from following.followed()

    names = list(trial.calibration.absmax)
    return work.run(
        "noise of each layer",
        names,
        search,
        store=store_candidates,
        restore=lambda name, stored: candidates_of(stored, trial.modules[name]),
        show=show,
    )


def _by_key(candidates: dict[str, list[LayerCandidate]]) -> Iterator[tuple[Key, LayerCandidate]]:
    """All candidates of all layers, each with its layer and scheme."""
    for name, of_layer in candidates.items():
        for candidate in of_layer:
            yield (name, str(candidate.scheme)), candidate


def _exact_keys(
    estimates: dict[Key, StepNoise], candidates: dict[str, list[LayerCandidate]], exact: str | int
) -> list[Key]:
    """The candidates to run alone; those of GPTQ make too little noise on the samples that it rounded for."""
    everything = [key for key, c in _by_key(candidates) if c.quantized_layer is None]
    if exact == ALL:
        return everything
    estimated = [key for key in everything if key in estimates]
    noisiest = sorted(estimated, key=lambda key: -estimates[key].mean_power)[: int(exact)]
    unknown = [key for key in everything if key not in estimates]
    return list(dict.fromkeys([*unknown, *noisiest]))


def _run_each(
    trial: _TrialModel, stage: str, sets: dict[str, dict[str, LayerCandidate]], work: Work, show: bool
) -> dict[str, StepNoise]:
    def run(items: list[str]) -> Iterator[tuple[str, StepNoise]]:
        # of a large model few at once, since nothing is stored before all of them are done
        least = 0 if sum(p.numel() for p in trial.model.parameters()) <= SMALL_MODEL else TOGETHER // 6
        sizes = {item: max(least, sum(trial.modules[name].weight.nbytes for name in sets[item])) for item in items}
        for chunk in chunks_within(items, sizes, TOGETHER):
            yield from trial.noise_of_each({item: sets[item] for item in chunk}).items()

    return work.run(
        stage, list(sets), run, store=store_noise, restore=lambda _item, stored: noise_of(stored), show=show
    )


def _similarity(
    trial: _TrialModel, decoder: Decoder, candidates: dict[str, list[LayerCandidate]], work: Work, show: bool
) -> dict[Key, float]:
    trajectory = middle_step(trial.trajectory)
    pictures = float_pictures(trajectory, decoder)
    sets = {f"{name} {c.scheme}": (name, c) for name in scored_layers(candidates) for c in candidates[name]}

    def run(items: list[str]) -> Iterator[tuple[str, float]]:
        for item in items:
            name, candidate = sets[item]
            with trial.quantized({name: quantized_as(name, trial.modules[name], candidate)}):
                yield item, structural_noise(trial.model, trajectory, decoder, pictures)

    losses = work.run(
        "similarity of pictures",
        list(sets),
        run,
        store=store_number,
        restore=lambda _item, stored: number_of(stored),
        show=show,
    )
    return {(sets[item][0], str(sets[item][1].scheme)): value for item, value in losses.items()}


def open_work(
    pipe: Any,
    work_dir: Path | None,
    calls: Sequence[Call],
    sampling: Settings,
    mode: str,
    schemes: Sequence[Scheme],
    *,
    analysed_steps: int = ANALYSED_STEPS,
    method: Method = WHOLE,
    ends: Sequence[End] = (),
) -> Work:
    """The work of the analysis that these arguments ask for: also before hours, to see that the folder serves.

    Raises:
        ValueError: a call is a function, of which no file can tell what it draws.
        WorkError: the folder is not private, or holds work of other weights, settings or versions.
    """
    if work_dir is None:
        return Work(None, {})
    settings = {
        "mode": mode,
        "prompts": [call_identity(call) for call in calls],
        **recorded(sampling),
        "schemes": [str(scheme) for scheme in schemes if scheme.quantizes],
        "analysed_steps": analysed_steps,
        "method": asdict(method),
        "ends": list(ends),
        **pipeline_identity(pipe, texts_of(calls)),
    }
    return Work(work_dir, settings)


@torch.no_grad()
def analyze(
    pipe: Any,
    calibration: Calibration,
    schemes: Sequence[Scheme],
    *,
    analysed_steps: int = ANALYSED_STEPS,
    exact: str | int = AUTO,
    signals: Sequence[str] = ("sqnr",),
    method: Method = WHOLE,
    ends: Sequence[End] = (),
    work_dir: Path | None = None,
    show: bool = False,
) -> Analysis:
    """Measure SQNR at the UNet's output for every layer and every block, in each scheme.

    Args:
        pipe: the pipeline that was calibrated, still in full precision.
        schemes: the schemes to try; the float scheme needs no trial.
        analysed_steps: how many sampling steps, spread over the trajectory, each trial is run on.
        exact: "all" runs the UNet for every candidate of every layer, a number for so many that the backward
            probes estimate to be the noisiest, "auto" for all of a small model and 24 of a larger one, 12 above
            100 million parameters, or none where noise at the end of the trajectory is known, by which layers are
            chosen then.
        signals: "sqnr", and "ssim" for the structural similarity of pictures.
        method: parts of the search of each layer.
        ends: where noise at the end of the trajectory is estimated too: "latent", "picture".
        work_dir: keeps results, so that the same call goes on after a kill.

    Raises:
        ValueError: an unknown signal or `exact`, or an output that is not finite.
        WorkError: the folder is not private, or holds work of other weights, settings or versions.
    """
    if unknown := set(signals) - {"sqnr", SSIM}:
        raise ValueError(f"unknown signal {sorted(unknown)[0]!r}: choose among sqnr and ssim")
    tried = [scheme for scheme in schemes if scheme.quantizes]
    steps = spread_steps(calibration.trajectory.steps, analysed_steps)
    small = sum(p.numel() for p in denoiser(pipe).parameters()) <= SMALL_MODEL
    if exact not in (AUTO, ALL) and not isinstance(exact, int):
        raise ValueError(f"exact is {exact!r}: choose 'all', 'auto' or a number of runs")
    analysed_prompts = 2 if small else 1
    trial = _TrialModel(pipe, calibration, steps, analysed_prompts)
    work = open_work(
        pipe,
        work_dir,
        calibration.calls,
        calibration.settings,
        calibration.mode,
        tried,
        analysed_steps=analysed_steps,
        method=method,
        ends=ends,
    )

    following = Following(pipe, calibration, ends, show=show) if ends else None
    candidates = _search(trial, tried, method, PROBES, following, work, show)
    estimates = {key: c.estimate for key, c in _by_key(candidates) if c.estimate is not None}
    if exact == AUTO:
        known = bool(ends) and all(c.end is not None for _, c in _by_key(candidates))  # layers are chosen by that
        exact = 0 if known else ALL if small else EXACT_RUNS if is_whole(denoiser(pipe)) else LARGE_EXACT_RUNS
    keys = _exact_keys(estimates, candidates, exact)
    chosen = {key: {key[0]: c} for key, c in _by_key(candidates)}
    measured = _run_each(trial, "SQNR of each layer", {" ".join(key): chosen[key] for key in keys}, work, show)
    output = estimates | {key: measured[" ".join(key)] for key in keys}
    output = {key: output[key] for key in chosen}
    blocks = _blocks(trial, chosen, output, exact, work, show)
    decoder, similarity = None, {}
    if SSIM in signals:
        decoder = Decoder(pipe)
        similarity = {SSIM: _similarity(trial, decoder, candidates, work, show)}
    return Analysis(calibration, steps, candidates, output, blocks, frozenset(keys), similarity, estimates, decoder)


def _blocks(
    trial: _TrialModel,
    chosen: dict[Key, dict[str, LayerCandidate]],
    output: dict[Key, StepNoise],
    exact: str | int,
    work: Work,
    show: bool,
) -> dict[Key, StepNoise]:
    """Each block's noise: run where every layer is and none is rounded by GPTQ, else the sum of its layers'."""
    members: dict[Key, dict[str, LayerCandidate]] = {}
    for (name, scheme), candidate in chosen.items():
        members.setdefault((block_of(trial.model, name), scheme), {}).update(candidate)
    summed_up = {key: summed(output[name, key[1]] for name in layers) for key, layers in members.items()}
    if exact != ALL:
        return summed_up
    plain = {" ".join(key): m for key, m in members.items() if all(c.quantized_layer is None for c in m.values())}
    runs = _run_each(trial, "SQNR of each block", plain, work, show)
    return {key: runs.get(" ".join(key), total) for key, total in summed_up.items()}
