"""JSON that anybody may have written: read as json does, or refused with the file, the place and the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldmq_kernels.files import NotJsonError, read_json, shortened

RIGHT = [
    "{}",
    "[]",
    "3",
    '"a"',
    "[1, -2.5e3, null, true]",
    '{"a": {"b": [0.1]}}',
    "[" * 90 + "]" * 90,
    '"größer 日本 \U0001f600"',
]


@pytest.mark.parametrize("text", RIGHT, ids=range(len(RIGHT)))
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_right_json_is_read_as_the_library_reads_it(text: str, mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(mark + text.encode())
    assert read_json(tmp_path / "a.json") == json.loads(text)


WRONG = {
    "": "Expecting value: line 1 column 1",
    "{\n  'a': 1}": "line 2 column 3",
    "[1,": "line 1 column 4",
    '{\n "a": 1,\n "a": 2}': "line 3, column 2: the name 'a' twice",
    "[\n 1,\n 1e400]": "line 3, column 2: the number 1e400, which is too large",
    "[\n " + "7" * 400 + "]": "line 2, column 2: a whole number of 400 digits",
    "[" + "-9" * 3000 + "]": "line 1",
    "[" * 101 + "]" * 101: "more than 100 deep",
    "[" * 100_000: "more than 100 deep",
    "[" + "0," * 200_001 + "0]": "more than 200,000 values",
    '["' + "x" * 5_000_000 + '"]': "a text of 5,000,000 letters, 'xxx",
    '{"' + "k" * 5_000_000 + '": 1}': "a text of 5,000,000 letters, 'kkk",
    " " * (49 << 20): "larger than 48 MB",
    "é" * (11 << 20): "larger than 20 MB",
}


@pytest.mark.parametrize(("text", "words"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_refused_names_the_file_and_the_place(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(NotJsonError) as raised:
        read_json(tmp_path / "a.json")
    assert f"{tmp_path}/a.json is not a JSON file" in str(raised.value)
    assert words in str(raised.value)
    assert len(str(raised.value)) < 600


def test_what_is_no_text_or_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(NotJsonError, match=r"a\.json is not a JSON .* not UTF-8, at byte 7"):
        read_json(tmp_path / "a.json")
    with pytest.raises(NotJsonError, match="it is a folder"):
        read_json(tmp_path)
    with pytest.raises(NotJsonError, match="larger than 48 MB"):
        read_json(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_long_text_is_shown_by_its_ends() -> None:
    assert shortened("a" * 200) == "a" * 200
    assert shortened("a" * 500 + "b" * 500, 20) == "a" * 10 + " ... " + "b" * 10
