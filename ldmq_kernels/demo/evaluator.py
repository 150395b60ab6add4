"""Reads the attributes of a picture, so that a pipeline can be scored without a person.

A small convolutional classifier trained on rendered scenes. Its pooled features also give a
Frechet distance; it is a distance in this network's own feature space and is called nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldmq_kernels.demo import scenes

CLASSES: dict[str, tuple[str, ...]] = {
    "layout": scenes.LAYOUTS,
    "background": tuple(scenes.BACKGROUNDS),
    **{f"shape{index}": scenes.SHAPES for index in (0, 1)},
    **{f"colour{index}": tuple(scenes.COLOURS) for index in (0, 1)},
    **{f"size{index}": tuple(scenes.SIZES) for index in (0, 1)},
}
FEATURES = 128
ABSENT = -100  # the target index that cross entropy ignores: attributes of a second object that is not there


class AttributeHeads(nn.ModuleDict):
    """One linear classifier for each attribute over shared features."""

    def __init__(self, features: int) -> None:
        super().__init__({name: nn.Linear(features, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(batch, features) -> logits by attribute, each (batch, classes)."""
        return {name: head(features) for name, head in self.items()}


class Evaluator(nn.Module):
    """64x64 pictures in [-1, 1] to the logits of each attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 96, 128):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, FEATURES), nn.SiLU())
        self.heads = AttributeHeads(FEATURES)

    def features(self, pictures: Tensor) -> Tensor:
        """(batch, 3, 64, 64) in [-1, 1] -> (batch, 128)."""
        return self.body(pictures)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """(batch, 3, 64, 64) in [-1, 1] -> logits by attribute."""
        return self.heads(self.features(pictures))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Evaluator:
        """Load the shipped weights, in float32 and evaluation mode."""
        model = cls()
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return model.eval()


def targets(drawn: Sequence[scenes.Scene]) -> dict[str, Tensor]:
    """Class indices by attribute, `ABSENT` where a scene has no such attribute."""
    attributes = [scene.attributes() for scene in drawn]
    return {
        name: torch.tensor([classes.index(a[name]) if name in a else ABSENT for a in attributes])
        for name, classes in CLASSES.items()
    }


def attribute_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Mean over attributes of the cross entropy, absent ones left out."""
    losses = [
        nn.functional.cross_entropy(logits[name].float(), labels[name], ignore_index=ABSENT)
        for name in CLASSES
        if bool((labels[name] != ABSENT).any())
    ]
    return torch.stack(losses).mean()


def attributes_right(logits: dict[str, Tensor], drawn: Sequence[scenes.Scene]) -> tuple[Tensor, Tensor]:
    """(pictures,) int64 each: how many of a scene's attributes its picture shows, and how many it has."""
    right = torch.zeros(len(drawn), dtype=torch.int64)
    total = torch.zeros_like(right)
    for name, indices in targets(drawn).items():
        present = indices != ABSENT
        right += (logits[name].argmax(1) == indices) & present
        total += present
    return right, total


def attribute_accuracy(logits: dict[str, Tensor], drawn: Sequence[scenes.Scene]) -> float:
    """Share of all attributes that the scenes have and the pictures show."""
    right, total = attributes_right(logits, drawn)
    return int(right.sum()) / int(total.sum())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two sets of features, each (pictures, features), as normal distributions."""
    a, b = first.double().numpy(), second.double().numpy()
    centred_a = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    centred_b = (b - b.mean(0)) / np.sqrt(len(b) - 1)
    # the trace of the covariances' root is this nuclear norm, also for fewer pictures than features
    cross = np.linalg.norm(np.linalg.qr(centred_a).R @ np.linalg.qr(centred_b).R.T, "nuc")
    spread = np.square(centred_a).sum() + np.square(centred_b).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + max(0.0, spread - 2 * cross))
