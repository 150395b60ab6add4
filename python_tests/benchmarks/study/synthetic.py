"""Random samples in place of a measured UNet's."""

from __future__ import annotations

import numpy as np

from benchmarks.study.samples import Samples


def made_samples(seed: int = 0, captions: int = 7, seed_sets: int = 3, louder: float = 1.0) -> Samples:
    """Random sums of 4 steps, noise times `louder`, and features of 5 values."""
    random = np.random.default_rng(seed)
    shape = (captions, seed_sets)
    features = random.normal(size=(*shape, 5))
    return Samples(
        {
            "output_signal": 100 + random.random((*shape, 4)),
            "output_noise": louder * (0.01 + 0.01 * random.random((*shape, 4))),
            "latent_signal": 10 + random.random(shape),
            "latent_noise": louder * random.random(shape),
            "squared_error": louder * random.random(shape) * 1e-3,
            "ssim": 1 - 0.1 * random.random(shape),
            "right": random.integers(3, 8, shape).astype(float),
            "present": np.full(shape, 8.0),
            "float_features": features,
            "features": features + 0.1 * random.normal(size=features.shape),
        }
    )
