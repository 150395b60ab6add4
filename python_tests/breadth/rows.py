"""Rows of the matrix: a pipeline, and calls of it with what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROWS: dict[str, Row] = {}


@dataclass(frozen=True)
class Row:
    """One pipeline as it is used.

    Attributes:
        build: makes the pipeline and three calls of it, of which the last one verifies the plan.
        part: which of its denoisers is planned; the first one if None.
        is_large: whether its models are large, so that two calls are enough for the matrix.
        is_saved_whole: whether the model in float comes back from disk as it was: adapters and FreeU do not.
    """

    name: str
    build: Callable[[], tuple[Any, list[Any]]]
    part: str | None = None
    is_large: bool = False
    is_saved_whole: bool = True


def row(
    name: str, *, part: str | None = None, is_large: bool = False, is_saved_whole: bool = True
) -> Callable[[Any], Any]:
    """Register a function that builds a pipeline and its calls under a name."""

    def register(build: Callable[[], tuple[Any, list[Any]]]) -> Callable[[], tuple[Any, list[Any]]]:
        ROWS[name] = Row(name, build, part, is_large, is_saved_whole)
        return build

    return register


def three(call: Callable[[int], dict[str, Any]], **common: Any) -> list[dict[str, Any]]:
    """Three calls with what they have in common."""
    return [common | call(index) for index in range(3)]


PROMPTS = ("a red circle", "a blue square on a grey background", "some green lines")


def prompt(index: int) -> dict[str, Any]:
    """A call with a prompt alone."""
    return {"prompt": PROMPTS[index]}
