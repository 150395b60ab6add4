"""The way to quantize one layer in each scheme that makes the least noise in its own output.

Searched one after the other, each kept only if it pays: the first token of the text in 16 bit, smoothing (an alpha,
or one factor for each part of a concatenation), the range that a static scale covers, GPTQ's rounding of 4-bit
weights, and a bias that takes the mean error away. A trial runs on what the layer saw in the float model,
cross-validated: what it takes from a calibration (ranges, smoothing vectors, second moments, mean errors) it takes
from the other half of the prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.calibrate import Calibration
from ldmq_kernels.calibration.ranges import static_scale
from ldmq_kernels.calibration.second_moments import MomentsObserver
from ldmq_kernels.conversion.convert import quantize_layer
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES, Scheme
from ldmq_kernels.numerics.smoothing import parts_vector, smoothing_vector
from ldmq_kernels.plans.layers import kind_of
from ldmq_kernels.plans.plan import LayerPlan
from ldmq_kernels.sensitivity.output_noise import StepNoise
from ldmq_kernels.sensitivity.probes import Seen
from ldmq_kernels.sensitivity.trials import Exact, Outcome, estimated_output_noise, set_to_step, try_out

SMOOTHING_ALPHAS = (0.25, 0.5, 0.75)
PARTS = "parts"  # in place of an alpha: one factor for each part of a concatenation
WORTH_A_FIRST_TOKEN_DB = 0.5  # to compute it apart
WORTH_SMOOTHING_DB = 0.5  # a smaller gain does not pay for a vector
NARROWER = 0.85  # share of the range; still narrower ones serve the calibration's prompts better than others
WORTH_A_RANGE_DB = 0.5
WORTH_GPTQ_DB = 0.1
WORTH_A_BIAS_DB = 0.2
SPLIT_ROOM = 1.25
MOMENT_ROWS = 1024  # of a layer's inputs in one call, for GPTQ


@dataclass(frozen=True)
class Method:
    """Which parts of the search are made; all of them, unless a study asks what each is worth."""

    smoothing: bool = True
    ranges: bool = True
    gptq: bool = True
    bias_correction: bool = True
    first_token: bool = True


PLAIN = Method(smoothing=False, ranges=False, gptq=False, bias_correction=False, first_token=False)


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a layer.

    Attributes:
        choice: what a plan would say of it.
        noise: relative noise power of the layer's own output, with float inputs, cross-validated.
        label: what the search found, such as "alpha 0.5, range 0.85, bias".
        estimate: noise at the UNet's output by backward probes; None without probes.
        copy: the quantized layer itself where it cannot be made again from the choice alone (GPTQ).
        judged: for each fold of the prompts what the other fold alone would have made of the choice, by which it is
            judged; empty where the choice takes nothing from a calibration.
    """

    choice: LayerPlan
    noise: float
    label: str
    estimate: StepNoise | None = None
    copy: QuantizedLayer | None = None
    judged: tuple[LayerPlan, ...] = ()

    @property
    def scheme(self) -> Scheme:
        """The scheme that it is a candidate for."""
        return self.choice.scheme

    def layer_plan(self, reason: str = "") -> LayerPlan:
        """As an entry of a plan."""
        return replace(self.choice, reason=reason)

    def judged_on(self, fold: int) -> LayerPlan:
        """What is run on the prompts of a fold to judge the choice."""
        return self.judged[fold] if self.judged else self.choice


def _less_noisy(noise: float, than: float, worth_db: float) -> bool:
    return noise < than * 10 ** (-worth_db / 10)


@dataclass(frozen=True)
class _Recipe:
    """How to make a choice of any calibration: of all prompts, or of a fold.

    Attributes:
        smoothing: an alpha, PARTS, or None.
        widened: cover the range of all steps, where the calibrated one is smaller: a range that is too narrow costs far
            more than one that is too wide.
        share: of the range.
    """

    scheme: Scheme
    first_token: bool = False
    smoothing: float | str | None = None
    widened: bool = False
    share: float = 1.0
    rounding: str = "nearest"

    @property
    def takes_inputs(self) -> bool:
        """Whether the choice depends on what was calibrated on."""
        return self.scheme.is_static or self.smoothing is not None or self.rounding == "gptq"


@dataclass(frozen=True)
class _Trial:
    """A recipe that was tried."""

    recipe: _Recipe
    outcome: Outcome


class LayerSearch:
    """The search for one layer; `candidates` runs it."""

    def __init__(
        self, name: str, layer: nn.Linear | nn.Conv2d, seen: list[Seen], calibration: Calibration, method: Method
    ) -> None:
        self.name, self.layer, self.method = name, layer, method
        self.exact = Exact.of(layer, seen)
        self.timesteps = calibration.trajectory.timesteps()
        kind: type[QuantizedLayer] = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
        self.weight = kind.to_channels_last(layer.weight.detach())
        self.calibration = calibration
        self.whole = {True: calibration, False: calibration.with_first_token()}  # by whether the first token is apart
        self.other = {apart: [whole.of_fold(1 - fold) for fold in (0, 1)] for apart, whole in self.whole.items()}
        self._weights: dict[tuple[_Recipe, int | None], QuantizedLayer] = {}
        self.smoothable = getattr(layer, "groups", 1) == 1 and bool((calibration.input_absmax(name) > 0).any())

    # -- from a recipe to a choice ----------------------------------------------------------------------

    def _vector(self, recipe: _Recipe, calibration: Calibration) -> Tensor | None:
        """The smoothing vector of a recipe's ranges over all steps: which channels are large changes with them."""
        if recipe.smoothing is None:
            return None
        absmax = calibration.absmax[self.name].amax(0)
        if isinstance(recipe.smoothing, str):
            return 1 / parts_vector(absmax, calibration.concatenations[self.name])
        return 1 / smoothing_vector(absmax, self.weight, recipe.smoothing)

    def _scale(
        self, recipe: _Recipe, smoothing: Tensor | None, calibration: Calibration
    ) -> float | tuple[float, ...] | None:
        """The scale of a recipe; None where the scheme takes none, or the input is zero."""
        scheme = recipe.scheme
        if not scheme.is_static:
            return None
        if scheme.is_split:  # so fine that the range of all steps can be covered, with room
            scale = static_scale(calibration.absmax[self.name].amax(0), smoothing)
            return None if scale is None else scale * SPLIT_ROOM
        if not scheme.has_timestep_scales:
            by_step = calibration.absmax[self.name].amax(0) if recipe.widened else calibration.input_absmax(self.name)
            scale = static_scale(by_step, smoothing)
            return None if scale is None else scale * recipe.share
        groups = [static_scale(absmax, smoothing) for absmax in calibration.grouped_absmax(self.name)]
        largest = max((scale for scale in groups if scale is not None), default=None)
        if largest is None:
            return None
        return tuple((largest if scale is None else scale) * recipe.share for scale in groups)

    def _choice(self, recipe: _Recipe, fold: int | None = None) -> LayerPlan | None:
        """A recipe as all prompts make it, or as it is judged on a fold; None without a range for a static scale."""
        whole = self.whole[recipe.first_token]
        calibration = whole if fold is None else self.other[recipe.first_token][fold]
        scheme, smoothing = recipe.scheme, self._vector(recipe, calibration)
        scale = self._scale(recipe, smoothing, calibration)
        if scheme.is_static and scale is None:
            return None if fold is None else self._choice(recipe)  # an input that is zero in the other fold alone
        return LayerPlan(
            scheme,
            "",
            scale,
            smoothing,
            first_token=recipe.first_token,
            rounding=recipe.rounding,
        )

    def _judged(self, recipe: _Recipe) -> tuple[LayerPlan, ...]:
        """For each fold, the choice as the other fold makes it; one for both where it takes no inputs."""
        folds = (0, 1) if recipe.takes_inputs else (None,)
        choices = [self._choice(recipe, fold) for fold in folds]
        return tuple(choice for choice in choices if choice is not None)

    # -- trials ---------------------------------------------------------------------------------------

    @functools.cached_property
    def _moments(self) -> dict[int, Tensor]:
        """Fold -> (K, K) float32, the sum of x x^T over what the layer saw of its samples."""
        observers: dict[int, MomentsObserver] = {}
        for seen, output in zip(self.exact.seen, self.exact.outputs, strict=True):
            if seen.fold not in observers:
                observers[seen.fold] = MomentsObserver(self.name, self.layer, MOMENT_ROWS)
            observers[seen.fold](self.layer, (seen.x,), output)
        return {fold: observer.total for fold, observer in observers.items()}

    def _quantized(self, recipe: _Recipe, choice: LayerPlan, fold: int | None = None) -> QuantizedLayer:
        """The layer as a choice has it, made for all prompts or to be judged on a fold.

        Its weight is rounded once for all ways to scale the activations.
        """
        hessian = None
        if recipe.rounding == "gptq":
            every = list(self._moments.values())
            hessian = torch.stack(every).sum(0) if fold is None else self._moments.get(1 - fold, every[0])
        scheme = choice.scheme
        if scheme.activations is None:
            return quantize_layer(self.name, self.layer, choice, hessian)
        takes_inputs = recipe.smoothing is not None or recipe.rounding == "gptq"
        weight = replace(recipe, scheme=SCHEMES[f"{scheme.format.name}-dynamic"], widened=False, share=1.0)
        key = (weight, fold if takes_inputs else None)
        if key not in self._weights:
            plain = replace(choice, scheme=weight.scheme, input_scale=None, first_token=False, bias_correction=None)
            self._weights[key] = quantize_layer(self.name, self.layer, plain, hessian)
        scales = torch.tensor(choice.scales, device=self.weight.device) if scheme.is_static else None
        copy = self._weights[key].with_activations(scheme, input_scale=scales, first_token=choice.first_token)
        if choice.bias_correction is not None:
            copy.correct_bias(choice.bias_correction, self.layer.weight)
        return copy

    def _copies(self, recipe: _Recipe, judged: Sequence[LayerPlan]) -> Callable[[Seen], QuantizedLayer]:
        """Gives for a call the layer as the other fold makes it, set to its step."""
        copies = [
            set_to_step(self._quantized(recipe, choice, fold), self.timesteps, self.calibration.timestep_groups)
            for fold, choice in enumerate(judged)
        ]
        return lambda seen: copies[seen.fold % len(copies)](seen)

    def _try(self, recipe: _Recipe) -> _Trial:
        return _Trial(recipe, try_out(self.exact, self._copies(recipe, self._judged(recipe))))

    # -- what is searched -----------------------------------------------------------------------------

    def _plain(self, scheme: Scheme, sibling: _Recipe | None) -> _Trial | None:
        """Nothing but the calibrated range, without the first token of a text where that pays."""
        plain = _Recipe(scheme, widened=self.method.ranges and scheme.activations == "static")
        if self._choice(plain) is None:
            return None
        trial = self._try(plain)
        asked = scheme.format.activation_bits == 8 and not scheme.is_split and self.method.first_token
        if not asked or self.name not in self.calibration.text_layers or not isinstance(self.layer, nn.Linear):
            return trial
        apart = replace(plain, first_token=True)
        if (sibling is not None and not sibling.first_token) or self._choice(apart) is None:
            return trial
        other = self._try(apart)
        return other if _less_noisy(other.outcome.noise, trial.outcome.noise, WORTH_A_FIRST_TOKEN_DB) else trial

    def _smoothings(self, scheme: Scheme, sibling: _Recipe | None) -> Iterator[float | str]:
        """Smoothings worth a trial: all of them, or the one that the same activations chose already."""
        searched = scheme.format.activation_bits == 8 and not scheme.is_split
        if not (self.method.smoothing and self.smoothable and searched):
            return
        if sibling is not None:
            if sibling.smoothing is not None:
                yield sibling.smoothing
            return
        yield from SMOOTHING_ALPHAS
        if self.name in self.calibration.concatenations:
            yield PARTS

    def _smoothed(self, scheme: Scheme, sibling: _Recipe | None) -> _Trial | None:
        best = unsmoothed = self._plain(scheme, sibling)
        if best is None or unsmoothed is None:
            return None
        for smoothing in self._smoothings(scheme, sibling):
            trial = self._try(replace(unsmoothed.recipe, smoothing=smoothing))
            if trial.outcome.noise < best.outcome.noise:
                best = trial
        pays = _less_noisy(best.outcome.noise, unsmoothed.outcome.noise, WORTH_SMOOTHING_DB)
        return best if pays else unsmoothed

    def _ranged(self, start: _Trial, sibling: _Recipe | None) -> _Trial:
        scheme = start.recipe.scheme
        if not (self.method.ranges and scheme.is_static) or scheme.is_split:
            return start
        if sibling is not None:
            known = replace(start.recipe, widened=sibling.widened, share=sibling.share)
            return start if known == start.recipe else self._try(known)
        narrow = self._try(replace(start.recipe, share=NARROWER))
        return narrow if _less_noisy(narrow.outcome.noise, start.outcome.noise, WORTH_A_RANGE_DB) else start

    def _times_calibrated(self, recipe: _Recipe) -> float:
        """The range of a recipe over the calibrated one."""
        whole = self.whole[recipe.first_token]
        smoothing = self._vector(recipe, whole)
        plain = replace(recipe, widened=False, share=1.0)
        ours, calibrated = (self._scale(r, smoothing, whole) for r in (recipe, plain))
        if isinstance(ours, float) and isinstance(calibrated, float):
            return ours / calibrated
        return recipe.share

    def _rounded(self, start: _Trial) -> _Trial:
        if start.recipe.scheme.format.weight_bits != 4:
            return start
        if not self.method.gptq or getattr(self.layer, "groups", 1) != 1:
            return start
        rounded = self._try(replace(start.recipe, rounding="gptq"))
        return rounded if _less_noisy(rounded.outcome.noise, start.outcome.noise, WORTH_GPTQ_DB) else start

    # -- the result -----------------------------------------------------------------------------------

    @torch.no_grad()
    def candidates(self, schemes: Sequence[Scheme]) -> list[Candidate]:
        """The least noisy candidate of each scheme that the layer can have.

        Args:
            schemes: those of 8-bit weights are searched first: what they find of the activations serves the
                4-bit ones too.
        """
        order = sorted(
            (s for s in schemes if s.quantizes and kind_of(self.layer) in s.format.layers),
            key=lambda s: (-s.format.weight_bits, list(SCHEMES).index(str(s))),
        )
        tried: dict[str, _Recipe] = {}
        found: dict[str, Candidate] = {}
        for scheme in order:
            sibling = tried.get(f"w8a8-{scheme.activations}") if scheme.format.weight_bits == 4 else None
            smoothed_alike = sibling
            if smoothed_alike is None and scheme.has_timestep_scales:
                smoothed_alike = tried.get(f"{scheme.format.name}-static")
            smoothed = self._smoothed(scheme, smoothed_alike)
            if smoothed is None:
                continue
            ranged = self._ranged(smoothed, sibling)
            tried[str(scheme)] = ranged.recipe
            found[str(scheme)] = self._candidate(self._rounded(ranged))
        return [found[str(s)] for s in schemes if str(s) in found]

    def _candidate(self, trial: _Trial) -> Candidate:
        recipe, outcome = trial.recipe, trial.outcome
        choice, judged = self._choice(recipe), self._judged(recipe)
        assert choice is not None
        words, noise = self._words(recipe), outcome.noise
        corrected = outcome.corrected if self.method.bias_correction else None
        if corrected is not None and _less_noisy(corrected, noise, WORTH_A_BIAS_DB):
            choice = replace(choice, bias_correction=-outcome.mean_error)
            judged = tuple(
                replace(judged[fold % len(judged)], bias_correction=-outcome.mean_errors[1 - fold]) for fold in (0, 1)
            )
            words, noise = [*words, "bias"], corrected
        copy = None
        if recipe.rounding == "gptq":
            copy = self._quantized(recipe, choice)
        estimate = estimated_output_noise(self.exact, self._copies(recipe, judged))
        differs = recipe.takes_inputs or choice.bias_correction is not None
        label = ", ".join(words) or "plain"
        return Candidate(choice, noise, label, estimate, copy, judged if differs and len(judged) == 2 else ())

    def _words(self, recipe: _Recipe) -> list[str]:
        words = ["first token"] if recipe.first_token else []
        if recipe.smoothing is not None:
            words.append(recipe.smoothing if isinstance(recipe.smoothing, str) else f"alpha {recipe.smoothing}")
        range_of = f"{self._times_calibrated(recipe):.2f}"
        if range_of != "1.00":
            words.append(f"range {range_of}")
        if recipe.rounding != "nearest":
            words.append(recipe.rounding)
        return words
