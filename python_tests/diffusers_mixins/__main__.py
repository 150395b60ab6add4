"""Runs them, and ends with 1 where one fails."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest


def main() -> int:
    """Find the tests of the models that are asked for, and hand them to pytest."""
    parser = argparse.ArgumentParser(prog="python -m python_tests.diffusers_mixins", description=__doc__)
    parser.add_argument("tests", type=Path, help="the folder `tests` of a checkout of diffusers")
    parser.add_argument("--model", action="append", default=[], help="only test files whose name holds this text")
    options, more = parser.parse_known_args()
    tests = options.tests.resolve()
    if not (tests / "models/testing_utils/quantization.py").is_file():
        parser.error(f"{tests} has no models/testing_utils/quantization.py: give the folder `tests` of a checkout")
    files = sorted((tests / "models").glob("*/test_models_*.py"))
    wanted = [str(file) for file in files if not options.model or any(text in file.name for text in options.model)]
    if not wanted:
        parser.error(f"no test file has {' or '.join(options.model)} in its name: {', '.join(f.stem for f in files)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DIFFUSERS_TEST_DEVICE", "cpu")
    os.chdir(tests.parent)
    plain = ["-p", "python_tests.diffusers_mixins.plugin", "-p", "no:cacheprovider", "--rootdir", str(tests.parent)]
    return int(pytest.main([*plain, "-q", "-rf", "--tb=line", "--no-header", "-n0", *more, *wanted]))


if __name__ == "__main__":
    sys.exit(main())
