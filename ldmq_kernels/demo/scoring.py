"""Scores of the demo model's pictures, by its evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmq_kernels.demo.evaluator import Evaluator, attribute_accuracy, frechet_distance
from ldmq_kernels.demo.scenes import Scene
from ldmq_kernels.report.measure import PicturePairs


@dataclass(frozen=True)
class Scores:
    """Scores of the float pictures (`before`) and the quantized ones (`after`).

    Attributes:
        accuracy_before: share of attributes that the float pictures show, by kind of caption: "one object", "two
            objects" and "all".
        frechet_distance: between the two sets, in the evaluator's features; 0 is the same.
        feature_variance: the sum of the variances of the float pictures' features, to compare the distance with.
        psnr_db: PSNR of all pictures together, in dB.
    """

    accuracy_before: dict[str, float]
    accuracy_after: dict[str, float]
    frechet_distance: float
    feature_variance: float
    psnr_db: float
    psnr_db_median: float
    psnr_db_worst: float


@torch.no_grad()
def _read(evaluator: Evaluator, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Logits by attribute, and features, of pictures in [0, 1]."""
    features = torch.cat([evaluator.features(part * 2 - 1) for part in pictures.split(64)])
    return evaluator.heads(features), features


def _accuracies(logits: dict[str, Tensor], drawn: Sequence[Scene]) -> dict[str, float]:
    kinds = {
        "one object": [i for i, scene in enumerate(drawn) if len(scene.things) == 1],
        "two objects": [i for i, scene in enumerate(drawn) if len(scene.things) == 2],
        "all": list(range(len(drawn))),
    }
    return {
        kind: attribute_accuracy({name: v[index] for name, v in logits.items()}, [drawn[i] for i in index])
        for kind, index in kinds.items()
        if index
    }


def score(evaluator: Evaluator, pairs: PicturePairs, drawn: Sequence[Scene]) -> Scores:
    """Read both sets of pictures and compare them; `drawn` are the scenes that the prompts describe."""
    before, features_before = _read(evaluator, pairs.before)
    after, features_after = _read(evaluator, pairs.after)
    psnr = sorted(pairs.psnr_db)
    return Scores(
        accuracy_before=_accuracies(before, drawn),
        accuracy_after=_accuracies(after, drawn),
        frechet_distance=frechet_distance(features_before, features_after),
        feature_variance=float(features_before.var(0).sum()),
        psnr_db=pairs.pooled_psnr_db,
        psnr_db_median=psnr[len(psnr) // 2],
        psnr_db_worst=psnr[0],
    )
