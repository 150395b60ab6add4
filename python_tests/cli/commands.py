"""Commands run in this process, and what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldmq_kernels import cli


def run(*arguments: object) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """What the last command wrote to standard error: one line."""
    text = capsys.readouterr().err.strip()
    assert text.startswith("ldmq: ")
    assert len(text.splitlines()) == 1
    return text


def what_is_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
