"""The second model: what it is trained on is what its pipeline asks for, and the study takes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import ldmq_kernels as ldmq
from benchmarks.study import cases, second_model
from benchmarks.study.evaluation import with_unet
from benchmarks.study.second_model import models, train
from benchmarks.study.subjects import DEMO, SECOND
from ldmq_kernels.calibration.denoisers import denoiser
from ldmq_kernels.calibration.settings import SamplingSettings
from ldmq_kernels.calibration.trajectory import Trajectory, record_trajectory
from ldmq_kernels.conversion import quantize
from ldmq_kernels.demo import scenes
from ldmq_kernels.demo import train as demo_train
from ldmq_kernels.plans.layers import quantizable_layers

SAMPLING = SamplingSettings(2, 3.0, 0)
COUNT = 2 * train.AT_ONCE


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    return models.build_pipeline(models.build_transformer().eval())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the latents of a few scenes."""
    folder = tmp_path_factory.mktemp("work")
    train.encoded(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def trajectory(pipe: Any) -> Trajectory:
    captions, _ = demo_train.scenes_of_step(train.AT_ONCE, train.FIRST_SCENE)
    return record_trajectory(pipe, captions[:2], SAMPLING)


def test_it_draws_what_it_was_told_from_random_weights(pipe: Any) -> None:
    def draw(caption: str) -> Tensor:
        random = torch.Generator().manual_seed(0)
        return pipe(caption, num_inference_steps=1, guidance_scale=3.0, generator=random, output_type="pt").images

    first, second = draw("a small red circle in the centre"), draw("a large blue square in the centre")
    assert first.shape == (1, 3, 128, 128)
    assert not torch.equal(first, second)


def test_it_is_trained_on_what_the_pipeline_gives_it(work: Path, trajectory: Trajectory) -> None:
    data = train.encoded(work, COUNT)
    call = trajectory.calls[0].kwargs
    for key, empty, given in (
        ("states", "no_states", call["encoder_hidden_states"]),
        ("pooled", "no_pooled", call["pooled_projections"]),
    ):
        assert torch.equal(data[key][:2], given[2:].to(torch.bfloat16))
        assert torch.equal(data[empty][0], given[0].to(torch.bfloat16))
    assert 0.8 < float(data["latents"].std()) < 1.2


def test_latents_of_enlarged_scenes_decode_to_them(pipe: Any, work: Path) -> None:
    data = train.encoded(work, COUNT)
    _, drawn = demo_train.scenes_of_step(train.AT_ONCE, train.FIRST_SCENE)
    pictures = scenes.render(drawn, demo_train.generator(train.FIRST_SCENE), second_model.ENLARGED)
    with torch.no_grad():
        restored = pipe.vae.decode(data["latents"][:1] / pipe.vae.config.scaling_factor).sample
    assert float((restored - pictures[:1]).square().mean()) < 4e-3  # 30 dB, where a picture's range is 2


def test_noise_levels_are_shifted_as_the_schedulers() -> None:
    random = torch.Generator().manual_seed(1)
    plain = (train.SPREAD * torch.randn(500, generator=random)).sigmoid()
    scheduler = models.build_scheduler()
    scheduler.set_timesteps(sigmas=plain.sort(descending=True).values.tolist())
    levels = train.noise_levels(500, torch.Generator().manual_seed(1)).sort(descending=True).values
    assert torch.allclose(levels, scheduler.sigmas[:-1], atol=1e-6)
    assert torch.allclose(1000 * levels, scheduler.timesteps, atol=1e-3)


def test_training_that_was_stopped_goes_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_train, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(models, "build_transformer", _small_transformer)

    def trained(name: str, *, stop: bool = False) -> dict[str, Tensor]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shutil.copy(work / "latents.pt", folder)
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(train, "noise_levels", _once(train.noise_levels))
            return train.train(folder, 2, COUNT, 2).state_dict()

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", stop=True)
    resumed = trained("stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _small_transformer() -> SD3Transformer2DModel:
    """One block, 16 wide."""
    config = {"num_layers": 2, "num_attention_heads": 1, "attention_head_dim": 16, "caption_projection_dim": 16}
    return SD3Transformer2DModel(**models.TRANSFORMER | config)


def _once(call: Any) -> Any:
    """The function, interrupted when it is called a second time."""
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(*args)

    return interrupted


def test_exported_weights_draw_the_same_pictures(pipe: Any, tmp_path: Path) -> None:
    model = models.build_transformer()
    model.load_state_dict({name: value.half().float() for name, value in pipe.transformer.state_dict().items()})
    train.export(model, tmp_path / "weights")
    loaded = second_model.load_pipeline(torch.float32, tmp_path / "weights").transformer
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())


def test_weights_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"second_model\.train"):
        second_model.load_pipeline(torch.float32, tmp_path)


def test_another_transformer_draws_and_the_first_comes_back(pipe: Any) -> None:
    original, other = pipe.transformer, models.build_transformer()
    assert with_unet(pipe, other, lambda: denoiser(pipe)) is other
    assert pipe.transformer is original
    assert "unet" not in vars(pipe)


def test_a_quantized_transformer_is_saved_and_loaded(pipe: Any, trajectory: Trajectory, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = models.build_pipeline(models.build_transformer().eval())
    quantize(other, scheme="w8a8-dynamic")
    call = trajectory.calls[0]
    with torch.no_grad():
        (made,) = other.transformer(*call.args, **call.kwargs)
        other.transformer.save_pretrained(tmp_path)
        (loaded,) = type(pipe.transformer).from_pretrained(tmp_path)(*call.args, **call.kwargs)
    assert torch.equal(made, loaded)
    assert ldmq.sqnr_db(call.output, made) > 25


def test_cases_of_a_unets_layers_are_not_made_of_a_transformer() -> None:
    of_demo, of_second = ({case.configuration for case in cases.cases(name)} for name in (DEMO, SECOND))
    assert of_second < of_demo
    assert of_demo - of_second == {name for name in of_demo if "first and last convolution" in name}
    layers = list(quantizable_layers(models.build_transformer()))
    (nvidia,) = [skips for skips in cases.SKIP_LISTS if SECOND in skips.models]
    assert any("context_embedder" in name for name in layers)
    assert "*context_embedder*" in nvidia.patterns
