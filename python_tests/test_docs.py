"""What the texts promise is there: links lead somewhere, commands exist, code compiles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md", ROOT / "csrc/README.md"]
)
NAMES = [str(path.relative_to(ROOT)) for path in TEXTS]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"^ *```python\n(.*?)```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", NAMES)
def test_every_link_within_the_project_leads_to_a_file(text: str) -> None:
    path = ROOT / text
    links = [link for link in LINK.findall(path.read_text()) if not link.startswith(("http:", "https:"))]
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("text", NAMES)
def test_python_in_a_text_compiles(text: str) -> None:
    for code in CODE.findall((ROOT / text).read_text()):
        ast.parse(textwrap.dedent(code))


def test_the_readme_fits_a_screen_or_two() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_make_targets_in_the_texts_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {name for text in TEXTS for name in re.findall(r"(?:^    |`)make ([\w-]+)", text.read_text(), re.MULTILINE)}
    assert asked
    assert asked <= targets


def test_commands_and_options_in_the_texts_exist() -> None:
    asked: dict[str, set[str]] = {}
    for text in TEXTS:
        for command, rest in re.findall(r"(?:^    |`)ldmq (\w+)([^`\n#]*)", text.read_text(), re.MULTILINE):
            asked.setdefault(command, set()).update(re.findall(r"--[\w-]+", rest))
    assert {"plan", "quantize", "analyze", "doctor", "bench"} <= set(asked)
    for command, options in asked.items():
        shown = subprocess.run(
            [sys.executable, "-m", "ldmq_kernels", command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "300", "PATH": ""},
        )
        assert not [option for option in options if option not in shown.stdout], command
