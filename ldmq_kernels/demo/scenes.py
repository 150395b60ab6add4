"""The world of the demo model: captions, and the pictures that they describe.

A scene holds one object at one of nine places, or two objects in a relation, on a plain
background. Everything is drawn with signed distance functions on the pixel grid, in batches,
on any device; the same generator gives the same scenes everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 64

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 50, 180),
    "orange": (245, 130, 30),
}
SIZES = {"small": 7.0, "large": 12.0}
BACKGROUNDS = {"grey": (150, 150, 150), "white": (240, 240, 240), "black": (20, 20, 20), "pink": (250, 190, 205)}
PLACES = {
    "at the top left": (16, 16),
    "at the top": (32, 16),
    "at the top right": (48, 16),
    "at the left": (16, 32),
    "in the centre": (32, 32),
    "at the right": (48, 32),
    "at the bottom left": (16, 48),
    "at the bottom": (32, 48),
    "at the bottom right": (48, 48),
}
# relation -> (layout, is the object named first also the first of the layout)
RELATIONS = {
    "above": ("vertical", True),
    "below": ("vertical", False),
    "to the left of": ("horizontal", True),
    "to the right of": ("horizontal", False),
}
LAYOUT_CENTRES = {"vertical": ((32, 17), (32, 47)), "horizontal": ((17, 32), (47, 32))}
LAYOUTS = tuple(PLACES) + tuple(LAYOUT_CENTRES)
JITTER_PIXELS = 2.0
JITTER_RADIUS = 0.08


@dataclass(frozen=True)
class Thing:
    """One object of a scene, in the words of the caption."""

    shape: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A scene in canonical order: `things[0]` is the upper or the left one.

    `layout` is a place for one object, "vertical" or "horizontal" for two.
    """

    things: tuple[Thing, ...]
    layout: str
    background: str

    def attributes(self) -> dict[str, str]:
        """The attributes that a picture of this scene must show, 5 or 8 of them."""
        attributes = {"layout": self.layout, "background": self.background}
        for index, thing in enumerate(self.things):
            attributes |= {f"shape{index}": thing.shape, f"colour{index}": thing.colour, f"size{index}": thing.size}
        return attributes


def _choice(options: tuple[str, ...], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def _random_thing(generator: torch.Generator) -> Thing:
    return Thing(
        _choice(SHAPES, generator),
        _choice(tuple(COLOURS), generator),
        _choice(tuple(SIZES), generator),
    )


def random_caption(generator: torch.Generator, objects: int) -> tuple[str, Scene]:
    """Draw a scene of one or two objects and a caption for it."""
    things = tuple(_random_thing(generator) for _ in range(objects))
    background = _choice(tuple(BACKGROUNDS), generator)
    tail = f"on a {background} background"
    if objects == 1:
        place = _choice(tuple(PLACES), generator)
        return f"{things[0]} {place} {tail}", Scene(things, place, background)
    relation = _choice(tuple(RELATIONS), generator)
    layout, in_order = RELATIONS[relation]
    caption = f"{things[0]} {relation} {things[1]} {tail}"
    return caption, Scene(things if in_order else things[::-1], layout, background)


def is_held_out(caption: str) -> bool:
    """One caption in sixteen, by a fixed hash of its words, is never trained on."""
    value = 0
    for character in caption:
        value = (value * 131 + ord(character)) % 1_000_003
    return value % 16 == 0


def captions(count: int, objects: int, *, held_out: bool, seed: int) -> list[tuple[str, Scene]]:
    """`count` captions with their scenes, all held out from training or none of them."""
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[str, Scene]] = []
    while len(drawn) < count:
        pair = random_caption(generator, objects)
        if is_held_out(pair[0]) == held_out:
            drawn.append(pair)
    return drawn


def _signed_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline, negative inside; x and y are relative to the centre."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75 * radius).abs() - 0.27 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "cross":
        long, short = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
        return torch.maximum(long - radius, short - 0.32 * radius)
    below = y - 0.75 * radius
    slanted = (x.abs() * 2.0 - (y + radius)) / 5.0**0.5
    return torch.maximum(below, slanted)


def render(scenes: list[Scene], generator: torch.Generator, enlarged: int = 1) -> Tensor:
    """Draw scenes, each object with a little jitter of place and size.

    Args:
        enlarged: how many pixels a side stand for one of 64x64; edges are as sharp as the pixels.

    Returns:
        (len(scenes), 3, 64 * enlarged, 64 * enlarged) float32 in [-1, 1].
    """
    size = IMAGE_SIZE * enlarged
    rows = (torch.arange(size, dtype=torch.float32) + 0.5) / enlarged - 0.5
    y, x = torch.meshgrid(rows, rows, indexing="ij")
    pictures = torch.empty(len(scenes), 3, size, size)
    jitter = torch.rand(len(scenes), 2, 3, generator=generator) * 2 - 1
    for picture, scene, moves in zip(pictures, scenes, jitter, strict=True):
        picture[:] = torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32)[:, None, None]
        centres = LAYOUT_CENTRES.get(scene.layout) or (PLACES[scene.layout],)
        for thing, (cx, cy), move in zip(scene.things, centres, moves, strict=False):
            dx, dy = x - cx - move[0] * JITTER_PIXELS, y - cy - move[1] * JITTER_PIXELS
            radius = SIZES[thing.size] * (1 + move[2] * JITTER_RADIUS)
            cover = (0.5 - enlarged * _signed_distance(thing.shape, dx, dy, radius)).clamp(0, 1)
            colour = torch.tensor(COLOURS[thing.colour], dtype=torch.float32)[:, None, None]
            picture.lerp_(colour, cover)
    return pictures / 127.5 - 1
