"""`ldmq doctor` draws pictures alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmq_kernels.cli import batches


@pytest.mark.slow
def test_pictures_of_the_demo_model_are_the_same_in_a_batch() -> None:
    is_equal, line = batches.check_batches(torch.device("cpu"))
    assert is_equal, line
    assert "equal to the bit" in line


def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldmq_kernels.integrations.diffusers import batch_invariance

    def other(draw: Any, counts: Any) -> Any:
        return batch_invariance.Variance(3, 1, 0.25)

    monkeypatch.setattr(batch_invariance, "find_variance", other)
    is_equal, line = batches.check_batches(torch.device("cpu"))
    assert not is_equal
    assert "differs in a batch of 3 on cpu by 0.25" in line
