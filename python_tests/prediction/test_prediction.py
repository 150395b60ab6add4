"""Times of a GPU that is not there: what is recorded of a call, floors that no time goes below, and known tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.commands.predict import recorded
from benchmarks.models.definitions import TOYS, Model
from ldmq_kernels.kernels.cuda.compiled_tiles import compiled_tiles
from ldmq_kernels.kernels.devices import DEVICES, device_called, device_of
from ldmq_kernels.kernels.tile_cost import INT8_PRODUCTS
from ldmq_kernels.nn.quant_linear import QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.ops import specs
from ldmq_kernels.prediction import BACKENDS, Operation, predict, record
from ldmq_kernels.prediction.gemms import by_cuda, by_library, by_triton
from ldmq_kernels.prediction.launches import early_of
from ldmq_kernels.prediction.predict import COPY_SHARE, EARLY_GAP_MS, GAP_MS, START_MS
from ldmq_kernels.prediction.recorded import Gemm
from ldmq_kernels.tuning.calls import GEGLU_WIDENING
from ldmq_kernels.tuning.shapes import of_models
from python_tests.tiny import run_unet, tiny_unet

CSRC = Path(__file__).parents[2] / "csrc"
H200 = DEVICES["h200"]
CUDA_OPS = (
    "linear_w8a8",
    "linear_w4a8",
    "conv2d_w8a8",
    "linear_geglu_w8a8",
    "linear_fp8",
    "conv2d_fp8",
    "linear_geglu_fp8",
)
GEMMS = [Gemm(2048, 1280, 1280), Gemm(2, 1280, 320), Gemm(8192, 640, 5760, taps=9), Gemm(65536, 5120, 5120)]


@pytest.fixture(scope="module")
def operations() -> list[Operation]:
    """Of a UNet without memory whose layers are all quantized and fused."""
    return recorded(Model(tiny_unet, TOYS["sd15"].inputs), "w8a8-static")


def test_each_layer_is_recorded_once_by_its_name_and_shared_products_by_all_names(
    operations: list[Operation],
) -> None:
    products = [name for o in operations if o.gemm is not None for name in _names(o.layer)]
    layers = [n for n, m in tiny_unet().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(products) == sorted(layers)
    assert sum(o.layer.endswith("attn1.to_q+to_k+to_v") for o in operations) == 4
    assert not any(o.op in ("view", "transpose", "chunk", "empty") for o in operations)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8-dynamic", "w8a16"])
def test_a_linear_is_recorded_at_its_full_width_whatever_its_weight_is_stored_as(scheme: str) -> None:
    layer = QuantLinear.from_float(nn.Linear(64, 48), SCHEMES[scheme])
    products = [o.gemm for o in record(layer, lambda: layer(torch.zeros(3, 64))) if o.gemm is not None]
    assert products == [Gemm(3, 48, 64)]


def _names(layer: str) -> list[str]:
    first, *others = layer.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{name}" for name in others)]


def test_recording_changes_nothing_and_leaves_nothing() -> None:
    unet = tiny_unet()
    expected = run_unet(unet)
    found = []
    operations = record(unet, lambda: found.append(run_unet(unet)))
    assert torch.equal(found[0], expected)
    assert any(o.op == "scaled_dot_product_attention" for o in operations)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_conv_is_recorded_as_the_product_that_it_is() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, device="meta")
    (found,) = record(conv, lambda: conv(torch.empty(2, 8, 6, 4, device="meta")))
    assert found.gemm == Gemm(2 * 3 * 2, 8, 36, taps=9, groups=2)
    assert found.gemm.operations == 2 * 12 * 16 * 36
    assert found.bytes == 4 * (2 * 8 * 24 + 16 * 36 + 16 + 2 * 16 * 6)


def test_fused_attention_writes_no_matrix_and_is_no_copy_on_the_meta_device() -> None:
    q = torch.empty(2, 64, 8, 40, device="meta", dtype=torch.float16).transpose(1, 2)

    def call() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(2, 64, 320)

    (found,) = record(nn.Identity(), call)
    assert found.bytes == 2 * 2 * q.nbytes / 2  # read once under one number, written once
    (row,) = predict([found], H200, "triton").rows
    exponentials = 2 * 8 * 64 * 64 / (16 * 132) / (H200.clock_ghz * 1e6)
    assert row.milliseconds > row.operations_ms + exponentials


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", ["h200", "rtx4090"])
def test_sums_are_those_of_the_parts_and_no_part_is_below_its_floors(
    operations: list[Operation], device: str, backend: str
) -> None:
    found = predict(operations, DEVICES[device], backend)  # type: ignore[arg-type]
    assert sum(found.by_kind.values()) == pytest.approx(found.milliseconds)
    assert found.milliseconds > sum(row.milliseconds for row in found.rows) > 0
    assert found.launches == sum(row.launches for row in found.rows) >= len(found.rows)
    for row in found.rows:
        assert row.milliseconds >= max(row.operations_ms, row.bytes_ms)


def test_dependent_launches_shorten_the_gaps_before_kernels_that_wait_and_no_others(
    operations: list[Operation],
) -> None:
    shorter, ours = {}, {}
    for backend in ("triton", "cuda"):
        found = predict(operations, H200, backend)
        shorter[backend] = round((found.milliseconds - found.early_milliseconds) / (GAP_MS - EARLY_GAP_MS))
        ours[backend] = [row for row in found.rows if row.op in specs()]
        assert {row.served_by for row in found.rows if row.op not in specs()} == {"torch"}
        older = predict(operations, DEVICES["rtx4090"], backend)
        assert older.early_milliseconds == older.milliseconds
    norms = [row for row in ours["cuda"] if row.op.startswith("group_norm")]
    assert norms
    assert shorter["triton"] == sum(row.launches for row in ours["triton"]) > 0
    assert shorter["cuda"] == sum(row.launches for row in ours["cuda"]) - len(norms)
    assert early_of("quantize_per_sample", "cuda", 2) == 1  # after a memset


@pytest.mark.parametrize("gemm", GEMMS, ids=str)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_no_product_is_faster_than_the_tensor_cores(gemm: Gemm, device: object) -> None:
    op = "conv2d_w8a8" if gemm.taps > 1 else "linear_w8a8"
    for time, tops in (
        (by_triton(op, gemm, device), device.int8_tops),
        (by_cuda(op, gemm, device), device.int8_tops),
        (by_library(gemm, device), device.half_tops),
    ):
        assert device.milliseconds(time.clocks) > gemm.operations / (tops * 1e9)
        assert 0 < time.loop_share <= 1


def test_int8_loops_of_triton_drain_on_hopper_and_those_of_cuda_do_not() -> None:
    gemm = Gemm(2048, 1280, 1280)
    triton, cuda = by_triton("linear_w8a8", gemm, H200), by_cuda("linear_w8a8", gemm, H200)
    assert triton.tile == "128x160x128"
    assert triton.loop_share == pytest.approx(640 / (640 + 250 + 214), rel=0.01)
    assert cuda.clocks < triton.clocks


def test_what_cuda_refuses_is_tritons() -> None:
    assert by_cuda("conv2d_w8a8", Gemm(8192, 320, 36, taps=9), H200) is None
    assert by_cuda("linear_w8a16", GEMMS[0], H200) is None
    assert by_cuda("linear_fp8", GEMMS[0], DEVICES["a100"]) is None


def test_rows_say_who_serves_them() -> None:
    toy = recorded(Model(tiny_unet, TOYS["sd15"].inputs), "fp8-static")
    cuda, triton = ({(row.op, row.served_by) for row in predict(toy, H200, name).rows} for name in ("cuda", "triton"))
    for op in ("linear_fp8", "conv2d_fp8", "quantize_static", "group_norm_silu_quantize"):
        assert (op, "cuda") in cuda
        assert (op, "triton") in triton
    assert ("layer_norm_quantize", "triton") in cuda
    assert {by for op, by in cuda if op == "scaled_dot_product_attention"} == {"torch"}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_rates_of_data_sheets_are_whole_products_of_a_clock(device: object) -> None:
    products = device.products(device.int8_tops)
    assert products == pytest.approx(2 ** round(torch.tensor(products).log2().item()), rel=0.01)
    if device.capability in INT8_PRODUCTS:
        assert products == pytest.approx(INT8_PRODUCTS[device.capability], rel=0.01)
    assert device.half_tops <= device.int8_tops / 2 * 1.001


def test_devices_are_found_by_their_key_and_by_what_torch_calls_them() -> None:
    assert device_of("H200") is device_called("NVIDIA H200") is H200
    assert device_called("Some GPU") is None
    with pytest.raises(ValueError, match=r"nothing is known of the device 'h400': known are a100.*h200"):
        device_of("h400")


@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_list_of_cuda_tiles_is_what_the_sources_compile(op: str) -> None:
    lowest = 89 if op.endswith("fp8") else 80
    listed = {family: [t for t in compiled_tiles(op) if t.family == family] for family in (lowest, 90)}
    pattern = rf'compiled<Tile<Kind::\w+, Element::\w+, ([^>]+)>>\("{op}"\)'
    wgmma, mma = (re.findall(pattern, (CSRC / f"sm{family}_{op}.cu").read_text()) for family in (90, lowest))
    assert len(wgmma) + len(mma) == len(compiled_tiles(op))
    assert [f"{t.m}, {t.n}, {t.k}, {t.stages}, {str(t.cooperative).lower()}, {t.cluster}" for t in listed[90]] == wgmma
    fields = [fields.split(", ") for fields in mma]
    assert [[str(t.m), str(t.n), str(t.stages)] for t in listed[lowest]] == [[f[0], f[1], f[-1]] for f in fields]


@pytest.mark.parametrize("device", ["h200", "a100", "rtx4090"])
@pytest.mark.parametrize("by", [by_triton, by_cuda])
def test_geglu_gains_in_the_epilogue_at_every_size_of_the_models(by: Callable[..., Any], device: str) -> None:
    """Why blocks take it wherever a backend has it: the op that it saves takes longer than the epilogue grows."""
    shapes = [s for s in of_models("sd15", "sdxl")[0] if s.n == GEGLU_WIDENING * s.k]
    assert len(shapes) >= 5
    for shape in shapes:
        gemm, on = Gemm(shape.m, shape.n, shape.k), DEVICES[device]
        added = on.milliseconds(by("linear_geglu_w8a8", gemm, on).clocks - by("linear_w8a8", gemm, on).clocks)
        assert added < START_MS + GAP_MS + 2.5e-6 * shape.m * shape.n / on.bandwidth / COPY_SHARE


def test_fp8_has_the_rate_of_int8_without_its_drain_where_there_is_fp8() -> None:
    gemm = Gemm(2048, 10240, 1280)
    assert by_triton("linear_fp8", gemm, H200).clocks < by_triton("linear_w8a8", gemm, H200).clocks
    for device, family in (("h200", 90), ("l40s", 89)):
        time = by_cuda("linear_fp8", gemm, DEVICES[device])
        assert time.tile.startswith(f"sm{family} ")
        assert 0 < time.loop_share <= 0.93 + 1e-9
        assert DEVICES[device].milliseconds(time.clocks) > gemm.operations / (DEVICES[device].fp8_tops * 1e9)
    with pytest.raises(ValueError, match="NVIDIA A100 80GB has no FP8: choose a scheme in int8"):
        by_triton("linear_fp8", gemm, DEVICES["a100"])
