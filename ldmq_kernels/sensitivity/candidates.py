"""The way to quantize one layer in each scheme that makes the least noise in its own output.

Searched one after the other, each kept only if it pays: smoothing (an alpha, or one factor for each part of a
concatenation), the range that a static scale covers, GPTQ's rounding of 4-bit weights, and a bias that takes the
mean error away. A trial runs on what the layer saw in the float model.
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
from ldmq_kernels.planning.plan import LayerPlan, kind_of
from ldmq_kernels.sensitivity.output_noise import StepNoise
from ldmq_kernels.sensitivity.probes import Seen
from ldmq_kernels.sensitivity.trials import Exact, Outcome, estimated_output_noise, set_to_step, try_out

SMOOTHING_ALPHAS = (0.25, 0.5, 0.75)
WORTH_SMOOTHING_DB = 0.5  # a smaller gain does not pay for a vector
NARROWER = (0.85, 0.7)  # shares of the range, tried as long as they pay
WORTH_A_RANGE_DB = 0.5
WORTH_GPTQ_DB = 0.1
WORTH_A_BIAS_DB = 0.2
PAIRED_ROOM = 1.25
LEAST_DRIFT = 0.05  # of the range over the steps, worth a trial
MOMENT_ROWS = 1024  # of a layer's inputs in one call, for GPTQ


@dataclass(frozen=True)
class Method:
    """Which parts of the search are made; all of them, unless a study asks what each is worth."""

    smoothing: bool = True
    ranges: bool = True
    gptq: bool = True
    bias_correction: bool = True
    first_token: bool = True
    rank: int = 0


PLAIN = Method(smoothing=False, ranges=False, gptq=False, bias_correction=False, first_token=False)


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a layer.

    Attributes:
        choice: what a plan would say of it.
        noise: relative noise power of the layer's own output, with float inputs.
        label: what the search found, such as "alpha 0.5, range 0.85, bias".
        estimate: noise at the UNet's output by backward probes; None without probes.
        copy: the quantized layer itself where it cannot be made again from the choice alone (GPTQ).
    """

    choice: LayerPlan
    noise: float
    label: str
    estimate: StepNoise | None = None
    copy: QuantizedLayer | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme that it is a candidate for."""
        return self.choice.scheme

    def layer_plan(self, reason: str = "") -> LayerPlan:
        """As an entry of a plan."""
        return replace(self.choice, reason=reason)


def _less_noisy(noise: float, than: float, worth_db: float) -> bool:
    return noise < than * 10 ** (-worth_db / 10)


@dataclass
class _Trial:
    """A choice that was tried, with its words."""

    choice: LayerPlan
    outcome: Outcome
    words: tuple[str, ...] = ()
    share: float = 1.0  # of the calibrated range


class LayerSearch:
    """The search for one layer; `candidates` runs it."""

    def __init__(
        self, name: str, layer: nn.Linear | nn.Conv2d, seen: list[Seen], calibration: Calibration, method: Method
    ) -> None:
        self.name, self.layer, self.method, self.calibration = name, layer, method, calibration
        self.exact = Exact.of(layer, seen)
        self.timesteps = calibration.trajectory.timesteps()
        kind: type[QuantizedLayer] = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
        self.weight = kind.to_channels_last(layer.weight.detach())
        self.absmax = calibration.input_absmax(name)
        self.smoothable = getattr(layer, "groups", 1) == 1 and bool((self.absmax > 0).any())

    # -- trials ---------------------------------------------------------------------------------------

    # -- trials ---------------------------------------------------------------------------------------

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        """(K, K) float32 for each fold, the sum of x x^T over what the layer saw."""
        observers: dict[int, MomentsObserver] = {}
        for seen, output in zip(self.exact.seen, self.exact.outputs, strict=True):
            if seen.fold not in observers:
                observers[seen.fold] = MomentsObserver(self.name, self.layer, MOMENT_ROWS)
            observers[seen.fold](self.layer, (seen.x,), output)
        return tuple(observers[fold].total for fold in sorted(observers))

    def _rounded_for_others(self, choice: LayerPlan) -> Callable[[Seen], QuantizedLayer]:
        """Gives for a call the layer as GPTQ rounds it for the other fold, so that it can be judged."""
        copies = [self._copy_for(quantize_layer(self.name, self.layer, choice, m)) for m in reversed(self._moments)]
        return lambda seen: copies[seen.fold](seen)

    def _copy_for(self, copy: QuantizedLayer) -> Callable[[Seen], QuantizedLayer]:
        return set_to_step(copy, self.timesteps, self.calibration.step_groups)

    def _try(self, choice: LayerPlan, words: tuple[str, ...], share: float = 1.0) -> _Trial:
        copy = quantize_layer(self.name, self.layer, choice)
        return _Trial(choice, try_out(self.exact, self._copy_for(copy)), words, share)

    def _scale(self, scheme: Scheme, smoothing: Tensor | None, share: float) -> float | tuple[float, ...] | None:
        """The calibrated scale for a share of the range; None where the scheme takes none, or the input is zero."""
        if not scheme.is_static:
            return None
        if scheme.is_paired:  # so fine that the range of all steps can be covered, with room
            scale = static_scale(self.calibration.absmax[self.name].amax(0), smoothing)
            return None if scale is None else scale * PAIRED_ROOM
        if not scheme.is_stepped:
            scale = static_scale(self.absmax, smoothing)
            return None if scale is None else scale * share
        groups = [static_scale(absmax, smoothing) for absmax in self.calibration.grouped_absmax(self.name)]
        largest = max((scale for scale in groups if scale is not None), default=None)
        return None if largest is None else tuple((largest if scale is None else scale) * share for scale in groups)

    def _choice(self, scheme: Scheme, smoothing: Tensor | None, share: float = 1.0) -> LayerPlan | None:
        scale = self._scale(scheme, smoothing, share)
        if scheme.is_static and scale is None:
            return None  # an input that is all zero in calibration gives no static scale
        first_token = (
            self.method.first_token
            and self.name in self.calibration.text_layers
            and scheme.format.activation_bits == 8
            and not scheme.is_paired
            and isinstance(self.layer, nn.Linear)
        )
        return LayerPlan(scheme, "", scale, smoothing, first_token=first_token)

    # -- what is searched -----------------------------------------------------------------------------

    def _smoothings(self, scheme: Scheme, sibling: _Trial | None) -> Iterator[tuple[str, Tensor]]:
        """Smoothing vectors worth a trial: all of them, or the one that the same activations chose already."""
        searched = scheme.format.activation_bits == 8 and not scheme.is_paired
        if not (self.method.smoothing and self.smoothable and searched):
            return
        if sibling is not None:
            if sibling.choice.smoothing is not None:
                yield sibling.words[0], sibling.choice.smoothing
            return
        for alpha in SMOOTHING_ALPHAS:
            yield f"alpha {alpha}", 1 / smoothing_vector(self.absmax, self.weight, alpha)
        first = self.calibration.concatenations.get(self.name)
        if first is not None:
            yield "parts", 1 / parts_vector(self.absmax, first)

    def _smoothed(self, scheme: Scheme, sibling: _Trial | None) -> _Trial | None:
        plain = self._choice(scheme, None)
        if plain is None:
            return None
        best = unsmoothed = self._try(plain, ())
        for word, vector in self._smoothings(scheme, sibling):
            choice = self._choice(scheme, vector)
            if choice is None:
                continue
            trial = self._try(choice, (word,))
            if trial.outcome.noise < best.outcome.noise:
                best = trial
        pays = _less_noisy(best.outcome.noise, unsmoothed.outcome.noise, WORTH_SMOOTHING_DB)
        return best if pays else unsmoothed

    def _ranged(self, start: _Trial, sibling: _Trial | None) -> _Trial:
        scheme = start.choice.scheme
        if not (self.method.ranges and scheme.is_static) or scheme.is_paired:
            return start
        if sibling is not None and sibling.share != 1.0:
            return self._at_share(start, sibling.share)
        best = wide = self._widened(start)
        for share in NARROWER:
            trial = self._at_share(start, share * wide.share)
            if not _less_noisy(trial.outcome.noise, best.outcome.noise, WORTH_A_RANGE_DB):
                break
            best = trial
        return best

    def _widened(self, start: _Trial) -> _Trial:
        """The range of all steps where it is larger than the calibrated one.

        A range that is too narrow costs far more on inputs that were not seen than one that is too wide.
        """
        everywhere = static_scale(self.calibration.absmax[self.name].amax(0), start.choice.smoothing)
        scale = start.choice.input_scale
        if isinstance(scale, tuple) or scale is None or everywhere is None:
            return start
        most = everywhere / scale
        drifts = most > 1 + LEAST_DRIFT
        return self._at_share(start, most) if drifts else start

    def _at_share(self, start: _Trial, share: float) -> _Trial:
        choice = self._choice(start.choice.scheme, start.choice.smoothing, share)
        assert choice is not None
        return self._try(choice, (*start.words, f"range {share:.2f}"), share)

    def _rounded(self, start: _Trial) -> _Trial:
        scheme = start.choice.scheme
        if scheme.format.weight_bits != 4:
            return start
        best = start
        if self.method.rank:
            ranked = replace(start.choice, rank=self.method.rank)
            best = self._try(ranked, (*start.words, f"rank {self.method.rank}"), start.share)
        if not self.method.gptq or getattr(self.layer, "groups", 1) != 1:
            return best
        choice = replace(best.choice, rounding="gptq")
        outcome = try_out(self.exact, self._rounded_for_others(choice))
        if not _less_noisy(outcome.noise, best.outcome.noise, WORTH_GPTQ_DB):
            return best
        return _Trial(choice, outcome, (*best.words, "gptq"), best.share)

    def _corrected(self, start: _Trial) -> tuple[_Trial, float]:
        outcome = start.outcome
        pays = outcome.corrected is not None and _less_noisy(outcome.corrected, outcome.noise, WORTH_A_BIAS_DB)
        if not (self.method.bias_correction and pays):
            return start, outcome.noise
        assert outcome.corrected is not None
        choice = replace(start.choice, bias_correction=-outcome.mean_error)
        return replace(start, choice=choice, words=(*start.words, "bias")), outcome.corrected

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
        tried: dict[str, _Trial] = {}
        found: dict[str, Candidate] = {}
        for scheme in order:
            sibling = tried.get(f"w8a8-{scheme.activations}") if scheme.format.weight_bits == 4 else None
            if sibling is None and scheme.is_stepped:
                sibling = tried.get(f"{scheme.format.name}-static")
            smoothed = self._smoothed(scheme, sibling)
            if smoothed is None:
                continue
            tried[str(scheme)] = self._ranged(smoothed, sibling if scheme.format.weight_bits == 4 else None)
            final, noise = self._corrected(self._rounded(tried[str(scheme)]))
            found[str(scheme)] = self._candidate(final, noise)
        return [found[str(s)] for s in schemes if str(s) in found]

    def _candidate(self, trial: _Trial, noise: float) -> Candidate:
        copy, choice = None, trial.choice
        if choice.rounding == "gptq":
            copy_for = self._rounded_for_others(choice)
            copy = quantize_layer(self.name, self.layer, choice, torch.stack(self._moments).sum(0))
        else:
            copy_for = self._copy_for(quantize_layer(self.name, self.layer, choice))
        estimate = estimated_output_noise(self.exact, copy_for)
        return Candidate(choice, noise, ", ".join(trial.words) or "plain", estimate, copy)
