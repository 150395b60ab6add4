"""What the package does without its extras, and how it asks for one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldmq_kernels.extras import EXTRA_OF

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldmq_kernels"
CORE = {"numpy", "safetensors", "torch", "wrapt"}
DISTRIBUTION = {"PIL": "pillow"}
BARE = f"import sys; sys.modules |= dict.fromkeys({sorted(EXTRA_OF)!r}); import torch, ldmq_kernels as ldmq; "


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where none of the extras' libraries can be imported."""
    return subprocess.run([sys.executable, "-c", BARE + code], cwd=ROOT, capture_output=True, text=True, check=False)


def third_party_imports() -> Iterator[tuple[Path, str]]:
    """Every library that a file of the package imports, at its top or within a function."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                library = name.partition(".")[0]
                if library not in sys.stdlib_module_names | {"__future__", "ldmq_kernels"}:
                    yield path.relative_to(ROOT), library


@pytest.mark.slow
def test_the_core_quantizes_a_model_without_any_extra() -> None:
    run = bare(
        "import ldmq_kernels.nn; from ldmq_kernels.plans.plan import uniform_plan; "
        "model = torch.nn.Sequential(torch.nn.Linear(8, 4)); "
        "ldmq.quantize(model, uniform_plan(model, 'w8a8-dynamic')); "
        "print(type(model[0]).__name__, model(torch.ones(2, 8)).shape)"
    )
    assert run.stdout.strip() == "QuantLinear torch.Size([2, 4])", run.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ldmq.plan", "ldmq_kernels.plan needs scipy, which is not installed: pip install 'ldmq_kernels[plan]'"),
        ("ldmq.Plan.from_dict({'ldmq_plan': 3})", "reading a plan needs jsonschema, which is not installed"),
        ("from ldmq_kernels.__main__ import main; main()", "the command ldmq needs"),
    ],
)
def test_what_needs_an_extra_names_it(code: str, said: str) -> None:
    run = bare(code)
    assert run.returncode != 0
    assert said in run.stderr.splitlines()[-1]


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert {line.partition(">")[0] for line in project["dependencies"]} == CORE
    for library, extra in EXTRA_OF.items():
        declared = {re.split(r"[\[>]", line)[0].replace("-", "_") for line in extras[extra]}
        assert DISTRIBUTION.get(library, library) in declared, library
    optional = {"triton", "tokenizers"}  # torch brings the first where there is a GPU, transformers the second
    optional |= {"pydantic", "starlette"}  # fastapi is made of both, and shows its users their classes
    optional |= {"sglang", "vllm", "vllm_omni"}  # which call this package
    unknown = {(str(path), name) for path, name in third_party_imports() if name not in CORE | optional | set(EXTRA_OF)}
    assert not unknown
