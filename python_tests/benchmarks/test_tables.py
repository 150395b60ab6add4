"""The pages hold what the results files give, and no command is without its words."""

from __future__ import annotations

import importlib
import json

import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.commands import tables
from benchmarks.harness import results


def test_the_page_is_what_the_results_files_give() -> None:
    assert tables.PAGE.read_text() == tables.page(), "run `python -m benchmarks tables`"


def test_the_readme_holds_the_newest_figures() -> None:
    readme = tables.README.read_text()
    assert readme == tables.with_table(readme, tables.readme_table()), "run `python -m benchmarks tables`"


def test_the_page_of_models_holds_the_newest_matrix_and_pictures() -> None:
    page = tables.MODELS.read_text()
    assert page == tables.models_page(page), "run `python -m benchmarks tables`"


def test_every_results_file_is_on_the_page() -> None:
    page = tables.page()
    for (what, _), path in results.newest().items():
        assert f"]({'../'}{path.relative_to(results.ROOT)})" in page, what
        assert "| --- |" in tables.table_of(what)(json.loads(path.read_text()))


def test_every_kind_has_an_owner_with_a_table() -> None:
    for what in tables.OWNERS:
        assert callable(tables.table_of(what))


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="put <!-- measured --> and <!-- /measured --> around it"):
        tables.with_table("# a page", "| |")


def test_every_command_starts_and_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    for name, (module, words) in COMMANDS.items():
        assert f"  {name} " in usage
        assert words in usage
        assert callable(importlib.import_module(module).main)
    assert main([]) == 2
    assert main(["measure"]) == 2
    assert "there is no command measure" in capsys.readouterr().err
