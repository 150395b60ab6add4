"""What was measured of each caption and seed set, the measures made from it, and their confidence intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from ldmq_kernels.demo.evaluator import frechet_distance
from ldmq_kernels.planning.drawn import WORST

MOST_DB = 100.0  # stands for no difference at all
CONFIDENCE = 0.95
RESAMPLES = 2000
FRECHET_RESAMPLES = 200  # each takes a singular value decomposition
DIGITS = 7


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval by the bootstrap over captions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Samples:
    """Arrays by name, each (captions, seed sets) or (captions, seed sets, more), float64.

    output_signal, output_noise (.., steps): sums of squares at the UNet's output, along the float trajectory.
    latent_signal, latent_noise: of the denoised latent. squared_error: mean over a picture's values. ssim.
    right, present: attributes that the evaluator finds, and that the caption names. features, float_features
    (.., 128): the evaluator's.
    """

    arrays: Mapping[str, np.ndarray]

    @classmethod
    def stack(cls, parts: Sequence[Mapping[str, np.ndarray]]) -> Samples:
        """From one mapping of (captions, ...) arrays for each seed set."""
        return cls({name: np.stack([part[name] for part in parts], 1).astype(np.float64) for name in parts[0]})

    @property
    def captions(self) -> int:
        """How many there are: what the bootstrap resamples."""
        return int(self.arrays["squared_error"].shape[0])

    @property
    def seed_sets(self) -> int:
        """How many times each caption was drawn."""
        return int(self.arrays["squared_error"].shape[1])

    def of_seed_set(self, index: int) -> Samples:
        """One seed set alone."""
        return Samples({name: array[:, index : index + 1] for name, array in self.arrays.items()})

    def to_json(self) -> dict[str, Any]:
        """Lists of rounded numbers, without the features."""
        kept = {name: array for name, array in self.arrays.items() if not name.endswith("features")}
        return {
            name: np.array([float(f"{v:.{DIGITS}g}") for v in array.ravel()]).reshape(array.shape).tolist()
            for name, array in kept.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Samples:
        """What `to_json` kept."""
        return cls({name: np.array(values, dtype=np.float64) for name, values in data.items()})


def _db(ratio: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.minimum(MOST_DB, 10 * np.log10(ratio))


def _sums(samples: Samples, name: str, index: np.ndarray) -> np.ndarray:
    """Sums over the captions of an index (..., n) and over seed sets: (...) or (..., steps)."""
    by_caption = samples.arrays[name].sum(1)
    return by_caption[index].sum(index.ndim - 1)


def sqnr_db(samples: Samples, index: np.ndarray) -> np.ndarray:
    """SQNR of the UNet's output along the float trajectory, pooled over captions, mean of dB over steps."""
    signal, noise = (_sums(samples, f"output_{part}", index) for part in ("signal", "noise"))
    with np.errstate(divide="ignore"):
        return _db(signal / noise).mean(-1)


def latent_sqnr_db(samples: Samples, index: np.ndarray) -> np.ndarray:
    """SQNR of the denoised latents, pooled."""
    with np.errstate(divide="ignore"):
        return _db(_sums(samples, "latent_signal", index) / _sums(samples, "latent_noise", index))


def psnr_db(samples: Samples, index: np.ndarray) -> np.ndarray:
    """PSNR of the pictures against the float pictures, from the mean squared error over all of them."""
    count = index.shape[-1] * samples.seed_sets
    with np.errstate(divide="ignore"):
        return _db(count / _sums(samples, "squared_error", index))


def worst_psnr_db(samples: Samples, index: np.ndarray) -> np.ndarray:
    """What the PSNR of all but the worst tenth of the pictures reaches, each picture by its own."""
    with np.errstate(divide="ignore"):
        decibels = _db(1 / samples.arrays["squared_error"])[index]
    return np.percentile(decibels.reshape(*index.shape[:-1], -1), WORST, axis=-1)


def mean_ssim(samples: Samples, index: np.ndarray) -> np.ndarray:
    """Mean structural similarity of the pictures with the float pictures."""
    return _sums(samples, "ssim", index) / (index.shape[-1] * samples.seed_sets)


def attribute_accuracy(samples: Samples, index: np.ndarray) -> np.ndarray:
    """Share of the captions' attributes that the evaluator finds in the pictures."""
    return _sums(samples, "right", index) / _sums(samples, "present", index)


def evaluator_frechet(samples: Samples, index: np.ndarray) -> np.ndarray:
    """Frechet distance of the pictures to the float pictures in the features of the demo's evaluator."""
    sets = [torch.from_numpy(samples.arrays[name]) for name in ("float_features", "features")]
    flat = index.reshape(-1, index.shape[-1])
    found = [frechet_distance(*(part[one.tolist()].flatten(0, 1) for part in sets)) for one in flat]
    return np.array(found).reshape(index.shape[:-1])


Measure = Callable[[Samples, np.ndarray], np.ndarray]
MEASURES: dict[str, Measure] = {
    "sqnr_db": sqnr_db,
    "latent_sqnr_db": latent_sqnr_db,
    "psnr_db": psnr_db,
    "worst_psnr_db": worst_psnr_db,
    "ssim": mean_ssim,
    "attribute_accuracy": attribute_accuracy,
    "evaluator_frechet": evaluator_frechet,
}
NEEDS = {"attribute_accuracy": "right", "evaluator_frechet": "features"}


def measures_of(samples: Samples) -> dict[str, Measure]:
    """The measures that these samples allow: without the demo's evaluator, fewer."""
    return {name: m for name, m in MEASURES.items() if NEEDS.get(name, "ssim") in samples.arrays}


def value(samples: Samples, measure: Measure) -> float:
    """Over all captions."""
    return float(measure(samples, np.arange(samples.captions)))


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], captions: int, *, frechet: bool = False) -> Interval:
    """The confidence interval of a statistic of caption indices (..., n) -> (...); fixed seed.

    BCa, where it is defined; a Frechet distance grows where captions repeat, which the basic interval takes back.

    Raises:
        ValueError: there are fewer than two captions.
    """
    if captions < 2:
        raise ValueError(f"a confidence interval over {captions} captions: take at least 2")
    point = float(statistic(np.arange(captions)))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # handled below
        found = stats.bootstrap(
            (np.arange(captions),),
            lambda index, axis: statistic(np.moveaxis(index, axis, -1)),
            n_resamples=FRECHET_RESAMPLES if frechet else RESAMPLES,
            batch=100,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="basic" if frechet else "BCa",
            rng=np.random.default_rng(0),
        )
    low, high = (float(end) for end in found.confidence_interval)
    if not np.isfinite([low, high]).all():  # every resample gives the same value
        low = high = point
    return Interval(point, max(0.0, low) if frechet else low, high)


def interval(samples: Samples, name: str) -> Interval:
    """A measure with its confidence interval."""
    measure = MEASURES[name]
    return bootstrap(lambda index: measure(samples, index), samples.captions, frechet=name == "evaluator_frechet")


def difference(first: Samples, second: Samples, name: str) -> Interval:
    """How much more the second has of a measure, with the interval of the paired difference."""
    measure = MEASURES[name]
    return bootstrap(lambda index: measure(second, index) - measure(first, index), first.captions)
