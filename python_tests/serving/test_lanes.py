"""How a lane draws with less memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ldmq_kernels.serving.drawing import Lane
from ldmq_kernels.serving.metrics import Metrics, exposition
from ldmq_kernels.serving.tasks import Key, Task

KEY = Key("tiny", "text", 16, 16, 2, 4.0, False)


def drawn(lane: Lane, key: Key = KEY, seeds: tuple[int, ...] = (0,)) -> list[np.ndarray]:
    tasks: list[Any] = [Task(key, "a cat", "", seed, None) for seed in seeds]  # type: ignore[arg-type]
    return [np.asarray(picture) for picture in lane.draw(tasks, lambda: None, lambda *_: None)]


def test_a_picture_that_does_not_fit_is_decoded_in_tiles(shared_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    lane = Lane({"tiny": shared_pipe}, metrics)
    (before,) = drawn(lane)
    decode = shared_pipe.vae.decode

    def needs_tiles(*args: Any, **kwargs: Any) -> Any:
        if not shared_pipe.vae.use_tiling:
            raise torch.OutOfMemoryError("pretended")
        return decode(*args, **kwargs)

    monkeypatch.setattr(shared_pipe.vae, "decode", needs_tiles)
    np.testing.assert_array_equal(drawn(lane)[0], before)
    assert b"ldmq_tiled_decodes_total 1.0" in exposition(metrics.families())
    assert not shared_pipe.vae.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        drawn(lane, seeds=(0, 1))
