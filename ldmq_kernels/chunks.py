"""Work cut into runs that fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

Item = TypeVar("Item")


def chunks_within(items: Iterable[Item], sizes: Mapping[Item, int], limit: int) -> Iterator[list[Item]]:
    """Cut items, in their order, into runs whose sizes add up to at most the limit.

    An item that is larger than the limit gets a run of its own.

    Args:
        sizes: bytes of each item; one that is not in it takes none.
        limit: bytes of a run.
    """
    chunk: list[Item] = []
    held = 0
    for item in items:
        size = sizes.get(item, 0)
        if chunk and held + size > limit:
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += size
    if chunk:
        yield chunk
