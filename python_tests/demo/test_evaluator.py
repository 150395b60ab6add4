"""The evaluator's measures, and on the shipped weights its reading of rendered pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldmq_kernels.demo import WEIGHTS, load_demo_pipeline, load_evaluator, scenes
from ldmq_kernels.demo.evaluator import (
    ABSENT,
    CLASSES,
    Evaluator,
    attribute_accuracy,
    attribute_loss,
    attributes_right,
    frechet_distance,
    targets,
)

trained = pytest.mark.skipif(
    not (WEIGHTS / "model_index.json").exists(), reason="the trained weights are not in ldmq_kernels/demo/weights"
)


def _scenes(count: int) -> list[scenes.Scene]:
    return [
        scene for objects in (1, 2) for _, scene in scenes.captions(count // 2, objects, held_out=True, seed=objects)
    ]


def _certain(drawn: list[scenes.Scene]) -> dict[str, Tensor]:
    """Logits that are sure of the truth; of what is absent, sure of the first class."""
    return {
        name: 20 * torch.nn.functional.one_hot(index.clamp_min(0), len(CLASSES[name])).float()
        for name, index in targets(drawn).items()
    }


def test_accuracy_counts_what_is_there_and_nothing_else() -> None:
    drawn = _scenes(20)
    logits = _certain(drawn)
    assert attribute_accuracy(logits, drawn) == 1
    logits["shape0"][3] *= -1
    assert attribute_accuracy(logits, drawn) == pytest.approx(1 - 1 / (10 * 5 + 10 * 8))


def test_attributes_are_counted_picture_by_picture() -> None:
    drawn = _scenes(20)
    logits = _certain(drawn)
    for name in ("shape0", "colour1"):
        logits[name][13] *= -1
    logits["shape1"][2] *= -1  # a second object that is not there
    right, total = attributes_right(logits, drawn)
    assert total.tolist() == [5] * 10 + [8] * 10
    assert (total - right).tolist() == [2 if index == 13 else 0 for index in range(20)]


def test_absent_attributes_neither_cost_nor_teach() -> None:
    drawn = _scenes(20)
    logits = {name: values.requires_grad_() for name, values in _certain(drawn).items()}
    attribute_loss(logits, targets(drawn)).backward()
    absent = targets(drawn)["shape1"] == ABSENT
    assert int(absent.sum()) == 10
    gradient = logits["shape1"].grad
    assert gradient is not None
    assert not gradient[absent].any()
    assert gradient[~absent].any()


def test_frechet_distance_of_shifted_and_of_wider_features() -> None:
    features = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    shift = torch.tensor([3.0, 0, 0, -4.0, 0, 0])
    assert frechet_distance(features, features + shift) == pytest.approx(25, rel=1e-4)
    assert frechet_distance(features, features * 3) == pytest.approx(4 * 6, rel=0.05)


def test_frechet_distance_of_fewer_pictures_than_features() -> None:
    features = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(features, features + 1) == pytest.approx(128, rel=1e-4)


def test_the_heads_read_the_same_features_that_the_distance_compares() -> None:
    torch.manual_seed(0)
    model = Evaluator().eval()
    pictures = scenes.render(_scenes(4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, from_features = model(pictures), model.heads(model.features(pictures))
    assert all(torch.equal(logits[name], from_features[name]) for name in CLASSES)


def test_missing_weights_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="train them"):
        load_evaluator(WEIGHTS / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_demo_pipeline(torch.float32, WEIGHTS / "nowhere")


@trained
def test_the_shipped_evaluator_reads_rendered_pictures() -> None:
    drawn = _scenes(400)
    with torch.no_grad():
        logits = load_evaluator()(scenes.render(drawn, torch.Generator().manual_seed(5)))
    assert attribute_accuracy(logits, drawn) >= 0.98


@trained
def test_the_shipped_weights_are_small_and_in_float16() -> None:
    from safetensors import safe_open

    files = sorted(WEIGHTS.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 30e6
    for file in files:
        with safe_open(file, "pt") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, file
