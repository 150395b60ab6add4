"""The scheme of every layer in few lines that a person can read: pattern rules, and exceptions to them.

Patterns are made of the parts of names: "*.attn2.to_k", "down_blocks.*.conv?", "mid_block.*". The first rule is the
commonest scheme; then that rule is added, again and again, after which the fewest layers get a wrong scheme; at the end
what no longer helps is taken out. The last rule that fits holds, and exceptions name what is still wrong.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase, translate

import numpy as np
from numpy.typing import NDArray

EVERYTHING = "*"
LONGEST_TAIL = 3  # components
RULE = 2  # lines that a rule counts for, since it must be thought about; an exception counts for one

Rule = dict[str, str]
Mask = NDArray[np.bool_]


def _loose(component: str) -> list[str]:
    """A component, and with its last letter or digit open: "to_q" and "to_?", "conv1" and "conv?"."""
    opened = re.sub(r"(?<=[_a-z])[a-z0-9]$", "?", component)
    return [component, opened] if len(opened) > 2 and opened != component else [component]


def patterns_of(name: str) -> set[str]:
    """Patterns that fit a layer's name: its ends, the blocks that it is in, what it is part of, and pairs of these."""
    parts = name.split(".")
    ends = {".".join(parts[-length:]) for length in range(1, min(LONGEST_TAIL, len(parts) - 1) + 1)}
    ends |= {".".join([*parts[-length:-1], end]) for length in (1, 2) for end in _loose(parts[-1]) if len(parts) > 2}
    ends |= {f"{part}.*" for part in parts[1:-1] if not part.isdigit()}
    starts = {".".join(parts[:length]) for length in range(1, len(parts))}
    patterns = {f"*.{end}" for end in ends} | {f"{start}.*" for start in starts}
    patterns |= {f"{start}.*.{end}" for start in starts for end in ends}
    return {pattern for pattern in patterns if fnmatchcase(name, pattern)}


def _fits(pattern: str, names: tuple[str, ...]) -> Mask:
    expression = re.compile(translate(pattern))
    return np.array([expression.match(name) is not None for name in names])


@functools.lru_cache(maxsize=4)
def _masks(names: tuple[str, ...]) -> dict[str, Mask]:
    """Pattern -> the layers that it fits; of patterns that fit the same layers, the shortest."""
    masks = {EVERYTHING: np.ones(len(names), dtype=bool)}
    seen: set[bytes] = {masks[EVERYTHING].tobytes()}
    for pattern in sorted({p for name in names for p in patterns_of(name)}, key=lambda p: (len(p), p)):
        mask = _fits(pattern, names)
        if mask.sum() > RULE and mask.tobytes() not in seen:
            seen.add(mask.tobytes())
            masks[pattern] = mask
    return masks


class _Rules:
    """Rules in order, each a pattern and the number of its scheme, and the scheme that they give every layer."""

    def __init__(self, names: tuple[str, ...], schemes_of_layers: NDArray[np.intp]) -> None:
        self.schemes = schemes_of_layers
        self.masks = _masks(names)
        self.rules: list[tuple[str, int]] = [(EVERYTHING, Counter(schemes_of_layers.tolist()).most_common(1)[0][0])]

    def assigned(self, rules: list[tuple[str, int]]) -> NDArray[np.intp]:
        result = np.full(len(self.schemes), -1)
        for pattern, scheme in rules:
            result[self.masks[pattern]] = scheme
        return result

    def cost(self, rules: list[tuple[str, int]]) -> int:
        """The lines that rules and their exceptions take, a rule counting for more."""
        return RULE * len(rules) + int((self.assigned(rules) != self.schemes).sum())

    def grow(self) -> None:
        patterns = list(self.masks)
        table = np.stack([self.masks[pattern] for pattern in patterns]).astype(np.int64)
        schemes = sorted(set(self.schemes.tolist()))
        while True:
            wrong = self.assigned(self.rules) != self.schemes
            gains = np.stack(
                [table @ ((wrong & (self.schemes == s)).astype(int) - (~wrong & (self.schemes != s))) for s in schemes]
            )
            scheme, pattern = np.unravel_index(int(gains.argmax()), gains.shape)
            if gains[scheme, pattern] <= RULE:
                return
            self.rules.append((patterns[pattern], schemes[scheme]))

    def prune(self) -> None:
        index = 1
        while index < len(self.rules):
            without = self.rules[:index] + self.rules[index + 1 :]
            if self.cost(without) <= self.cost(self.rules):
                self.rules = without
            else:
                index += 1


def compress(schemes: Mapping[str, str]) -> tuple[list[Rule], list[str]]:
    """Rules that give most layers their scheme, and the layers that need an exception.

    Args:
        schemes: layer -> scheme, of all layers.

    Returns:
        Rules as a plan file has them, each with its reason, and names of layers in the given order.
    """
    names, kinds = tuple(schemes), sorted(set(schemes.values()))
    schemes_of_layers = np.array([kinds.index(scheme) for scheme in schemes.values()])
    search = _Rules(names, schemes_of_layers)
    search.grow()
    search.prune()
    rules = [
        _rule(pattern, kinds[scheme], search.masks[pattern], schemes_of_layers == scheme)
        for pattern, scheme in search.rules
    ]
    wrong = search.assigned(search.rules) != schemes_of_layers
    return rules, [name for name, is_wrong in zip(names, wrong, strict=True) if is_wrong]


def _rule(pattern: str, scheme: str, fits: Mask, wants: Mask) -> Rule:
    agreeing, all_of_them = int((fits & wants).sum()), int(fits.sum())
    if pattern == EVERYTHING:
        reason = f"the commonest choice: {agreeing} of {all_of_them} layers"
    elif agreeing == all_of_them:
        reason = f"all {all_of_them} layers of this kind choose it"
    else:
        reason = f"{agreeing} of {all_of_them} layers of this kind choose it"
    return {"pattern": pattern, "scheme": scheme, "reason": reason}
