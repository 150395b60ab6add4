"""The way to quantize one layer in each scheme that makes the least noise in its own output.

Searched one after the other, each kept only if it pays: the first token of the text in 16 bit, smoothing (an alpha,
or one factor for each part of a concatenation), the range that a static scale covers, GPTQ's rounding of 4-bit
weights, and a bias that takes the mean error away. A trial runs on the recorded inputs of the float layer,
cross-validated: what it takes from a calibration (ranges, smoothing vectors, Hessians, mean errors) it takes
from the other half of the prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.hessian import HessianObserver
from ldmq_kernels.calibration.probes import LayerRecord
from ldmq_kernels.calibration.ranges import static_scale
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.nn import QuantizedLayer, quantized_class
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import SCHEMES, Scheme
from ldmq_kernels.numerics.smoothing import parts_vector, smoothing_vector, weight_absmax
from ldmq_kernels.plans.layers import refusal
from ldmq_kernels.plans.plan import LayerPlan
from ldmq_kernels.sensitivity.end_noise import EndNoise
from ldmq_kernels.sensitivity.output_noise import StepNoise
from ldmq_kernels.sensitivity.recipes import Recipe, Trial
from ldmq_kernels.sensitivity.trials import FloatReference, Judge, estimated_output_noise, shifted, try_out

SMOOTHING_ALPHAS = (0.25, 0.5, 0.75)
PARTS = "parts"  # in place of an alpha: one factor for each part of a concatenation
WORTH_A_FIRST_TOKEN_DB = 0.5  # to compute it apart
WORTH_SMOOTHING_DB = 0.5  # a smaller gain does not pay for a vector
NARROWER = 0.85  # share of the range; still narrower ones serve the calibration's prompts better than others
WORTH_A_RANGE_DB = 0.5
WORTH_GPTQ_DB = 0.1
WORTH_A_BIAS_DB = 0.2
SPLIT_ROOM = 1.25
HESSIAN_ROWS = 1024  # of a layer's inputs in one call, for GPTQ


@dataclass(frozen=True)
class Method:
    """Which parts of the search are made; all of them, unless a study asks what each is worth."""

    smoothing: bool = True
    ranges: bool = True
    gptq: bool = True
    bias_correction: bool = True
    first_token: bool = True


WHOLE = Method()
PLAIN = Method(smoothing=False, ranges=False, gptq=False, bias_correction=False, first_token=False)


@dataclass(frozen=True)
class LayerCandidate:
    """One way to quantize a layer.

    Attributes:
        layer_plan: the layer's entry in a plan that takes this candidate.
        noise: relative noise power of the layer's own output, with float inputs, cross-validated.
        label: the parts that the search chose, such as "alpha 0.5, range 0.85, bias".
        estimate: noise at the UNet's output by backward probes; None without probes.
        end: noise at the end of the trajectory, by the adjoint of the sampler; None where that was not asked for.
        quantized_layer: the quantized layer itself where the layer plan alone cannot make it again (GPTQ).
        judged: for each fold of the prompts the layer plan as the other fold alone makes it, on which the candidate is
            judged; empty where the layer plan takes nothing from a calibration.
    """

    layer_plan: LayerPlan
    noise: float
    label: str
    estimate: StepNoise | None = None
    end: EndNoise | None = None
    quantized_layer: QuantizedLayer | None = None
    judged: tuple[LayerPlan, ...] = ()

    @property
    def scheme(self) -> Scheme:
        """The scheme that this is a candidate for."""
        return self.layer_plan.scheme

    def judged_on(self, fold: int) -> LayerPlan:
        """The layer plan that is run on the prompts of a fold to judge the candidate."""
        return self.judged[fold] if self.judged else self.layer_plan


def _less_noisy(noise: float, than: float, worth_db: float) -> bool:
    return noise < than * 10 ** (-worth_db / 10)


class LayerSearch:
    """The search for one layer; `candidates` runs it.

    Attributes:
        judges: of each candidate, by its scheme, what gives its quantized layer for a record, as the other fold of the
            prompts makes it.
    """

    def __init__(
        self,
        name: str,
        layer: FloatLayer,
        records: list[LayerRecord],
        calibration: Calibration,
        method: Method,
    ) -> None:
        self.name, self.layer, self.method = name, layer, method
        self.judges: dict[str, Judge] = {}
        self.reference = FloatReference.of(layer, records)
        self.timesteps = calibration.trajectory.timesteps()
        self.weight_absmax = weight_absmax(quantized_class(layer).to_channels_last(layer.weight.detach()))
        self.calibration = calibration
        self.whole = {True: calibration, False: calibration.with_first_token()}  # by whether the first token is apart
        self.other = {apart: [whole.of_fold(1 - fold) for fold in (0, 1)] for apart, whole in self.whole.items()}
        self._weights: dict[tuple[Recipe, int | None], QuantizedLayer] = {}
        self.smoothable = getattr(layer, "groups", 1) == 1 and bool((calibration.input_absmax(name) > 0).any())

    # -- from a recipe to a layer plan ------------------------------------------------------------------

    def _vector(self, recipe: Recipe, calibration: Calibration) -> Tensor | None:
        """The smoothing vector of a recipe's ranges over all steps: which channels are large changes with them."""
        if recipe.smoothing is None:
            return None
        absmax = calibration.absmax[self.name].amax(0)
        if isinstance(recipe.smoothing, str):
            return 1 / parts_vector(absmax, calibration.concatenations[self.name])
        return 1 / smoothing_vector(absmax, self.weight_absmax, recipe.smoothing)

    def _scale(
        self, recipe: Recipe, smoothing: Tensor | None, calibration: Calibration
    ) -> float | tuple[float, ...] | None:
        """The scale of a recipe; None where the scheme takes none, or the input is zero."""
        scheme = recipe.scheme
        if not scheme.is_static:
            return None
        if scheme.is_split:  # so fine that the range of all steps can be covered, with room
            scale = static_scale(calibration.absmax[self.name].amax(0), smoothing, scheme)
            return None if scale is None else scale * SPLIT_ROOM
        if not scheme.has_timestep_scales:
            by_step = calibration.absmax[self.name].amax(0) if recipe.widened else calibration.input_absmax(self.name)
            scale = static_scale(by_step, smoothing, scheme)
            return None if scale is None else scale * recipe.share
        groups = [static_scale(absmax, smoothing, scheme) for absmax in calibration.grouped_absmax(self.name)]
        largest = max((scale for scale in groups if scale is not None), default=None)
        if largest is None:
            return None
        return tuple((largest if scale is None else scale) * recipe.share for scale in groups)

    def _layer_plan(self, recipe: Recipe, fold: int | None = None) -> LayerPlan | None:
        """The layer plan of a recipe by all prompts, or judged on a fold; None where a static scale has no range."""
        whole = self.whole[recipe.first_token]
        calibration = whole if fold is None else self.other[recipe.first_token][fold]
        scheme, smoothing = recipe.scheme, self._vector(recipe, calibration)
        scale = self._scale(recipe, smoothing, calibration)
        if scheme.is_static and scale is None:
            return None if fold is None else self._layer_plan(recipe)  # an input that is zero in the other fold alone
        return LayerPlan(
            scheme,
            "",
            scale,
            smoothing,
            first_token=recipe.first_token,
            rounding=recipe.rounding,
        )

    def _judged(self, recipe: Recipe) -> tuple[LayerPlan, ...]:
        """The layer plan for each fold as the other fold makes it; one for both where it takes no inputs."""
        folds = (0, 1) if recipe.takes_inputs else (None,)
        layer_plans = [self._layer_plan(recipe, fold) for fold in folds]
        return tuple(layer_plan for layer_plan in layer_plans if layer_plan is not None)

    # -- trials ---------------------------------------------------------------------------------------

    @functools.cached_property
    def _hessians(self) -> dict[int, Tensor]:
        """Fold -> (K, K) float32, the sum of x x^T over the layer's recorded inputs."""
        observers: dict[int, HessianObserver] = {}
        for record, output in self.reference.outputs():
            if record.fold not in observers:
                observers[record.fold] = HessianObserver(self.name, self.layer, HESSIAN_ROWS)
            observers[record.fold](self.layer, (record.x,), {}, output)
        return {fold: observer.total for fold, observer in observers.items()}

    def _quantized(self, recipe: Recipe, layer_plan: LayerPlan, fold: int | None = None) -> QuantizedLayer:
        """The quantized layer of a layer plan, made for all prompts or to be judged on a fold.

        Its weight is rounded once for all ways to scale the activations.
        """
        hessian = None
        if recipe.rounding == "gptq":
            every = list(self._hessians.values())
            hessian = torch.stack(every).sum(0) if fold is None else self._hessians.get(1 - fold, every[0])
        scheme = layer_plan.scheme
        measured = scheme if scheme.is_rotated else scheme.with_activations("dynamic")
        if measured is None:
            return quantize_layer(self.name, self.layer, layer_plan, hessian)
        takes_inputs = recipe.smoothing is not None or recipe.rounding == "gptq"
        weight = replace(recipe, scheme=measured, widened=False, share=1.0)
        key = (weight, fold if takes_inputs else None)
        if key not in self._weights:
            plain = replace(layer_plan, scheme=weight.scheme, input_scale=None, first_token=False, bias_correction=None)
            self._weights[key] = quantize_layer(self.name, self.layer, plain, hessian)
        scales = (
            torch.tensor(layer_plan.scales, dtype=torch.float32, device=self.weight_absmax.device)
            if scheme.is_static
            else None
        )
        quantized = self._weights[key].with_activations(scheme, input_scale=scales, first_token=layer_plan.first_token)
        if layer_plan.bias_correction is not None:
            quantized.correct_bias(layer_plan.bias_correction, self.layer.weight)
        return quantized

    def _quantized_layers(self, recipe: Recipe, judged: Sequence[LayerPlan]) -> Judge:
        layers = [self._quantized(recipe, layer_plan, fold) for fold, layer_plan in enumerate(judged)]
        return Judge(layers, self.timesteps, self.calibration.timestep_groups)

    def _try(self, recipe: Recipe) -> Trial:
        return Trial(recipe, try_out(self.reference, self._quantized_layers(recipe, self._judged(recipe))))

    # -- what is searched -----------------------------------------------------------------------------

    def _plain(self, scheme: Scheme, sibling: Recipe | None) -> Trial | None:
        """Nothing but the calibrated range, without the first token of a text where that pays."""
        plain = Recipe(scheme, widened=self.method.ranges and scheme.activations.name == "static")
        if self._layer_plan(plain) is None:
            return None
        trial = self._try(plain)
        possible = scheme.quantizes_activations and scheme.format.first_token_op is not None and not scheme.is_split
        asked = possible and self.method.first_token
        if not asked or self.name not in self.calibration.text_layers or not isinstance(self.layer, nn.Linear):
            return trial
        apart = replace(plain, first_token=True)
        if (sibling is not None and not sibling.first_token) or self._layer_plan(apart) is None:
            return trial
        other = self._try(apart)
        return other if _less_noisy(other.outcome.noise, trial.outcome.noise, WORTH_A_FIRST_TOKEN_DB) else trial

    def _smoothings(self, scheme: Scheme, sibling: Recipe | None) -> Iterator[float | str]:
        """Smoothings worth a trial: all of them, or the one that the same activations chose already."""
        searched = scheme.quantizes_activations and not scheme.is_split
        if not (self.method.smoothing and self.smoothable and searched):
            return
        if sibling is not None:
            if sibling.smoothing is not None:
                yield sibling.smoothing
            return
        yield from SMOOTHING_ALPHAS
        if self.name in self.calibration.concatenations:
            yield PARTS

    def _smoothed(self, scheme: Scheme, sibling: Recipe | None) -> Trial | None:
        best = unsmoothed = self._plain(scheme, sibling)
        if best is None or unsmoothed is None:
            return None
        for smoothing in self._smoothings(scheme, sibling):
            trial = self._try(replace(unsmoothed.recipe, smoothing=smoothing))
            if trial.outcome.noise < best.outcome.noise:
                best = trial
        pays = _less_noisy(best.outcome.noise, unsmoothed.outcome.noise, WORTH_SMOOTHING_DB)
        return best if pays else unsmoothed

    def _ranged(self, start: Trial, sibling: Recipe | None) -> Trial:
        scheme = start.recipe.scheme
        if not (self.method.ranges and scheme.is_static) or scheme.is_split:
            return start
        if sibling is not None:
            known = replace(start.recipe, widened=sibling.widened, share=sibling.share)
            return start if known == start.recipe else self._try(known)
        narrow = self._try(replace(start.recipe, share=NARROWER))
        return narrow if _less_noisy(narrow.outcome.noise, start.outcome.noise, WORTH_A_RANGE_DB) else start

    def _times_calibrated(self, recipe: Recipe) -> float:
        """The range of a recipe over the calibrated one."""
        whole = self.whole[recipe.first_token]
        smoothing = self._vector(recipe, whole)
        plain = replace(recipe, widened=False, share=1.0)
        ours, calibrated = (self._scale(r, smoothing, whole) for r in (recipe, plain))
        if isinstance(ours, float) and isinstance(calibrated, float):
            return ours / calibrated
        return recipe.share

    def _rounded(self, start: Trial) -> Trial:
        if not start.recipe.scheme.format.weight.is_coarse:
            return start
        if not self.method.gptq or getattr(self.layer, "groups", 1) != 1:
            return start
        rounded = self._try(replace(start.recipe, rounding="gptq"))
        return rounded if _less_noisy(rounded.outcome.noise, start.outcome.noise, WORTH_GPTQ_DB) else start

    # -- the result -----------------------------------------------------------------------------------

    @torch.no_grad()
    def candidates(self, schemes: Sequence[Scheme]) -> list[LayerCandidate]:
        """The least noisy candidate of each scheme that the layer can have.

        Args:
            schemes: those that others are like are searched first: what they find of the activations serves the
                others too.
        """
        order = sorted(
            (s for s in schemes if s.quantizes and not refusal(self.layer, s)),
            key=lambda s: (s.finer is not None, list(SCHEMES).index(str(s))),
        )
        tried: dict[str, Recipe] = {}
        best: dict[str, LayerCandidate] = {}
        for scheme in order:
            sibling = tried.get(str(scheme.finer))
            smoothed_alike = sibling
            if smoothed_alike is None and scheme.has_timestep_scales:
                smoothed_alike = tried.get(str(scheme.with_activations("static")))
            smoothed = self._smoothed(scheme, smoothed_alike)
            if smoothed is None:
                continue
            ranged = self._ranged(smoothed, sibling)
            tried[str(scheme)] = ranged.recipe
            best[str(scheme)] = self._candidate(self._rounded(ranged))
        return [best[str(s)] for s in schemes if str(s) in best]

    def _candidate(self, trial: Trial) -> LayerCandidate:
        recipe, outcome = trial.recipe, trial.outcome
        layer_plan, judged = self._layer_plan(recipe), self._judged(recipe)
        assert layer_plan is not None
        words, noise = self._words(recipe), outcome.noise
        corrected = outcome.corrected if self.method.bias_correction else None
        if corrected is not None and _less_noisy(corrected, noise, WORTH_A_BIAS_DB):
            layer_plan = replace(layer_plan, bias_correction=-outcome.mean_error)
            judged = tuple(
                replace(judged[fold % len(judged)], bias_correction=-outcome.mean_errors[1 - fold]) for fold in (0, 1)
            )
            words, noise = [*words, "bias"], corrected
        quantized = None
        if recipe.rounding == "gptq":
            quantized = self._quantized(recipe, layer_plan)
        layer_for = self._quantized_layers(recipe, judged)
        self.judges[str(recipe.scheme)] = layer_for
        estimate = estimated_output_noise(self.reference, self._errors(trial, layer_for, judged))
        differs = recipe.takes_inputs or layer_plan.bias_correction is not None
        label = ", ".join(words) or "plain"
        return LayerCandidate(
            layer_plan,
            noise,
            label,
            estimate,
            quantized_layer=quantized,
            judged=judged if differs and len(judged) == 2 else (),
        )

    def _errors(self, trial: Trial, judge: Judge, judged: Sequence[LayerPlan]) -> Iterator[tuple[Any, Tensor]]:
        """The errors of a trial, with the bias of what it is judged as."""
        errors = trial.outcome.errors
        if errors is None:
            return judge.errors(self.reference)
        shifts = [plan.bias_correction for plan in judged if plan.bias_correction is not None]
        return shifted(errors, shifts, self.layer) if shifts else iter(errors)

    def _words(self, recipe: Recipe) -> list[str]:
        words = ["first token"] if recipe.first_token else []
        if recipe.smoothing is not None:
            words.append(recipe.smoothing if isinstance(recipe.smoothing, str) else f"alpha {recipe.smoothing}")
        range_of = f"{self._times_calibrated(recipe):.2f}"
        if range_of != "1.00":
            words.append(f"range {range_of}")
        if recipe.rounding != "nearest":
            words.append(recipe.rounding)
        return words
