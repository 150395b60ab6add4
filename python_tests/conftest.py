"""Fixtures that several rooms share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which diffusers does

# python_tests.tiny imports diffusers, which a machine for kernels alone may lack: the fixtures import it


@pytest.fixture(scope="session")
def shared_pipe(tmp_path_factory):
    """One tiny float pipeline for tests that leave it as it is."""
    from python_tests.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pipe(tmp_path):
    """A tiny float pipeline of the test's own."""
    from python_tests.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path / "tokenizer")
