"""One trial after another: what was done, and whether what came of it was right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What came of one mutation.

    Attributes:
        mutation: what was done, in a word or two; outcomes are counted by it.
        seed: what `random.Random` was made of: the same one does the same again.
        right: whether the answer was right: identical, or refused in clear words.
        text: the answer, for a person who looks into a wrong one.
    """

    mutation: str
    seed: int
    right: bool
    text: str


def is_clear(error: BaseException, *names: str) -> bool:
    """Whether an error's text is short and says one of these names, such as those of a file and of its layers."""
    text = str(error)
    return len(text) < 2000 and any(name in text for name in names if name)


def wrong_ones(outcomes: Iterable[Outcome]) -> list[str]:
    """A line for each outcome that is not right."""
    return [f"{o.mutation}, seed {o.seed}: {o.text[:300]}" for o in outcomes if not o.right]


def table(outcomes: Iterable[Outcome]) -> str:
    """Tried and right by mutation, and all together."""
    listed = list(outcomes)
    tried, right = Counter(o.mutation for o in listed), Counter(o.mutation for o in listed if o.right)
    lines = [f"{name:44}{right[name]:7} of {tried[name]:6}" for name in sorted(tried)]
    share = 100 * sum(right.values()) / max(1, len(listed))
    return "\n".join([*lines, f"{'right, ' + f'{share:.2f} %':44}{sum(right.values()):7} of {len(listed):6}"])
