"""A small pipeline directory, prompts and a plan of its UNet, for the tests of the command line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from python_tests.tiny import PROMPTS, SHALLOW, mixed_plan, tiny_pipeline, tiny_unet


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory, stored in float16."""
    root = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline(root / "tokenizer", **SHALLOW)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.float16)
    pipe.save_pretrained(root / "tiny")
    return root / "tiny"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    return file


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    mixed_plan(tiny_unet(**SHALLOW)).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """No command leaves its handler in the process that calls it, however the command ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True)
def _no_pictures_by_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor's pictures take seconds; test_batches draws them."""
    monkeypatch.setattr("ldmq_kernels.cli.checks.check_batches", lambda _: (True, "not drawn here"))
