"""The Triton kernels compile for GPUs that need not be there, into the machine code that they are meant to be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.ops import specs
from python_tests.kernels.kept_builds import ROOT, build_key, kept_build

CAPABILITIES = (80, 90, 100)
TILES = (
    80,
    90,
)  # whose every tile is compiled; the script does the others: compile_triton.py REPORT --tiles 86 100 120
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # of a multiprocessor
WARPS_OF_A_WARPGROUP = 4
INT8 = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA IMMA"}
FLOAT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA HMMA"}
WITHOUT_TMA = ("unaligned", "conv_in", "odd extent", "float32")  # what no descriptor can read

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _key() -> str:
    version = importlib.metadata.version("triton")
    return build_key(
        version,
        [
            ROOT / "ldmq_kernels/kernels",
            ROOT / "ldmq_kernels/ops",
            ROOT / "ldmq_kernels/numerics",
            Path(__file__).parent,
            ROOT / "python_tests/kernels/before_wait.py",
            ROOT / "python_tests/kernels/machine_code.py",
            ROOT / "python_tests/kernels/cuda/wgmma_in_flight.py",
        ],
    )


def compiled(name: str, *arguments: str) -> list[dict[str, Any]]:
    """What the script reports of these kernels, kept in build/`name`; its table is printed when it runs."""

    def compile_all(folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        program = Path(__file__).with_name("compile_triton.py")
        command = [sys.executable, str(program), str(folder / "report.json"), *arguments]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        print(finished.stdout)

    with kept_build(name, _key, compile_all) as folder:
        return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def report() -> list[dict[str, Any]]:
    """What came out of every kernel for every architecture."""
    return compiled("triton", *map(str, CAPABILITIES))


@pytest.fixture(scope="module")
def tiles() -> list[dict[str, Any]]:
    """What came out of every tile of the tables."""
    return compiled("triton_tiles", "--tiles", *map(str, TILES))


def gemms(rows: list[dict[str, Any]], suffix: str) -> list[dict[str, Any]]:
    """The GEMMs of the ops whose names end so, without what reduces split-K."""
    return [row for row in rows if row["op"].endswith(suffix) and row["kernel"] != "reduce_split_k"]


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['kernel']} {row['case']} sm_{row['capability']} {row['instructions']}" for row in rows]


def test_every_op_is_compiled(report: list[dict[str, Any]]) -> None:
    ops = {name: spec for name, spec in specs().items() if backends()["triton"].has(name)}
    wanted = {(op, sm) for op, spec in ops.items() for sm in CAPABILITIES if spec.operand_dtype != FLOAT8 or sm >= 89}
    assert {(row["op"], row["capability"]) for row in report} == wanted


def test_no_register_is_spilled(report: list[dict[str, Any]]) -> None:
    assert names([row for row in report if row["spills"]]) == []


def test_shared_memory_fits(report: list[dict[str, Any]]) -> None:
    assert names([row for row in report if row["shared"] > SHARED_LIMIT[row["capability"]]]) == []


def test_no_memory_is_touched_before_the_kernel_in_front_has_ended(
    report: list[dict[str, Any]], tiles: list[dict[str, Any]]
) -> None:
    """Where kernels are launched early, each waits before all else; elsewhere none has code for it."""
    waiting = [row for row in report if row["capability"] >= 90]
    assert len(waiting) >= 100
    assert names([row for row in waiting if row["early"] != ["ACQBULK", "PREEXIT"] or row["touched"]]) == []
    others = [row for row in [*report, *tiles] if row not in waiting]
    assert {row["capability"] for row in others} == {80, 90}
    assert names([row for row in others if row["early"] or not row["touched"]]) == []


def on_hopper(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose loop multiplies by wgmma."""
    return [row for row in rows if row["capability"] == 90 and {"IGMMA", "HGMMA", "QGMMA"} & set(row["loop"])]


def test_on_hopper_fp8_products_stay_in_flight_and_int8_ones_do_not(report: list[dict[str, Any]]) -> None:
    """Triton makes no product asynchronous whose accumulator is not float32.

    The tiles of which two programs run at once and the order of backends are made for that. Once a Triton leaves int8
    products in flight they are to be looked at again.
    """
    rows = [row for row in on_hopper(report) if row["case"] not in WITHOUT_TMA]
    int8 = [row for row in rows if "IGMMA" in row["loop"]]
    fp8 = [row for row in rows if "QGMMA" in row["loop"]]
    assert len(int8) >= 15
    assert len(fp8) >= 4
    assert names([row for row in int8 if set(row["waits"]) != {0}]) == []
    assert names([row for row in fp8 if not row["waits"] or min(row["waits"]) < 1]) == []


def test_a_barrier_stands_between_a_wait_and_the_next_write_of_shared_memory(
    report: list[dict[str, Any]], tiles: list[dict[str, Any]]
) -> None:
    """One warpgroup's wait says nothing of what the other still reads."""
    rows = [row for row in on_hopper([*report, *tiles]) if row["warps"] > WARPS_OF_A_WARPGROUP]
    assert len(rows) >= 30
    assert names([row for row in rows if row["unguarded"]]) == []


def test_no_loop_over_the_steps_of_a_convolution_divides(
    report: list[dict[str, Any]], tiles: list[dict[str, Any]]
) -> None:
    """Nor does one over tiles at the steps within a tile: a persistent one divides where a tile begins."""
    rows = [row for row in (*report, *tiles) if "conv2d" in row["kernel"] and row["instructions"]]
    assert len(rows) >= 90
    assert {row["case"] for row in rows} >= {"conv_in", "conv2d_w8a8 gather", "conv2d_w4a8", "conv2d_w8a16"}
    assert len([row for row in rows if row["persistent"]]) >= 7
    assert names([row for row in rows if row["divides"] or not row["loop"]]) == []


def test_two_programs_fit_a_multiprocessor_where_a_tile_says_so(tiles: list[dict[str, Any]]) -> None:
    rows = [row for row in tiles if row["ctas"] > 1 and row["kernel"] != "reduce_split_k"]
    assert {row["op"] for row in rows} == {"linear_w8a8", "conv2d_w8a8"}
    for row in rows:
        registers = -(-row["registers"] // 8) * 8 * row["warps"] * 32
        assert row["ctas"] * registers <= REGISTERS, row
        assert row["ctas"] * (row["shared"] + 1024) <= SHARED_LIMIT[90] + 1024, row


@pytest.mark.slow
def test_every_tile_fits_and_spills_nothing(tiles: list[dict[str, Any]]) -> None:
    assert len(tiles) > 200
    assert names([row for row in tiles if row["spills"] or row["shared"] > SHARED_LIMIT[row["capability"]]]) == []


def test_integer_gemms_use_the_integer_tensor_cores(report: list[dict[str, Any]]) -> None:
    rows = gemms(report, "a8")
    wrong = [row for row in rows if not set(row["instructions"]) & set(INT8[row["capability"]].split())]
    assert len(rows) >= 18 * len(CAPABILITIES)
    assert names(wrong) == []


def test_fp8_gemms_multiply_fp8(report: list[dict[str, Any]]) -> None:
    rows = gemms(report, "fp8")
    assert {row["capability"] for row in rows} == {90, 100}
    assert names([row for row in rows if row["capability"] == 90 and row["instructions"] != ["QGMMA"]]) == []
    assert len([row for row in rows if row["capability"] == 90]) >= 7


def test_fp8_is_rounded_in_one_instruction(report: list[dict[str, Any]]) -> None:
    rows = [row for row in report if row["case"] == "fp8"]
    assert len(rows) == 2
    assert all(row["counts"].get("F2FP") for row in rows)


def test_tma_reads_what_it_can(report: list[dict[str, Any]], tiles: list[dict[str, Any]]) -> None:
    rows = [row for row in (*gemms(report, "a8"), *gemms(report, "a16")) if row["capability"] >= 90]
    wrong = [row for row in rows if bool(row["counts"].get("UTMALDG")) == (row["case"] in WITHOUT_TMA)]
    without_tma = ("unaligned", "gather", "float32")
    wrong += [
        row
        for row in tiles
        if row["capability"] == 90 and row["kernel"] != "reduce_split_k"
        if bool(row["counts"].get("UTMALDG")) == any(word in row["case"] for word in without_tma)
    ]
    assert names(wrong) == []


def test_int8_operands_go_from_shared_memory_to_the_tensor_cores(report: list[dict[str, Any]]) -> None:
    """On sm_90 the loop of a linear touches no register with them; a persistent one has the epilogue in its loop."""
    rows = [*gemms(report, "linear_w8a8"), *gemms(report, "linear_geglu_w8a8")]
    rows = [r for r in rows if r["capability"] == 90 and r["case"] not in (*WITHOUT_TMA, "persistent")]
    assert len(rows) >= 8
    assert names([row for row in rows if set(row["loop"]) != {"IGMMA", "UTMALDG"}]) == []


def test_transposed_image_tiles_go_from_shared_memory_to_the_tensor_cores(tiles: list[dict[str, Any]]) -> None:
    """On sm_90; a persistent one has the epilogue in its loop."""
    rows = [row for row in gemms(tiles, "conv2d_w8a8") if row["tile"].endswith("T") and row["capability"] == 90]
    plain = [row for row in rows if "STS" not in row["loop"]]
    assert len(plain) >= 8
    assert len(rows) - len(plain) <= 5
    assert names([row for row in plain if set(row["loop"]) != {"IGMMA", "UTMALDG"}]) == []


def test_no_operand_makes_a_round_trip_through_shared_memory(report: list[dict[str, Any]]) -> None:
    """On sm_90 image tiles as operand A are loaded into registers, as are weights to be unpacked: nothing is stored."""
    ops = ("conv2d_w8a8", "linear_w4a8", "conv2d_w4a8", "linear_w8a16", "linear_w4a16", "conv2d_w8a16")
    rows = [row for op in ops for row in gemms(report, op) if row["capability"] == 90]
    rows = [row for row in rows if row["case"] not in WITHOUT_TMA]
    assert len(rows) >= 10
    assert names([row for row in rows if row["loop"].get("STS") or not row["loop"]]) == []


def test_16_bit_gemms_use_the_tensor_cores(report: list[dict[str, Any]]) -> None:
    rows = [row for row in gemms(report, "a16") if row["case"] == "main"]
    wrong = [row for row in rows if not set(row["instructions"]) & set(FLOAT[row["capability"]].split())]
    assert len(rows) == 3 * len(CAPABILITIES)
    assert names(wrong) == []


def test_exact_float32_gemms_and_quantizers_use_none(report: list[dict[str, Any]]) -> None:
    rows = [row for row in report if "quantize" in row["op"] or row["case"] == "float32"]
    assert names([row for row in rows if row["instructions"]]) == []


def test_quantizers_and_producers_read_16_bytes_at_a_time(report: list[dict[str, Any]]) -> None:
    """All but the merge of statistics, and groups whose channels are no multiple of eight."""
    rows = [row for row in report if "quantize" in row["op"] and row["kernel"] != "merge_statistics"]
    rows = [row for row in rows if row["case"] not in ("small groups", "one pixel")]
    assert len(rows) >= 20 * len(CAPABILITIES)
    assert names([row for row in rows if not row["wide_loads"]]) == []
