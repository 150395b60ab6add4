"""Which tile a product takes, and whether the extension serves a GPU at all."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch

from ldmq_kernels import ops
from ldmq_kernels.kernels.cuda import extension, tiles
from python_tests.gpu import small_calls
from python_tests.kernels import chosen_tiles
from python_tests.kernels.cuda.emulation import emulate
from python_tests.kernels.cuda.gemm_cases import NAMES

CPU = torch.device("cpu")


def test_a_cluster_of_an_int4_product_stands_side_by_side(device: torch.device) -> None:
    """It pairs output channels: two columns of tiles take as long as one, and rows are not rounded up to pairs."""
    gpu = tiles.Gpu("", 90, 2)
    tile = tiles.Tile(0, "linear_w4a8", 90, 160, 128, 128, 7, 2, True)
    times = [tiles.estimate(tile, 160, columns, 1280, gpu) for columns in (128, 256, 384)]
    assert times[0] == times[1] < times[2]
    assert tiles.estimate(tile, 320, 128, 1280, gpu) > times[0]
    plain = tile._replace(op="linear_w8a8")
    assert tiles.estimate(plain, 160, 128, 1280, gpu) == tiles.estimate(plain, 320, 128, 1280, gpu)


def test_a_step_has_channels_of_one_tap(device: torch.device) -> None:
    gpu = tiles.Gpu("", 90, 132)
    tile = tiles.Tile(0, "conv2d_w8a8", 90, 128, 160, 128, 6, 2, False)
    nine = tiles.estimate(tile, 4096, 320, 9 * 320, gpu, taps=9)
    assert nine == tiles.estimate(tile, 4096, 320, 9 * 384, gpu)
    assert nine > tiles.estimate(tile, 4096, 320, 9 * 320, gpu)


def test_sums_of_fp8_are_promoted_behind_the_other_warpgroups_products_if_those_last_long_enough() -> None:
    short = tiles.Tile(0, "linear_fp8", 90, 128, 160, 64, 10, 2, True)
    long, small = short._replace(k=128), short._replace(n=64, k=128, cluster=1)
    for tile, waits in ((short, True), (long, False), (small, False)):
        of_int8 = tiles.step_clocks(tile._replace(op="linear_w8a8"), 4096)
        assert (tiles.step_clocks(tile, 4096) > of_int8) == waits


@pytest.mark.parametrize(
    ("driver", "built", "runs"), [(13000, 13000, True), (13020, 13000, True), (12080, 13000, False), (0, 12060, False)]
)
def test_a_driver_older_than_the_build_is_left_to_the_next_backend(
    monkeypatch: pytest.MonkeyPatch, driver: int, built: int, runs: bool
) -> None:
    module = SimpleNamespace(versions=lambda: (driver, built), architectures=lambda: "80;90a")
    monkeypatch.setattr(extension, "load", lambda: module)
    extension.runs_on.cache_clear()
    with contextlib.nullcontext() if runs else pytest.warns(UserWarning, match="serves CUDA .*the next backend"):
        assert extension.runs_on((8, 0)) == runs
    extension.runs_on.cache_clear()


def test_the_least_estimate_fills_the_gpu(device: torch.device) -> None:
    """A few rows take small tiles, so that every multiprocessor has one; many take large ones that share loads."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the figures are Hopper's")
    small = tiles.candidates("linear_w8a8", 512, 1280, 1280, device)[0]
    large = tiles.candidates("linear_w8a8", 8192, 8192, 8192, device)[0]
    assert small.m * small.n < 128 * 160
    assert large.m * large.n >= 128 * 160
    assert large.cluster == 2


def test_one_wave_is_stored_by_all_threads_and_of_many_waves_one_is_stored_behind_the_next(
    device: torch.device,
) -> None:
    """Two warpgroups in turns store while they multiply, and the last tile by one of them alone."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the figures are Hopper's")
    one_wave = tiles.candidates("linear_w8a8", 2048, 1280, 1280, device)[0]
    many_waves = tiles.candidates("linear_w8a8", 2048, 10240, 1280, device)[0]
    assert one_wave.name == "sm90 128x160x128x6 cooperative cluster 2"
    assert many_waves.name == "sm90 128x160x128x6 cluster 2"


def test_the_models_take_the_tiles_that_they_took_before(device: torch.device) -> None:
    assert chosen_tiles.differences(chosen_tiles.by_cuda(), "cuda") == []


def test_the_sanitizer_watches_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    watched = []
    for op in NAMES:
        call = functools.partial(lambda op, *_: watched.append((op, tiles.choose(op, 64, 64, 64, CPU).name)), op)
        monkeypatch.setattr(ops, op, call)
    small_calls.run_tiles(CPU)
    wanted = [(op, name) for op, names in NAMES.items() for name in names]
    wanted += [(op, f"{name} split-K 2") for op, name in wanted if op.startswith("conv2d")]
    assert sorted(watched) == sorted(wanted)
