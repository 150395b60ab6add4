"""Tables never cut a value: a narrow terminal gets fewer columns."""

from __future__ import annotations

import pytest
from rich.text import Text

from ldmq_kernels.cli.fitted import PIPED_WIDTH, Column, output_console, print_fitted

COLUMNS = (
    Column("shape", is_number=False),
    Column("ms"),
    Column("TOPS", rank=2),
    Column("p20 ms", rank=3),
    Column("noise", rank=1),
)
ROWS = (("4096x1280x1280", "0.0123", "1234.5", "0.0121", "1.2 %"), ("77x640x2048", "12.3", "-", "11.9", "10.2 %"))


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> tuple[str, tuple[str, ...]]:
    monkeypatch.setenv("COLUMNS", str(width))
    left_out = print_fitted(output_console(), "products", COLUMNS, ROWS)
    return capsys.readouterr().out, left_out


@pytest.mark.parametrize("width", range(10, 80))
def test_at_any_width_what_is_shown_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    out, left_out = printed(monkeypatch, capsys, width)
    shown = [column for column in COLUMNS if column.title not in left_out]
    assert "…" not in out
    for row in ROWS:
        assert all(cell in out for cell, column in zip(row, COLUMNS, strict=True) if column in shown)
    if width >= 40:
        assert max(map(len, out.splitlines())) <= width


def test_the_column_of_the_highest_rank_goes_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(dict.fromkeys(printed(monkeypatch, capsys, width)[1] for width in range(60, 25, -1)))
    assert found == [(), ("p20 ms",), ("TOPS", "p20 ms"), ("TOPS", "p20 ms", "noise")]


def test_below_the_least_width_every_value_has_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, left_out = printed(monkeypatch, capsys, 20)
    assert left_out == ()
    assert "TOPS 1234.5\n" in out
    assert "shape 77x640x2048\n" in out


def test_a_pipe_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_console().width == PIPED_WIDTH


def test_a_text_wraps_and_the_numbers_beside_it_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    columns = (Column("op", is_number=False), Column("reason", is_number=False, wraps=True), Column("gain"))
    reason = "refuses 3 of 6 shapes: channels must be a multiple of 16 and [a] bracket stays"
    print_fitted(output_console(), "ops", columns, [("group_norm_silu_quantize", Text(reason, "yellow"), "1.23x")])
    out = capsys.readouterr().out
    assert "1.23x" in out
    words = " ".join(out.split()).replace("1.23x ", "")
    assert max(map(len, out.splitlines())) <= 60
    assert all(word in words for word in reason.split())
