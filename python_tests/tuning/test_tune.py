"""The tuner keeps the fastest tile, goes on where it stopped, and loses nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmq_kernels import ops
from ldmq_kernels.kernels import measurements
from ldmq_kernels.ops.operands import of_value_and_gate
from ldmq_kernels.tuning import TuningError, tune
from ldmq_kernels.tuning import calls as tuner_calls
from ldmq_kernels.tuning.shapes import Conv2d, Input, Linear, merged_of, of_models

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
PRODUCTS = tuple(name for name, spec in ops.specs().items() if spec.is_product)
PRODUCERS = tuple(name for name in ops.specs() if name not in PRODUCTS)
LINEARS, CONVOLUTIONS = [Linear(3, 70, 64, 40), Linear(1, 20, 48, 20)], [Conv2d(2, 1, 32, 6, 20), Conv2d(1, 1, 4, 5, 8)]
GEGLUS = [Linear(3, 70, 16, 128), Linear(1, 20, 32, 256)]


@pytest.fixture(autouse=True)
def small_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shapes that the interpreter computes at once, and a cache of the test's own."""

    monkeypatch.setattr(tuner_calls, "of_models", lambda *_: (LINEARS, CONVOLUTIONS))
    monkeypatch.setattr(tuner_calls, "merged_of", lambda *_: [])
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path / "cache"))
    measurements.forget()
    yield
    measurements.forget()


def prefers(m: int) -> Callable[[Callable[[], Any], torch.device], float]:
    """A timer by which tiles of so many rows (m) are the fastest; it asks what tile the call would take."""
    from ldmq_kernels.kernels.triton import tile_choice
    from ldmq_kernels.kernels.triton.tile_choice import Problem

    def timer(run: Callable[[], Any], device: torch.device) -> float:
        tile = tile_choice.choose("linear_w8a8", Problem(1, 1, 1), device)
        return abs(tile.m - m) + tile.n / 1000

    return timer


def test_the_fastest_tile_is_written_and_then_chosen() -> None:
    from ldmq_kernels.kernels.triton import tile_choice
    from ldmq_kernels.kernels.triton.tile_choice import Problem

    path, left = tune(CPU, timer=prefers(64), names=("linear_w8a8", "conv2d_w8a8"), show=False)
    assert left == 0
    found = json.loads(path.read_text())
    assert set(found["tiles"]) == {
        "linear_w8a8 70x40x64",
        "linear_w8a8 20x20x48",
        "conv2d_w8a8 36x20x288",
        "conv2d_w8a8 gather 25x8x36",
    }
    assert all(tile["m"] == 64 for tile in found["tiles"].values())
    assert found["gpu"] == "no GPU"
    for key, tile in found["tiles"].items():
        *table, problem = key.split()
        asked = Problem(*map(int, problem.split("x")))
        assert vars(tile_choice.choose(" ".join(table), asked, CPU)) == tile


@pytest.mark.parametrize("op", PRODUCTS)
def test_every_op_can_be_tuned(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.spec_of(op).example is of_value_and_gate:
        monkeypatch.setattr(tuner_calls, "of_models", lambda *_: ([*GEGLUS, *LINEARS], CONVOLUTIONS))
    path, _ = tune(CPU, tmp_path / "tiles.json", timer=lambda *_: 1.0, names=(op,), show=False)
    found = json.loads(path.read_text())
    assert len(found["tiles"]) == 2
    assert not found["refused"]


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    path, timed = tmp_path / "tiles.json", set()

    def cut_short(run: Callable[[], Any], _device: torch.device) -> float:
        timed.add(run)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune(CPU, path, timer=cut_short, names=("linear_w8a8",), show=False)
    before = json.loads(path.read_text())
    assert len(before["tiles"]) == 1
    tune(CPU, path, timer=lambda *_: 2.0, names=("linear_w8a8",), show=False)
    after = json.loads(path.read_text())
    assert len(after["tiles"]) == 2
    assert after["milliseconds"].items() >= before["milliseconds"].items()


def test_no_time_measures_nothing_more(tmp_path: Path) -> None:
    _, left = tune(CPU, tmp_path / "tiles.json", seconds=-1.0, timer=lambda *_: 1.0, show=False, names=("linear_w8a8",))
    assert left == 2
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.parametrize(("place", "words"), [("", "is a folder"), ("notes/tiles.json", "Not a directory")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    place: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "notes").write_text("mine")

    def timed(*_: object) -> float:
        raise AssertionError("something is measured")

    with pytest.raises(OSError, match=words):
        tune(CPU, tmp_path / place, timer=timed, names=("linear_w8a8",), show=False)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_tile_that_does_not_launch_is_noted_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldmq_kernels.kernels.triton import (
        gemm_launch,
        linear_w8a8,  # noqa: F401
    )

    real = gemm_launch.TensorDescriptor

    def small_only(base: Any, shape: Any, strides: Any, block: list[int]) -> Any:
        if block[0] > 64:
            raise RuntimeError("out of resource: shared memory")
        return real(base, shape, strides, block)

    monkeypatch.setattr(gemm_launch, "TensorDescriptor", small_only)
    path, _ = tune(CPU, tmp_path / "tiles.json", timer=lambda *_: 1.0, names=("linear_w8a8",), show=False)
    found = json.loads(path.read_text())
    assert all(tile["m"] <= 64 and tile["n"] <= 64 for tile in found["tiles"].values())
    assert "out of resource" in json.dumps(found["refused"])


def test_a_tile_that_kills_the_device_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldmq_kernels.kernels.triton import gemm_launch

    path, real = tmp_path / "tiles.json", gemm_launch.TensorDescriptor

    def deadly(base: Any, shape: Any, strides: Any, block: list[int]) -> Any:
        if block[0] == 128:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(base, shape, strides, block)

    with monkeypatch.context() as patch:
        patch.setattr(gemm_launch, "TensorDescriptor", deadly)
        with pytest.raises(TuningError, match="run `ldmq bench --tune` again"):
            tune(CPU, path, timer=lambda *_: 1.0, names=("linear_w8a8",), show=False)
    (refused,) = json.loads(path.read_text())["refused"].values()
    assert len(refused) == 1
    tune(CPU, path, timer=lambda *_: 1.0, names=("linear_w8a8",), show=False)
    found = json.loads(path.read_text())
    assert refused[0][0] not in found["tiles"].values()
    assert len(found["tiles"]) == 2


def test_a_file_in_the_words_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    path, untried = tmp_path / "tiles.json", {"rows": 64, "columns": 16, "depth": 64, "warps": 4, "stages": 4}
    earlier = {"rows": 16, "columns": 64, "depth": 64, "warps": 4, "stages": 4, "share": 0.1, "splits": 1}
    key = "conv2d_w8a8 pointers 36x20x288"
    refused = {"conv2d_w8a8 pointers 25x8x36": [[untried | {"share": 0.12, "splittable": True}, "too large"]]}
    content = {"gpu": "no GPU", "tiles": {key: earlier}, "milliseconds": {key: [1.0, 2.0]}, "refused": refused}
    path.write_text(json.dumps(content))
    tune(CPU, path, timer=lambda *_: 1.0, names=("conv2d_w8a8",), show=False)
    found = json.loads(path.read_text())
    tile = found["tiles"]["conv2d_w8a8 gather 36x20x288"]
    assert (tile["m"], tile["n"], tile["k"], tile["efficiency"], tile["split_k"]) == (16, 64, 64, 0.1, 1)
    assert found["milliseconds"]["conv2d_w8a8 gather 36x20x288"] == [1.0, 2.0]
    ((known, why),) = found["refused"]["conv2d_w8a8 gather 25x8x36"]
    assert (known["m"], known["n"], why) == (64, 16, "too large")
    assert "pointers" not in json.dumps(found)


@pytest.mark.parametrize("content", ["", "{}", '{"gpu": "no GPU", "tiles": {"a": 1}}'])
def test_a_damaged_file_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(TuningError, match="damaged"):
        tune(CPU, path, timer=lambda *_: 1.0, show=False)
    assert path.read_text() == content


def test_a_file_of_another_gpu_is_not_mixed_with(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text('{"gpu": "NVIDIA H200", "tiles": {}, "milliseconds": {}, "refused": {}, "seen": []}')
    with pytest.raises(TuningError, match="measured on NVIDIA H200"):
        tune(CPU, path, timer=lambda *_: 1.0, show=False)


def test_without_a_gpu_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(TuningError, match="NVIDIA GPU"):
        tune(CPU)


def test_what_else_stands_in_the_file_stays(tmp_path: Path) -> None:
    path, off = tmp_path / "tiles.json", {"linear_w4a8": {"triton": "wrong"}}
    path.write_text(json.dumps({"gpu": "no GPU", "tiles": {}, "switched_off": off}))
    tune(CPU, path, timer=lambda *_: 1.0, names=("linear_w8a8",), show=False)
    found = json.loads(path.read_text())
    assert found["switched_off"] == off
    assert len(found["tiles"]) == 2


def test_an_op_whose_triton_kernel_is_switched_off_is_left_out_and_told(tmp_path: Path) -> None:
    measurements.switch_off("linear_w8a8", "triton", CPU, "wrong: differs by 3")
    with pytest.warns(UserWarning, match="linear_w8a8 is not tuned on triton: .*differs by 3"):
        path, left = tune(
            CPU, tmp_path / "t.json", timer=lambda *_: 1.0, names=("linear_w8a8", "linear_w8a16"), show=False
        )
    assert left == 0
    assert {key.split()[0] for key in json.loads(path.read_text())["tiles"]} == {"linear_w8a16"}


def test_pointwise_convolutions_and_merged_projections_are_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    pointwise = Conv2d(3, 2, 32, 5, 64, kernel=1)
    monkeypatch.setattr(tuner_calls, "of_models", lambda *_: ([], [pointwise, CONVOLUTIONS[0]]))
    monkeypatch.setattr(tuner_calls, "merged_of", lambda *_: [Linear(5, 77, 32, 96)])
    found = [call.shape for call in tuner_calls.calls(("linear_w8a8", "conv2d_w8a8"), ("sd15",), CPU)]
    assert found == [Linear(3, 50, 32, 64), Linear(5, 77, 32, 96), CONVOLUTIONS[0]]
    assert Linear(60, 2048, 1280, 3840) in merged_of("sdxl")


def test_the_models_have_the_work_that_is_known_of_them() -> None:
    """10^12 operations: linears and convolutions of a call with guidance."""
    wanted = {"sd15": (0.467, 0.888), "sdxl": (8.708, 3.246), "vae_decoder": (0.034, 9.886)}
    for name, work in wanted.items():
        linears, convolutions = of_models(name)
        counted = (
            sum(2e-12 * s.count * s.m * s.k * s.n for s in linears),
            sum(2e-12 * s.count * s.n * s.out_size**2 * s.c * s.k * s.kernel**2 for s in convolutions),
        )
        assert counted == pytest.approx(work, abs=0.001)


def test_what_is_quantized_is_what_layers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner_calls, "of_models", lambda *_: ([Linear(1, 9, 32, 256), *LINEARS], CONVOLUTIONS))
    found = {op: [call.shape for call in tuner_calls.calls((op,), ("sd15",), CPU)] for op in PRODUCERS}
    assert found["geglu_quantize"] == [Input((9, 256), "static"), Input((9, 256), "per token")]
    assert {shape.scale for shape in found["group_norm_silu_quantize"]} == {"static", "per sample", "per token"}
    assert {shape.sizes for shape in found["group_norm_silu_quantize"]} == {(1, 32, 6, 6)}
    assert {shape.sizes for shape in found["quantize_per_sample"]} == {(1, 32, 6, 6), (1, 4, 5, 5)}
    assert {shape.sizes for shape in found["quantize_per_token"]} == {(9, 32), (70, 64), (20, 48)}
    assert len(found["quantize_static"]) == 5
    for call in tuner_calls.calls(PRODUCERS, ("sd15",), CPU):
        arguments = call.make()
        getattr(ops, call.op)(*arguments)
        assert ops.spec_of(call.op).shape_text(arguments).startswith("x".join(map(str, call.shape.sizes)))
