"""The parts of a model that the heat map of all layers is divided into, from the layers' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

MOST_BLOCKS = 40  # that have a place of their own; more are drawn two, three, ... together


@dataclass(frozen=True)
class Stage:
    """Neighbouring layers of one part of a model.

    Attributes:
        part: what the part belongs to: a list of blocks ("transformer_blocks"), or itself ("down 0", "mid", "conv_in").
        label: what stands below it: of an entry of a list its number there, of several together the first one's.
        start: index of the first layer.
        end: index after the last layer.
        together: how many entries of the list are drawn as one.
    """

    part: str
    label: str
    start: int
    end: int
    together: int = 1

    @property
    def is_entry(self) -> bool:
        """Whether it is one or more blocks of a list, as all of a transformer are."""
        return self.label != self.part


def _place(layer: str) -> tuple[str, int | None]:
    """The part that a layer is in, and of a list the number of the entry."""
    name, *rest = layer.split(".")
    entry = int(rest[0]) if rest and rest[0].isdigit() else None
    if name in ("down_blocks", "up_blocks"):
        return f"{name.removesuffix('_blocks')} {entry}", None
    if name == "mid_block":
        return "mid", None
    return ("time", None) if name.startswith("time") else (name, entry)


def stages(layers: Sequence[str]) -> list[Stage]:
    """The stages of layers in the order of running: of a UNet "down 0", "mid", "up 1"; each block of a transformer.

    Where there are more than `MOST_BLOCKS` entries of lists, as many neighbours of a list are taken together as bring
    them below that.

    Args:
        layers: names as `named_modules` gives them.
    """
    places = [_place(layer) for layer in layers]
    blocks = {place for place in places if place[1] is not None}
    together = 1
    while len({(part, entry // together) for part, entry in blocks if entry is not None}) > MOST_BLOCKS:
        together += 1
    keys = [(part, None if entry is None else entry // together) for part, entry in places]
    found = []
    for (part, group), members in groupby(range(len(keys)), keys.__getitem__):
        indices = list(members)
        label = part if group is None else str(group * together)
        found.append(Stage(part, label, indices[0], indices[-1] + 1, 1 if group is None else together))
    return found
