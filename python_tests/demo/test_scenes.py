"""Captions say what the pictures show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldmq_kernels.demo import scenes


def draw(caption_scene: scenes.Scene) -> Tensor:
    """(3, 64, 64) in 0..255."""
    return (scenes.render([caption_scene], torch.Generator().manual_seed(0))[0] + 1) * 127.5


def centre_of(picture: Tensor, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean x and y of the pixels of a colour."""
    near = (picture - torch.tensor(colour, dtype=torch.float32)[:, None, None]).abs().amax(0) < 2
    y, x = torch.nonzero(near, as_tuple=True)
    return float(x.float().mean()), float(y.float().mean())


@pytest.mark.parametrize("objects", [1, 2])
def test_held_out_captions_are_never_trained_on(objects: int) -> None:
    held_out = {caption for caption, _ in scenes.captions(200, objects, held_out=True, seed=3)}
    trained = {caption for caption, _ in scenes.captions(3000, objects, held_out=False, seed=4)}
    assert len(held_out) > 50
    assert not held_out & trained


def test_a_seed_gives_the_same_captions_and_pictures_again() -> None:
    first, second = (scenes.captions(20, 2, held_out=False, seed=9) for _ in range(2))
    assert first == second
    assert first != scenes.captions(20, 2, held_out=False, seed=10)
    drawn = [scene for _, scene in first]
    pictures = [scenes.render(drawn, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("objects", [1, 2])
def test_a_caption_names_every_attribute_of_its_scene(objects: int) -> None:
    for caption, scene in scenes.captions(200, objects, held_out=False, seed=5):
        assert len(scene.attributes()) == (5 if objects == 1 else 8)
        assert scene.background in caption
        for thing in scene.things:
            assert str(thing) in caption
        if objects == 1:
            assert scene.layout in caption


@pytest.mark.parametrize("relation", list(scenes.RELATIONS))
def test_a_relation_puts_the_first_named_object_where_it_says(relation: str) -> None:
    for caption, scene in scenes.captions(400, 2, held_out=False, seed=6):
        first, second = caption.split(f" {relation} ") if f" {relation} " in caption else ("", "")
        colours = [thing.colour for thing in scene.things]
        if not first or len(set(colours)) == 1:
            continue
        named = [next(c for c in scenes.COLOURS if f" {c} " in text) for text in (first, second.split(" on a ")[0])]
        (x0, y0), (x1, y1) = (centre_of(draw(scene), scenes.COLOURS[name]) for name in named)
        moved = {"above": y1 - y0, "below": y0 - y1, "to the left of": x1 - x0, "to the right of": x0 - x1}
        assert moved[relation] > 15


@pytest.mark.parametrize("place", list(scenes.PLACES))
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_an_object_is_drawn_at_its_place_in_its_colour_on_its_background(place: str, shape: str) -> None:
    scene = scenes.Scene((scenes.Thing(shape, "blue", "small"),), place, "grey")
    picture = draw(scene)
    x, y = centre_of(picture, scenes.COLOURS["blue"])
    want_x, want_y = scenes.PLACES[place]
    assert abs(x - want_x) < 4
    assert abs(y - want_y) < 4
    corner = picture[:, 32, 0] if want_x > 20 else picture[:, 32, 63]
    assert corner.tolist() == pytest.approx(scenes.BACKGROUNDS["grey"], abs=0.1)


def test_shapes_and_sizes_can_be_told_apart() -> None:
    pictures = {
        (shape, size): draw(scenes.Scene((scenes.Thing(shape, "red", size),), "in the centre", "white"))
        for shape in scenes.SHAPES
        for size in scenes.SIZES
    }
    names = list(pictures)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert float((pictures[first] - pictures[second]).abs().amax(0).gt(60).sum()) > 12, (first, second)


@pytest.mark.parametrize("objects", [1, 2])
def test_an_enlarged_picture_shows_the_same_scene(objects: int) -> None:
    drawn = [scene for _, scene in scenes.captions(8, objects, held_out=False, seed=8)]
    plain, large = (scenes.render(drawn, torch.Generator().manual_seed(2), enlarged) for enlarged in (1, 2))
    assert large.shape == (8, 3, 128, 128)
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert float((shrunk - plain).abs().mean()) < 2e-3
    blurred_edges = torch.nn.functional.interpolate(plain, scale_factor=2, mode="bilinear")
    assert float((blurred_edges - large).abs().amax()) > 0.3
