"""Which backend serves: by measurement where the shape was measured, and never one that is switched off."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldmq_kernels import ops
from ldmq_kernels.cli.checks import SHAPES
from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.kernels.cuda import backend as cuda_backend
from ldmq_kernels.kernels.gpu import ABSENT, Gpu
from ldmq_kernels.kernels.op_spec import spec_of
from ldmq_kernels.kernels.triton import backend as triton_backend
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.ops.operands import example

HOPPER = Gpu("NVIDIA H200", 90, 132)
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "nvidia-h200.json"
OP, SHAPE = "linear_w8a8", "34x64 to 40"
Files = Callable[..., Path]


class OnGpu(SimpleNamespace):
    """What the choice of a backend looks at of a tensor on a GPU."""

    __hash__ = object.__hash__

    def __init__(self, *shape: int) -> None:
        super().__init__(shape=torch.Size(shape), device=GPU, requires_grad=False)


def linear(rows: int = 17, columns: int = 40) -> tuple[Any, ...]:
    """Arguments of linear_w8a8 on a GPU, twice so many rows of 64."""
    scale = OnGpu(columns)
    return OnGpu(2, rows, 64), OnGpu(1), OnGpu(columns, 64), scale, None, None, torch.float16


@pytest.fixture(autouse=True)
def two_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that Triton and the CUDA extension serve, each giving its own name, with no files of measurements."""
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(measurements, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(measurements, "gpu_of", lambda device: HOPPER if device.type == "cuda" else ABSENT)
    for backend, name in ((triton_backend, "triton"), (cuda_backend, "cuda")):
        monkeypatch.setitem(vars(backend), "serves", lambda device: device.type == "cuda")
        monkeypatch.setitem(vars(backend), OP, lambda *_, name=name: name)
    measurements.forget()
    measurements.warn_once.cache_clear()
    dispatch.reset_dispatch_report()
    yield
    measurements.forget()
    dispatch.reset_dispatch_report()


@pytest.fixture
def write(tmp_path: Path) -> Files:
    """Write the file that ships, or the user's."""

    def put(where: str, name: str = NAME, **content: Any) -> Path:
        path = tmp_path / where / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"tiles": {}} | content))
        measurements.forget()
        return path

    return put


def faster(backend: str, shape: str = SHAPE) -> dict[str, Any]:
    return {OP: {shape: {"backend": backend, "milliseconds": {"triton": 0.06, "cuda": 0.05}}}}


def served_by(arguments: tuple[Any, ...]) -> str:
    return dispatch.server(OP)(*arguments)


def test_without_a_measurement_it_is_triton() -> None:
    assert dispatch.backend_order(OP, linear(), GPU) == ("triton", "reference")
    assert served_by(linear()) == "triton"


@pytest.mark.parametrize("where", ["shipped", "user"])
def test_the_faster_backend_serves_the_shape_that_was_measured_and_no_other(write: Files, where: str) -> None:
    write(where, backends=faster("cuda"))
    assert dispatch.backend_order(OP, linear(), GPU) == ("cuda", "triton", "reference")
    assert served_by(linear()) == "cuda"
    for other in (linear(rows=18), linear(columns=41)):
        assert dispatch.backend_order(OP, other, GPU) == ("triton", "reference")
    assert dispatch.backend_order("linear_static_w8a8", (*linear()[:3], None, OnGpu(40)), GPU)[0] == "triton"


def test_the_users_measurement_goes_before_the_one_that_ships_shape_by_shape(write: Files) -> None:
    write("shipped", backends={OP: faster("cuda")[OP] | faster("cuda", "36x64 to 40")[OP]})
    write("user", backends=faster("triton"))
    assert served_by(linear()) == "triton"
    assert served_by(linear(rows=18)) == "cuda"


def test_what_is_faster_but_not_built_is_not_offered_the_call(write: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    write("shipped", backends=faster("cuda"))
    monkeypatch.setitem(vars(cuda_backend), "serves", lambda _: False)
    assert dispatch.backend_order(OP, linear(), GPU) == ("triton", "reference")
    monkeypatch.setitem(vars(cuda_backend), "serves", lambda _: True)
    monkeypatch.setitem(vars(cuda_backend), "has", lambda _: False)
    measurements.forget()
    assert dispatch.backend_order(OP, linear(), GPU) == ("triton", "reference")


def test_a_faster_backend_that_refuses_hands_the_call_on(write: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise dispatch.Unsupported("columns must be a multiple of 64")

    write("user", backends=faster("cuda"))
    monkeypatch.setitem(vars(cuda_backend), OP, refuse)
    assert served_by(linear()) == "triton"
    assert "columns must be a multiple of 64" in dispatch.dispatch_report()


def test_on_a_cpu_measurements_of_gpus_do_not_count(write: Files) -> None:
    write("user", "no-gpu.json", backends={"quantize_per_token": {"2x8, per token": {"backend": "cuda"}}})
    assert dispatch.backend_order("quantize_per_token", (torch.ones(2, 8), None), CPU) == ("cpu", "reference")


def test_files_are_read_once(write: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    write("user", backends=faster("cuda"))
    assert served_by(linear(rows=5)) == "triton"
    monkeypatch.setattr(Path, "read_text", lambda *_: pytest.fail("a file is read in the middle of an op"))
    assert served_by(linear()) == "cuda"


def test_many_shapes_are_not_kept_for_ever(write: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    write("user", backends=faster("cuda"))
    monkeypatch.setattr(dispatch, "MOST_SHAPES", 3)
    for rows in range(10, 20):
        assert served_by(linear(rows)) == ("cuda" if rows == 17 else "triton")
    assert len(dispatch.choice(OP, GPU).known) <= 3


@pytest.mark.parametrize(
    ("op", "case", "text"),
    [
        ("linear_w8a8", 0, "17x68 to 37"),
        ("linear_w4a8", 1, "63x20 to 4"),
        ("linear_static_w8a8", 0, "17x68 to 37"),
        ("linear_geglu_w8a8", 0, "17x68 to 38"),
        ("linear_w8a16", 2, "1x4 to 320"),
        ("linear_w4a16", 0, "17x68 to 37"),
        ("conv2d_w8a8", 0, "2x68x9x7 to 37, kernel 3x3, stride 1x1, upsample 1"),
        ("conv2d_w4a8", 1, "1x20x5x6 to 4, kernel 3x3, stride 1x1, upsample 2"),
        ("conv2d_w8a16", 2, "3x4x7x9 to 320, kernel 3x3, stride 2x2, upsample 1"),
        ("quantize_static", 1, "1x20x5x6"),
        ("quantize_per_token", 0, "17x68"),
        ("quantize_per_sample", 0, "2x68x9x7"),
        ("rotate_quantize_per_token", 0, "17x68"),
        ("rotate_quantize_per_sample", 0, "2x68x9x7"),
        ("group_norm_silu_quantize", 0, "2x68x9x7, static"),
        ("group_norm_silu_quantize", 1, "1x20x5x6, per sample"),
        ("group_norm_silu_quantize", 5, "1x320x6x5, per token"),
        ("geglu_quantize", 0, "17x136, static"),
        ("geglu_quantize", 1, "63x40, per token"),
        ("layer_norm_quantize", 1, "63x20, per token"),
        ("silu_quantize", 0, "17x68, static"),
    ],
)
def test_shapes_read_as_people_write_them(op: str, case: int, text: str) -> None:
    assert spec_of(op).shape_text(example(op, SHAPES[case], CPU, torch.float32)) == text


def test_unusual_convolutions_are_other_shapes() -> None:
    x, scale = torch.zeros(1, 8, 6, 6), torch.ones(4)
    arguments = (x, None, None, scale, None, None, None, [3, 3], [1, 1], [2] * 4, [2, 2], 4, 1, torch.float16)
    assert spec_of("conv2d_w8a8").shape_text(arguments) == (
        "1x8x6x6 to 4, kernel 3x3, stride 1x1, upsample 1, dilation 2x2, groups 4"
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"backends": {}}',
        '{"tiles": {}, "backends": []}',
        '{"tiles": {}, "backends": {"linear_w8a8": 3}}',
        '{"tiles": {}, "backends": {"linear_w8a8": {"34x64 to 40": {"backend": "cudda"}}}}',
        '{"tiles": {}, "backends": {"linear_w8a8": {"34x64 to 40": {"backend": ["cuda"]}}}}',
        '{"tiles": {}, "backends": {"linear_w8a8": {"34x64 to 40": "quick"}}}',
        '{"tiles": {}, "switched_off": {"linear_w8a8": ["triton"]}}',
        '{"tiles": {}, "switched_off": {"linear_w8a8": {"triton": "wrong"}}}',
    ],
)
def test_a_damaged_file_warns_once_and_the_op_is_served(write: Files, content: str) -> None:
    write("user").write_text(content)
    with pytest.warns(UserWarning, match=r"nvidia-h200\.json is damaged .* remove it") as told:
        assert served_by(linear()) == "triton"
    measurements.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(linear()) == "triton"
    assert len(told) == 1


def test_a_user_without_a_home_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LDMQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="has no home, .* set LDMQ_CACHE"):
        assert served_by(linear()) == "triton"


@pytest.mark.parametrize(
    "content",
    ["[" * 10**5, '{"tiles": 1e999}', '{"tiles": {}, "tiles": {}}', " " * 10**8],
    ids=["deep", "a large number", "a name twice", "large"],
)
def test_json_of_any_kind_is_a_damaged_file_and_the_usual_backend_serves(write: Files, content: str) -> None:
    write("user").write_text(content)
    with pytest.warns(UserWarning, match=r"nvidia-h200\.json is damaged .* remove it") as told:
        assert served_by(linear()) == "triton"
    assert max(len(str(warning.message)) for warning in told) < 1000


def test_a_file_of_an_earlier_version_is_read(write: Files) -> None:
    write("user", gpu=HOPPER.name, milliseconds={}, refused={}, seen=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(linear()) == "triton"
    assert measurements.section(GPU, "cuda_tiles") == {}


def test_tiles_of_the_cuda_backend_come_from_both_files(write: Files) -> None:
    write("shipped", cuda_tiles={"linear_w8a8 1x2x3": "a", "linear_w8a8 4x5x6": "b"})
    write("user", cuda_tiles={"linear_w8a8 1x2x3": "c"})
    assert measurements.section(GPU, "cuda_tiles") == {"linear_w8a8 1x2x3": "c", "linear_w8a8 4x5x6": "b"}


def test_a_backend_that_is_switched_off_is_passed_over_counted_and_told_once(write: Files) -> None:
    path = write("user", backends=faster("cuda"), gpu=HOPPER.name)
    assert served_by(linear()) == "cuda"
    measurements.switch_off(OP, "cuda", GPU, "wrong: differs by 3")
    content = json.loads(path.read_text())
    assert content["switched_off"][OP]["cuda"]["reason"] == "wrong: differs by 3"
    assert content["backends"] == faster("cuda")
    with pytest.warns(UserWarning, match=r"linear_w8a8 on cuda is switched off .*differs by 3.*ldmq doctor") as told:
        assert [served_by(linear()) for _ in range(2)] == ["triton"] * 2
    assert len(told) == 1
    assert "refused 2 times: switched off by `ldmq doctor`: wrong: differs by 3" in dispatch.dispatch_report()
    assert measurements.switch_on(OP, "cuda", GPU)
    assert served_by(linear()) == "cuda"
    assert json.loads(path.read_text()) == {**content, "switched_off": {}}
    assert not measurements.switch_on(OP, "cuda", GPU)


def test_asking_for_a_backend_that_is_switched_off_is_an_error_with_the_reason() -> None:
    measurements.switch_off(OP, "triton", GPU, "fails: illegal instruction")
    with (
        pytest.warns(UserWarning, match="switched off"),
        dispatch.use_backend("triton"),
        pytest.raises(RuntimeError, match="triton: switched off by `ldmq doctor`: fails: illegal instruction"),
    ):
        served_by(linear())


class OutOfResources(Exception):
    """Under the name and module of Triton's own."""


OutOfResources.__module__ = "triton.runtime.errors"
LAUNCHES = {
    "shared memory": ("triton", OutOfResources("out of resource: shared memory, Required: 300000")),
    "a compiler's pass": ("triton", RuntimeError("PassManager::run failed")),
    "a cooperative grid": ("cuda", RuntimeError("failed on cuda:0: too many blocks in cooperative launch (built ..)")),
    "registers": ("cuda", RuntimeError("failed on cuda:0: too many resources requested for launch (built for 90a)")),
}


@pytest.mark.parametrize("kind", LAUNCHES)
def test_a_launch_that_fails_without_a_fault_goes_to_the_next_backend_and_is_not_tried_again(
    kind: str, write: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, error = LAUNCHES[kind]
    write("user", backends=faster(name) if name == "cuda" else {})
    tried, arguments = [], linear()

    def fails(*_: Any) -> None:
        tried.append(name)
        raise error

    monkeypatch.setitem(vars(backends()[name]), OP, fails)
    monkeypatch.setitem(vars(backends()["reference"]), OP, lambda *_: "reference")
    next_one = "triton" if name == "cuda" else "reference"
    with pytest.warns(UserWarning, match=rf"linear_w8a8 on {name} could not be launched") as told:
        assert [served_by(arguments) for _ in range(3)] == [next_one] * 3
    assert len([each for each in told if "launched" in str(each.message)]) == 1
    assert tried == [name]
    assert f"{name} refused 3 times: could not be launched" in " ".join(dispatch.dispatch_report().split())
    if name == "triton":  # what was measured is for one size
        assert served_by(linear(rows=9)) == next_one  # another size is tried by itself
        assert tried == [name] * 2
    with dispatch.use_backend(name), pytest.raises(type(error)):  # who asks for a backend is told what happened
        served_by(linear())


def test_a_convolution_that_cannot_be_launched_goes_to_the_next_backend_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes come from torch as lists, which nothing can be looked up by."""
    cpu, tried, arguments = backends()["cpu"], [], example("conv2d_w8a8", SHAPES[0], CPU, torch.float32)

    def fails(*given: Any) -> None:
        tried.append(given)
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setitem(vars(cpu), "serves", lambda _: True)
    monkeypatch.setitem(vars(cpu), "conv2d_w8a8", fails)
    monkeypatch.setitem(vars(cpu), "launch_failure", triton_backend.launch_failure)
    with pytest.warns(UserWarning, match="conv2d_w8a8 on cpu could not be launched"):
        outs = [call(*arguments) for call in (torch.ops.ldmq.conv2d_w8a8.default, ops.conv2d_w8a8)]
    assert len(tried) == 1
    assert any(isinstance(argument, list) for argument in tried[0])
    wanted = backends()["reference"].conv2d_w8a8(*arguments)
    assert all(torch.equal(out, wanted) for out in outs)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_fault_is_no_refusal(name: str, write: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    write("user", backends=faster(name) if name == "cuda" else {})
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails(*_: Any) -> None:
        raise fault

    monkeypatch.setitem(vars(backends()[name]), OP, fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        served_by(linear())


def test_an_op_of_the_cpu_backend_that_is_switched_off_is_the_references() -> None:
    x = torch.randn(3, 8)
    measurements.switch_off("quantize_per_token", "cpu", CPU, "wrong: differs by 1")
    with pytest.warns(UserWarning, match="quantize_per_token on cpu"):
        ops.quantize_per_token(x, None)
    served = [line.split()[:2] for line in dispatch.dispatch_report().splitlines() if "calls" in line]
    assert served == [["quantize_per_token", "reference"]]
    assert measurements.user_file(CPU).name == "no-gpu.json"


def test_what_another_version_switched_off_is_on(write: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements.switch_off(OP, "triton", GPU, "wrong")
    assert "wrong" in str(measurements.switched_off(OP, "triton", GPU))
    monkeypatch.setattr(measurements, "__version__", "99")
    measurements.forget()
    assert measurements.switched_off(OP, "triton", GPU) is None
    assert served_by(linear()) == "triton"
    assert measurements.switch_on(OP, "triton", GPU)


def test_a_file_that_ships_switches_nothing_off(write: Files) -> None:
    measurements.switch_off(OP, "triton", GPU, "wrong")
    content = json.loads(measurements.user_file(GPU).read_text())
    measurements.user_file(GPU).unlink()
    write("shipped", **content)
    assert measurements.switched_off(OP, "triton", GPU) is None


def test_the_reference_cannot_be_switched_off() -> None:
    with pytest.raises(ValueError, match="defines the op"):
        measurements.switch_off(OP, "reference", GPU, "wrong")
    assert not measurements.user_file(GPU).exists()


@pytest.mark.parametrize("content", ["", '{"tiles": {}, "switched_off": 3}', '{"tiles": {}, "switched_off": {"a": 1}}'])
def test_a_damaged_file_is_not_written_over(write: Files, content: str) -> None:
    path = write("user")
    path.write_text(content)
    for change in (
        lambda: measurements.switch_off(OP, "cuda", GPU, "wrong"),
        lambda: measurements.switch_on(OP, "cuda", GPU),
    ):
        with pytest.raises(ValueError, match=r"nvidia-h200\.json is damaged"):
            change()
    assert path.read_text() == content


def test_the_tiles_of_triton_are_read_from_a_file_that_doctor_made() -> None:
    measurements.switch_off(OP, "triton", GPU, "wrong")
    measurements.forget()
    assert tile_choice.measured(HOPPER) == {}
