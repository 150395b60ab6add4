"""Declares the CUDA extension where it is asked for; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from build_backend import cuda_setup

setup(**cuda_setup())
