"""Which tile a GEMM takes: by measurement, or else by the estimate over a small table."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ldmq_kernels.kernels import measurements, tile_cost
from ldmq_kernels.kernels.gpu import Gpu, file_name
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.kernels.triton.tile_choice import Problem
from ldmq_kernels.kernels.triton.tile_tables import FAMILIES, TILES, Tile, family
from python_tests.kernels import chosen_tiles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HOPPER = Gpu("NVIDIA H200", 90, 132)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of measured tiles, forgotten afterwards."""
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path))
    monkeypatch.setattr(tile_choice, "gpu_of", lambda _: HOPPER)
    measurements.forget()
    yield tmp_path
    measurements.forget()


def chosen(op: str, *problem: int) -> Tile:
    return tile_choice.choose(op, Problem(*problem), CPU)


@pytest.mark.parametrize("problem", [(2048, 1280, 1280), (8192, 640, 2560), (32768, 320, 2880)])
def test_widths_of_latent_diffusion_take_160_columns_on_132_multiprocessors(problem: tuple[int, ...]) -> None:
    assert chosen("linear_w8a8", *problem).n == 160


@pytest.mark.parametrize("problem", [(128, 1280, 11520), (512, 1280, 11520)])
def test_few_tiles_of_a_long_sum_are_split(problem: tuple[int, ...]) -> None:
    tile = chosen("conv2d_w8a8", *problem)
    assert tile.split_k > 1
    assert tile.programs(*problem[:2]) * tile.split_k <= 2 * HOPPER.multiprocessors


def test_a_long_sum_that_fills_the_gpu_is_not_split() -> None:
    assert chosen("linear_w8a8", 8192, 5120, 640).split_k == 1


@pytest.mark.parametrize("table", [name for name in TILES if "geglu" in name])
def test_tiles_with_gates_have_two_equal_halves_and_whole_sums(table: str) -> None:
    for tiles in TILES[table].values():
        assert all(tile.n in (64, 128, 256) and not tile.splittable and tile.split_k == 1 for tile in tiles)
    problem = (2048, 10240, 1280)
    assert chosen(table, *problem).programs(*problem[:2]) >= HOPPER.multiprocessors


def test_few_rows_take_a_short_tile() -> None:
    assert chosen("linear_w8a8", 2, 1280, 320).m <= 64


def test_persistence_is_chosen_by_measurement_only(own_cache: Path) -> None:
    problem = Problem(8192, 5120, 640)
    tiles = tile_choice.candidates("linear_w8a8", problem, HOPPER)
    persistent = next(tile for tile in tiles if tile.persistent)
    assert not chosen("linear_w8a8", *problem[:3]).persistent
    file = json.dumps({"gpu": HOPPER.name, "tiles": {f"linear_w8a8 {problem}": asdict(persistent)}})
    (own_cache / file_name(HOPPER)).write_text(file)
    measurements.forget()
    assert chosen("linear_w8a8", *problem[:3]) == persistent
    assert chosen("linear_w8a8", 8192, 5120, 1280) != persistent


def test_a_file_in_the_words_of_an_earlier_version_is_read(own_cache: Path) -> None:
    sizes = {"rows": 64, "columns": 128, "depth": 32, "warps": 4, "stages": 3, "share": 0.7, "splits": 2}
    fields = sizes | {"splittable": True, "persistent": False, "transposed": False}
    tiles = {"linear_w8a8 8192x5120x640": fields, "conv2d_w8a8 pointers 25x8x36": fields}
    (own_cache / file_name(HOPPER)).write_text(json.dumps({"gpu": HOPPER.name, "tiles": tiles}))
    measurements.forget()
    tile = Tile(64, 128, 32, 4, 3, efficiency=0.7, split_k=2, splittable=True)
    assert chosen("linear_w8a8", 8192, 5120, 640) == tile
    assert chosen("conv2d_w8a8 gather", 25, 8, 36) == tile


def test_the_models_take_the_tiles_that_they_took_before() -> None:
    assert chosen_tiles.differences(chosen_tiles.by_triton(), "triton") == []


RIGHT = {"m": 64, "n": 64, "k": 64, "warps": 4, "stages": 2}
WRONG = [
    *({"warps": wrong} for wrong in ("", 3, 0)),
    *({"m": wrong} for wrong in (0, -64, None)),
    *({"n": wrong} for wrong in (10**9, [64])),
    *({"stages": wrong} for wrong in (10**4, True)),
    *({"k": 64.0}, {"split_k": 0}, {"efficiency": -1}, {"persistent": "yes"}, {"splittable": 1}, {"ctas": 0}),
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_tile_that_no_kernel_takes_is_damage(own_cache: Path, change: dict) -> None:
    (own_cache / file_name(HOPPER)).write_text(json.dumps({"tiles": {"linear_w8a8 1x1x1": RIGHT | change}}))
    measurements.forget()
    with pytest.raises(ValueError, match=rf"nvidia-h200\.json is damaged .*{next(iter(change))}.*--tune"):
        chosen("linear_w8a8", 8192, 5120, 640)


def test_every_tile_of_the_tables_may_be_read_from_a_file() -> None:
    tiles = [tile for table in TILES.values() for of_family in table.values() for tile in of_family]
    assert all(tile_choice.tile_of(asdict(tile)) == tile for tile in tiles)
    assert tile_choice.tile_of(RIGHT) == Tile(64, 64, 64, 4, 2)


@pytest.mark.parametrize("content", ["", "{}", '{"tiles": {"a": {"rows": 1}}}', '{"tiles": [1]}', "[" * 10**5])
def test_a_damaged_file_says_what_to_do(own_cache: Path, content: str) -> None:
    (own_cache / file_name(HOPPER)).write_text(content)
    measurements.forget()
    with pytest.raises(ValueError, match=r"nvidia-h200\.json is damaged .*--tune"):
        chosen("linear_w8a8", 8192, 5120, 640)


def test_a_forced_tile_is_taken_inside_its_block_only() -> None:
    tile = Tile(64, 64, 64, 4, 2)
    before = chosen("linear_w8a8", 8192, 5120, 640)
    with tile_choice.forced(tile):
        assert chosen("linear_w8a8", 8192, 5120, 640) is tile
    assert chosen("linear_w8a8", 8192, 5120, 640) == before


def test_every_op_has_candidates_on_every_family_for_every_size() -> None:
    gpus = [Gpu("", capability, 100) for capability in (80, 86, 89, 90, 100, 120)]
    assert {family(gpu.capability) for gpu in gpus} == set(FAMILIES)
    for op, table in TILES.items():
        is_tma_tiled = op in ("conv2d_w8a8", "conv2d_fp8", "conv2d_w4a8", "conv2d_w8a16")
        assert set(table) == set(FAMILIES) - ({"80"} if is_tma_tiled else set())
        for gpu in gpus[is_tma_tiled:]:
            for problem in (Problem(1, 1, 1), Problem(10**6, 10240, 23040), Problem(77, 4, 2880, groups=3)):
                tiles = [t for t in tile_choice.candidates(op, problem, gpu) if not t.persistent]
                assert tiles
                assert all(tile_choice.estimate(tile, problem, gpu) > 0 for tile in tiles)


def test_fp8_has_the_tiles_of_int8() -> None:
    tables = [table for table in TILES if "fp8" in table]
    assert len(tables) == 6
    assert all(TILES[table] is TILES[table.replace("fp8", "w8a8")] for table in tables)


def test_programs_that_share_a_multiprocessor_share_its_tensor_cores_and_overlap_the_rest() -> None:
    one = Tile(128, 128, 128, 8, 3)
    two = Tile(128, 128, 128, 8, 3, ctas=2)
    problem = Problem(128 * 132, 128 * 2, 1280)  # two programs for each multiprocessor
    saved = tile_choice.estimate(one, problem, HOPPER) - tile_choice.estimate(two, problem, HOPPER)
    assert saved == tile_cost.FILL_AND_STORE
    assert "maxnreg" not in one.options()
    assert two.options()["maxnreg"] == 128


def test_a_persistent_tile_starts_no_more_programs_than_multiprocessors() -> None:
    tile = Tile(128, 128, 128, 8, 4, persistent=True)
    assert tile_choice.grid(tile, 64, 5120, CPU) == (132, 1)
    assert tile_choice.grid(tile, 1, 256, CPU) == (2, 1)


def test_a_file_is_named_after_its_gpu() -> None:
    assert file_name(Gpu("NVIDIA RTX 6000 Ada Generation", 89, 142)) == ("nvidia-rtx-6000-ada-generation.json")
