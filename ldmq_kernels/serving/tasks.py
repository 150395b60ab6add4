"""A picture that is to be drawn, and what must agree for pictures to be drawn in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Key:
    """What pictures of one batch have in common: arguments of the pipeline that hold for all of them.

    Attributes:
        kind: "text", "image" or "mask": by what the picture is asked for.
        has_negative: whether negative prompts are given, which some pipelines take otherwise than empty ones.
        lora: name and scale of an adapter.
    """

    model: str
    kind: str
    width: int
    height: int
    steps: int
    guidance: float
    has_negative: bool
    strength: float | None = None
    clip_skip: int | None = None
    lora: tuple[str, float] | None = None


@dataclass(eq=False)
class Task:
    """One picture.

    Attributes:
        done: its PIL picture, or why there is none.
        image, mask: PIL pictures, where it starts from one.
        previews: after how many steps `preview` is called with a PIL picture.
        gone: whether nobody waits for it any more.
        arrived: on the loop's clock, s.
    """

    key: Key
    prompt: str
    negative: str
    seed: int
    done: asyncio.Future[Any]
    image: Any = None
    mask: Any = None
    previews: tuple[int, ...] = ()
    preview: Callable[[Any], None] | None = None
    gone: bool = False
    arrived: float = field(default=0.0)

    @property
    def work(self) -> float:
        """pixels x steps."""
        return float(self.key.width * self.key.height * self.key.steps)
