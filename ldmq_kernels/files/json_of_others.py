"""JSON that anybody may have written: bounded in size, depth and numbers, each name once; errors have their place."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from ldmq_kernels.files.paths import printable

# The plan of SDXL with all vectors is about 16 MB and 10,000 values. What is below these limits is read in less than
# 2 s and 200 MB; text with other letters than ASCII's takes up to four times its bytes in memory.
MOST_BYTES = 48 << 20
MOST_BYTES_BEYOND_ASCII = 20 << 20
MOST_VALUES = 200_000
MOST_LEVELS = 100
MOST_LETTERS = 4 << 20  # of one text: a vector of 800,000 float32
MOST_DIGITS = 25  # of an integer
_SHOWN = 200


class NotJsonError(ValueError):
    """A file that is no JSON, or none that this package takes; the text names the file and the place in it."""


class _BadValue(Exception):
    def __init__(self, literal: str, why: str) -> None:
        super().__init__(why)
        self.literal = literal


def shortened(value: object, most: int = _SHOWN) -> str:
    """A value as text, its middle left out where it is long."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _integer(literal: str) -> int:
    if len(literal) > MOST_DIGITS:
        raise _BadValue(literal, f"a whole number of {len(literal.lstrip('-'))} digits, which no value here has")
    return int(literal)


def _float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise _BadValue(literal, f"the number {shortened(literal, 40)}, which is too large for 64 bits")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _BadValue(json.dumps(twice), f"the name {shortened(repr(twice))} twice in one object: leave one out")
    return found


def _place(text: str, literal: str) -> str:
    """The line and column of a literal: of its last occurrence, which is the second of a name that is there twice."""
    last = text.rfind(literal)
    if last < 0:
        return ""
    return f"line {text.count(chr(10), 0, last) + 1}, column {last - text.rfind(chr(10), 0, last)}: "


def _check_parts(value: Any, name: str) -> None:
    """Refuse a value with too many levels, or with a text that is too long for any use."""
    level = 0
    inner: list[Any] = [[value]]
    while inner:
        level += 1
        if level > MOST_LEVELS:
            _refuse(name, f"objects and lists in each other more than {MOST_LEVELS} deep")
        children = [c for outer in inner for c in (outer.values() if isinstance(outer, dict) else outer)]
        keys = (key for outer in inner if isinstance(outer, dict) for key in outer)
        for text in itertools.chain(keys, children):
            if isinstance(text, str) and len(text) > MOST_LETTERS:
                _refuse(name, f"a text of {len(text):,} letters, {shortened(text)!r}: the most is {MOST_LETTERS:,}")
        inner = [child for child in children if isinstance(child, dict | list)]


def _refuse(name: str, why: object, what: str = "a JSON file") -> NoReturn:
    raise NotJsonError(f"{name} is not {what} that this package takes: {why}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: there is none.
        NotJsonError: it is none, or larger or deeper than any file of this package; a number is out of range; an
            object has a name twice.
        OSError: it cannot be read.
    """
    name = printable(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        _refuse(name, "it is a folder")
    most = MOST_BYTES if content.isascii() else MOST_BYTES_BEYOND_ASCII
    if len(content) > most:
        _refuse(name, f"it is larger than {most >> 20} MB")
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES:
        _refuse(name, f"it holds more than {MOST_VALUES:,} values")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(name, f"it is not UTF-8, at byte {error.start}")
    del content
    return parse_json(text, name)


def parse_json(text: str, name: str, what: str = "a JSON file") -> Any:
    """The value of a text in JSON.

    Args:
        name: what the error calls the text, and `what` it should be.

    Raises:
        NotJsonError: it is none, or deeper than any of this package; a number is out of range; an object has a name
            twice.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_float, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        _refuse(name, error, what)
    except RecursionError:
        _refuse(name, f"objects and lists in each other more than {MOST_LEVELS} deep", what)
    except _BadValue as error:
        _refuse(name, f"{_place(text, error.literal)}{error}", what)
    _check_parts(value, name)
    return value
