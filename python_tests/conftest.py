"""Fixtures that several folders share."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch

from python_tests.gpu_faults import pytest_runtest_protocol as pytest_runtest_protocol

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which diffusers does

os.environ.pop("COLUMNS", None)  # of a terminal, or 80 from pytest-xdist: what is printed is as wide as in a pipe

if "LDMQ_CACHE" not in os.environ:  # what a user measured or switched off on this machine is no part of the tests
    os.environ["LDMQ_CACHE"] = tempfile.mkdtemp(prefix="ldmq-cache-")
    atexit.register(shutil.rmtree, os.environ["LDMQ_CACHE"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of oneDNN's int8 products where these saturate; test_self_check says where they must not."""
    if item.get_closest_marker("needs_exact_onednn"):
        from ldmq_kernels.kernels.cpu.self_check import is_exact

        if not is_exact():
            pytest.skip("oneDNN's int8 products are not exact on this processor")


# python_tests.tiny imports diffusers, which a machine for kernels alone may lack: the fixtures import it


@pytest.fixture(scope="session")
def shared_pipe(tmp_path_factory):
    """One tiny float pipeline for tests that leave it as it is."""
    from python_tests.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def shallow_pipe(tmp_path_factory):
    """One float pipeline with few layers, for tests that analyse it and leave it as it is."""
    from python_tests.tiny import SHALLOW, tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), **SHALLOW)


@pytest.fixture
def pipe(tmp_path):
    """A tiny float pipeline of the test's own."""
    from python_tests.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path / "tokenizer")


@pytest.fixture
def as_unfused(monkeypatch):
    """A CPU whose fused ops are those of the unfused layers one after the other, so that their bits can be compared.

    Its own ops compute in float32 throughout: a value that they round to the other side changes all that follow.
    """
    from ldmq_kernels.kernels.cpu import backend, compiled_producers

    monkeypatch.setattr(compiled_producers, "takes", lambda *_: False)
    has = type(backend).has
    monkeypatch.setattr(type(backend), "has", lambda self, op: op != "linear_geglu_w8a8" and has(self, op))
