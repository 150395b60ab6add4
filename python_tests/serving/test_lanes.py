"""How a lane draws with less memory."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmq_kernels.serving.app import make_app
from ldmq_kernels.serving.drawing import Lane
from ldmq_kernels.serving.metrics import Metrics, exposition
from ldmq_kernels.serving.tasks import Key, Task
from python_tests.serving.served import GENERATIONS, client_of, settings_of

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


def test_memory_that_ends_within_a_batch_changes_no_picture(shared_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [drawn(Lane({"tiny": shared_pipe}), seeds=(seed,))[0] for seed in range(4)]
    forward, steps = shared_pipe.unet.forward, []

    def ends_at_the_second_step(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 4:  # with and without the prompt: more than two pictures
            steps.append(len(sample))
            if len(steps) == 2:
                raise torch.OutOfMemoryError("pretended")
        return forward(sample, *args, **kwargs)

    app = make_app(settings_of("tiny", guidance=4.0, limits={"batch_wait_s": 0.5}), lambda *_: {"tiny": shared_pipe})

    async def work() -> None:
        async with client_of(app) as client:
            monkeypatch.setattr(shared_pipe.unet, "forward", ends_at_the_second_step)
            body = {"prompt": "a cat", "size": "16x16"}
            answers = await asyncio.gather(*(client.post(GENERATIONS, json=body | {"seed": s}) for s in range(4)))
            for answer, picture in zip(answers, alone, strict=True):
                data = base64.b64decode(answer.json()["data"][0]["b64_json"])
                np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)
            assert "ldmq_batches_halved_total 1.0" in (await client.get("/metrics")).text

    asyncio.run(work())
    assert steps == [8, 8]
