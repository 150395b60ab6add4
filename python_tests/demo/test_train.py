"""A training that was stopped goes on to where an uninterrupted one ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldmq_kernels.demo import train


def _fit(work: Path, *, stop_at: int | None = None, steps: int = 7) -> tuple[nn.Module, nn.Module]:
    """A small model and its moving average after `steps`, trained by the script's own loop."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3))
    average = copy.deepcopy(model).requires_grad_(False)

    def loss_of(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        random = train.generator(step)
        x = torch.randn(8, 6, generator=random)
        return (model(x).float() - x[:, :3]).square().mean()

    def after_step() -> None:
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.lerp_(new.detach(), 0.1)

    train.fit("small", model, loss_of, steps=steps, learning_rate=1e-2, work=work, after_step=after_step, extra=average)
    return model, average


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_stopping_anywhere_changes_nothing(stop_at: int, tmp_path: Path) -> None:
    whole = _fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _fit(tmp_path / "stopped", stop_at=stop_at)
    resumed = _fit(tmp_path / "stopped")
    for one, other in zip(whole, resumed, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_finished_stage_trains_no_further(tmp_path: Path) -> None:
    first, _ = _fit(tmp_path)
    again, _ = _fit(tmp_path, stop_at=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fit(tmp_path, steps=2)
    before = (tmp_path / "small.pt").read_bytes()

    def cut(_state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match="disk full"):
        _fit(tmp_path, steps=4)
    assert (tmp_path / "small.pt").read_bytes() == before


def test_batches_follow_from_the_step_alone() -> None:
    captions, drawn = train.scenes_of_step(8, 11)
    assert (captions, drawn) == train.scenes_of_step(8, 11)
    assert captions != train.scenes_of_step(8, 12)[0]


def test_a_folder_of_the_users_is_not_replaced_by_the_trained_model(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        train.export(tmp_path / "work", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "mine"
