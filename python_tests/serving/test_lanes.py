"""How a lane draws: with an adapter for one request, and with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.serving.drawing import Lane
from ldmq_kernels.serving.loading import load
from ldmq_kernels.serving.metrics import Metrics
from ldmq_kernels.serving.settings import ServedModel, ServerSettings
from ldmq_kernels.serving.tasks import Key, Task
from python_tests.integrations.test_lora import add_adapter
from python_tests.tiny import tiny_pipeline

peft = pytest.importorskip("peft")
KEY = Key("tiny", "text", 16, 16, 2, 4.0, False)


def drawn(lane: Lane, key: Key = KEY, seeds: tuple[int, ...] = (0,)) -> list[np.ndarray]:
    tasks: list[Any] = [Task(key, "a cat", "", seed, None) for seed in seeds]  # type: ignore[arg-type]
    return [np.asarray(picture) for picture in lane.draw(tasks, lambda: None, lambda *_: None)]


def test_an_adapter_is_for_the_requests_that_name_it(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path / "tokenizer")
    layers = peft.get_peft_model_state_dict(add_adapter(pipe.unet), adapter_name="style")
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    plain = tiny_pipeline(tmp_path / "tokenizer")
    ldmq.quantize(plain, scheme="w8a8-dynamic").save_pretrained(tmp_path / "tiny")
    settings = ServerSettings([ServedModel(tmp_path / "tiny", "tiny")], loras={"style": tmp_path / "lora"})
    lane = Lane(load(settings, "cpu"))
    (before,) = drawn(Lane({"tiny": plain}))
    styled = Key(**(vars(KEY) | {"lora": ("style", 1.0)}))
    weaker = Key(**(vars(KEY) | {"lora": ("style", 0.5)}))
    with_it, with_less = drawn(lane, styled)[0], drawn(lane, weaker)[0]
    assert (with_it != before).any()
    assert (with_it != with_less).any()
    np.testing.assert_array_equal(drawn(lane)[0], before)


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
    assert b"ldmq_tiled_decodes_total 1.0" in metrics.text()
    assert not shared_pipe.vae.use_tiling
    with pytest.raises(torch.OutOfMemoryError):
        drawn(lane, seeds=(0, 1))
