"""A model's float32 products are computed in tiles where they are the model's, large, and not differentiated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ldmq_kernels.calibration import SamplingSettings, calibrate, in_tiles
from ldmq_kernels.kernels.cpu import float_products
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.sensitivity.output_noise import output_noise
from python_tests.tiny import PROMPTS, tiny_unet, unet_inputs

pytestmark = pytest.mark.skipif(not float_products.serves(), reason="float32 is multiplied in tiles where there is AMX")


@pytest.fixture(autouse=True)
def no_model_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_tiles, "LARGE_MODEL", 0)
    monkeypatch.setattr(in_tiles, "LEAST_WORK", 1)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was multiplied in tiles: "linear" or "conv2d" for each product."""
    found: list[str] = []
    for name in ("linear", "conv2d"):
        original = getattr(float_products, name)

        def multiply(*arguments: object, name: str = name, original: object = original) -> Tensor:
            found.append(name)
            return original(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(float_products, name, multiply)
    return found


def test_a_unet_gives_what_torch_gives(multiplied: list[str]) -> None:
    unet, inputs = tiny_unet(), unet_inputs()
    with torch.no_grad():
        exact = unet(**inputs).sample
        assert not multiplied
        with in_tiles.in_tiles(unet) as tiles:
            assert torch.equal(unet(**inputs).sample, exact)  # not inside the inner block
            with tiles:
                found = unet(**inputs).sample
    assert {"linear", "conv2d"} == set(multiplied)
    assert not torch.equal(found, exact)
    assert sqnr_db(exact, found) > 85
    assert not in_tiles._held


def test_a_trajectory_and_its_replay_have_the_same_bits(shallow_pipe: object, multiplied: list[str]) -> None:
    settings = SamplingSettings(num_inference_steps=2, guidance_scale=4.0)
    calibration = calibrate(shallow_pipe, PROMPTS, settings)
    count = len(multiplied)
    assert count > 0
    assert output_noise(shallow_pipe.unet, calibration.trajectory).mean_power == 0  # type: ignore[attr-defined]
    assert len(multiplied) > count


def test_gradients_other_weights_and_other_dtypes_are_torchs(multiplied: list[str]) -> None:
    linear, x = nn.Linear(64, 32), torch.randn(40, 64)
    with in_tiles.in_tiles(linear) as tiles, tiles:
        linear(x).sum().backward()
        assert linear.weight.grad is not None
        with torch.no_grad():
            functional.linear(x, torch.randn(32, 64), None)
            with pytest.raises(RuntimeError):
                linear(x[:, :62])
            with pytest.raises(RuntimeError):
                linear(x.bfloat16())
            linear(x[:3])  # fewer rows than a tile has
        assert not multiplied
        with torch.no_grad():
            linear(x)
        assert multiplied == ["linear"]


def test_blocks_of_one_model_share_what_is_packed_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x, packed = nn.Linear(64, 32).requires_grad_(False), torch.randn(40, 64), []
    original = float_products.pack
    monkeypatch.setattr(float_products, "pack", lambda weight: packed.append(weight) or original(weight))
    with in_tiles.in_tiles(linear) as outer:
        for _ in range(2):
            with torch.no_grad(), in_tiles.in_tiles(linear) as tiles, tiles:
                linear(x)
            assert tiles is outer
    assert len(packed) == 1
    with torch.no_grad(), in_tiles.in_tiles(linear) as tiles, tiles:
        linear(x)
    assert len(packed) == 2


def test_a_weight_that_is_written_to_is_packed_anew() -> None:
    linear, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(40, 64)
    with torch.no_grad(), in_tiles.in_tiles(linear) as tiles:
        for _ in range(2):
            wanted = linear(x)
            with tiles:
                assert sqnr_db(wanted, linear(x)) > 85
            linear.weight.add_(1)


def test_what_finds_no_room_and_small_models_are_torchs(multiplied: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False), torch.randn(40, 64)
    monkeypatch.setattr(in_tiles, "ROOM", float_products.packed_bytes(model[0].weight))
    with torch.no_grad(), in_tiles.in_tiles(model) as tiles, tiles:
        model(x)
    assert multiplied == ["linear"]
    monkeypatch.setattr(in_tiles, "LARGE_MODEL", 10**6)
    with torch.no_grad(), in_tiles.in_tiles(model) as tiles, tiles:
        model(x)
    assert multiplied == ["linear"]


def test_a_model_of_other_weights_is_left_to_torch_alone() -> None:
    for model in (nn.Linear(64, 32).bfloat16(), nn.Linear(64, 32, device="meta")):
        with in_tiles.in_tiles(model) as tiles:
            assert not isinstance(tiles, TorchFunctionMode)


def test_a_convolutions_output_lies_in_memory_as_torchs(multiplied: list[str]) -> None:
    conv, x = nn.Conv2d(8, 16, 3, padding=1).requires_grad_(False), torch.randn(2, 8, 9, 7)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad(), in_tiles.in_tiles(conv) as tiles:
            wanted = conv(given)
            with tiles:
                found = conv(given)
        assert found.stride() == wanted.stride()
    assert multiplied == ["conv2d"] * 2


def test_autocast_and_inputs_elsewhere_are_torchs(multiplied: list[str]) -> None:
    linear, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(40, 64)
    with torch.no_grad(), in_tiles.in_tiles(linear) as tiles, tiles:
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            linear(x.to("meta"))
        linear(x.as_subclass(type("Own", (Tensor,), {})))
    assert not multiplied
