"""The cost model of tiles says what it is made of."""

from __future__ import annotations

import pytest

from ldmq_kernels.kernels.tile_cost import INT8_PRODUCTS, L2_BYTES, gemm_clocks, step_clocks


@pytest.mark.parametrize(("loaded_bytes", "clocks"), [(0, 512), (512 * L2_BYTES, 512), (600 * L2_BYTES, 600)])
def test_a_step_takes_as_long_as_its_products_or_its_loads(loaded_bytes: int, clocks: int) -> None:
    assert step_clocks(128 * 128 * 128, INT8_PRODUCTS[90], loaded_bytes) == clocks


@pytest.mark.parametrize(("tiles", "waves"), [(1, 1), (132, 1), (133, 2), (265, 3)])
def test_a_gemm_takes_whole_waves_of_tiles(tiles: int, waves: int) -> None:
    assert gemm_clocks(tiles, 132, 10, 100.0, tile_clocks=50.0, launch_clocks=7.0) == waves * 1050 + 7
