"""The knapsack finds what trying all combinations finds."""

import itertools

import pytest
import torch

from ldmq_kernels.planning.knapsack import (
    Infeasible,
    Option,
    fewest_bytes,
    least_noise,
    smallest_bytes,
    smallest_noise,
)


def _options(seed: int, layers: int = 6) -> list[Option]:
    random = torch.Generator().manual_seed(seed)
    options = []
    for layer in range(layers):
        for scheme, size, operations in (("fp16", 16, 2.0), ("w8a16", 8, 2.1), ("w8a8", 8, 1.0), ("w4a8", 4, 1.0)):
            noise = 0.0 if scheme == "fp16" else float(torch.rand(1, generator=random)) * 16 / size
            options.append(Option(f"layer{layer}", scheme, noise, size * (1 + layer), operations * (1 + layer)))
    return options


def _every_choice(options: list[Option]) -> list[tuple[Option, ...]]:
    by_layer: dict[str, list[Option]] = {}
    for option in options:
        by_layer.setdefault(option.layer, []).append(option)
    return list(itertools.product(*by_layer.values()))


@pytest.mark.parametrize("seed", range(5))
def test_fewest_bytes_is_optimal_and_within_the_noise(seed):
    options, limit = _options(seed), 3.0
    chosen = fewest_bytes(options, limit).values()
    allowed = [c for c in _every_choice(options) if sum(o.noise for o in c) <= limit]
    fewest = min(sum(o.bytes for o in c) for c in allowed)
    assert sum(o.noise for o in chosen) <= limit * (1 + 1e-6)
    assert sum(o.bytes for o in chosen) <= fewest * 1.002


@pytest.mark.parametrize("seed", range(5))
def test_least_noise_is_optimal_and_within_the_bytes(seed):
    options, limit = _options(seed), 120.0
    chosen = least_noise(options, limit).values()
    allowed = [c for c in _every_choice(options) if sum(o.bytes for o in c) <= limit]
    least = min(sum(o.noise for o in c) for c in allowed)
    assert sum(o.bytes for o in chosen) <= limit * (1 + 1e-6)
    assert sum(o.noise for o in chosen) <= least * 1.002 + 1e-9


def test_of_equal_bytes_the_cheaper_operations_win_when_the_noise_allows():
    options = [o for o in _options(0) if o.scheme in ("w8a16", "w8a8")]
    assert {o.scheme for o in fewest_bytes(options, 1e3).values()} == {"w8a8"}


def test_every_layer_gets_exactly_one_choice():
    options = _options(3)
    assert set(fewest_bytes(options, 2.0)) == {o.layer for o in options}


def test_what_cannot_be_met_says_so():
    options = [o for o in _options(1) if o.scheme != "fp16"]
    with pytest.raises(Infeasible):
        fewest_bytes(options, smallest_noise(options) * 0.9)
    with pytest.raises(Infeasible):
        least_noise(options, smallest_bytes(options) * 0.9)
