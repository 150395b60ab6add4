"""ldmq doctor tells right from wrong; ldmq bench says who served what."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmq_kernels import ops, timing
from ldmq_kernels.cli import checks, main, op_speed
from ldmq_kernels.cli.bench import layer_times
from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import Backend, backends
from ldmq_kernels.kernels.reference import backend as reference
from ldmq_kernels.ops.operands import Shape, example
from ldmq_kernels.tuning.calls import Call
from ldmq_kernels.tuning.shapes import Conv2d, Linear

CPU = torch.device("cpu")
RIGHT = {op: getattr(reference, op) for op in ops.specs()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of measurements, forgotten afterwards; the file of this device in it."""
    monkeypatch.setenv("LDMQ_CACHE", str(tmp_path / "cache"))
    measurements.forget()
    yield measurements.user_file(CPU)
    measurements.forget()


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without its line breaks."""
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions in as a backend named `trial`, the only one that doctor looks at."""

    def put(**functions: Callable[..., Any]) -> None:
        trial = Backend()
        vars(trial).update(functions, name="trial", serves=lambda device: True, tiles=backends()["triton"].tiles)
        both = {"trial": trial, "reference": reference}
        monkeypatch.setattr(checks, "backends", lambda: both)
        monkeypatch.setattr(checks, "served_device", lambda backend: CPU if backend == "trial" else None)

    return put


def test_every_op_has_a_case_and_the_reference_takes_it_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = [checks.check_op(op, "reference", CPU, dtype) for op in ops.specs()]
        assert [f.verdict for f in found] == ["ok"] * len(ops.specs()), found


def test_integers_that_are_off_by_one_are_wrong(install: Callable[..., None]) -> None:
    def off_by_one(*arguments: Any) -> torch.Tensor:
        right = reference.quantize_static(*arguments)
        right.view(-1)[5] += 1
        return right

    install(quantize_static=off_by_one)
    assert checks.check_op("quantize_static", "trial", CPU, torch.float32).verdict == "wrong"


def test_a_forgotten_bias_is_wrong_and_a_rounding_is_not(install: Callable[..., None]) -> None:
    install(
        linear_w8a16=lambda x, w, s, bias: reference.linear_w8a16(x, w, s, None),
        linear_w8a8=lambda *a: reference.linear_w8a8(*a).nextafter(torch.tensor(torch.inf)),
    )
    assert checks.check_op("linear_w8a16", "trial", CPU, torch.float32).verdict == "wrong"
    assert checks.check_op("linear_w8a8", "trial", CPU, torch.float32).verdict == "ok"


def test_not_a_number_is_wrong(install: Callable[..., None]) -> None:
    install(linear_w8a16=lambda *a: reference.linear_w8a16(*a) * torch.nan)
    assert checks.check_op("linear_w8a16", "trial", CPU, torch.float32).is_bad


def test_refusing_is_allowed_and_crashing_is_not(install: Callable[..., None]) -> None:
    def refuse(*_: Any) -> None:
        raise dispatch.Unsupported("channels must be a multiple of 16")

    def crash(*_: Any) -> None:
        raise RuntimeError("illegal instruction")

    install(linear_w4a8=refuse, linear_w4a16=crash)
    refused = checks.check_op("linear_w4a8", "trial", CPU, torch.float32)
    assert (refused.verdict, refused.detail, refused.is_bad) == ("refuses", "channels must be a multiple of 16", False)
    assert checks.check_op("linear_w4a16", "trial", CPU, torch.float32).is_bad


def test_a_kernel_that_is_wrong_at_one_size_alone_is_wrong(install: Callable[..., None]) -> None:
    for sizes in checks.SHAPES:

        def wrong_at_one(x: torch.Tensor, *rest: Any, channels: int = sizes.channels) -> torch.Tensor:
            right = reference.linear_w8a8(x, *rest)
            return right * 1.01 if x.shape == (sizes.tokens, channels) else right  # noqa: B023

        install(linear_w8a8=wrong_at_one)
        found = checks.check_op("linear_w8a8", "trial", CPU, torch.float32)
        assert found.verdict == "wrong"
        assert f"at {sizes.tokens}x{sizes.channels} to {sizes.out}, torch.float32" in found.detail


def test_a_kernel_that_is_wrong_at_a_size_of_models_alone_is_wrong_and_switched_off(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_at_it(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        right = reference.linear_w8a8(x, *rest)
        return right * 1.01 if len(x) == 48 else right

    install(**RIGHT | {"linear_w8a8": wrong_at_it})
    call = Call(
        "linear_w8a8", Linear(1, 48, 32, 24), lambda: example("linear_w8a8", Shape(48, 32, 24), CPU, torch.half)
    )
    monkeypatch.setattr(checks.model_sizes, "compared", lambda op, *_: [call] if op == "linear_w8a8" else [])
    assert checks.check_op("linear_w8a8", "trial", CPU, torch.float32).verdict == "ok"
    monkeypatch.setattr(checks, "WHOLE_MODELS_ON", ("cpu",))
    found = checks.check_op("linear_w8a8", "trial", CPU, torch.float32)
    assert found.verdict == "wrong"
    assert "at 48x32 to 24" in found.detail
    assert not checks.run_doctor()
    assert "at 48x32 to 24" in str(measurements.switched_off("linear_w8a8", "trial", CPU))


def test_a_wrong_scale_of_a_producer_is_wrong(install: Callable[..., None]) -> None:
    def double_scale(*arguments: Any) -> tuple[torch.Tensor, ...]:
        q, scale = reference.silu_quantize(*arguments)
        return q, scale * 1.001

    install(silu_quantize=double_scale)
    assert checks.check_op("silu_quantize", "trial", CPU, torch.float32).verdict == "wrong"


def test_refusing_some_sizes_is_told_beside_the_time(install: Callable[..., None]) -> None:
    def aligned_only(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        if x.shape[-1] % 64:
            raise dispatch.Unsupported("channels must be a multiple of 64")
        return reference.linear_w8a8(x, *rest)

    install(linear_w8a8=aligned_only)
    found = checks.check_op("linear_w8a8", "trial", CPU, torch.float32)
    assert found.verdict == "ok"
    refused = sum(sizes.channels % 64 != 0 for sizes in checks.SHAPES)
    assert 0 < refused < len(checks.SHAPES)
    assert f"refuses {refused} of {len(checks.SHAPES)} shapes: channels must be a multiple of 64" in found.detail


def test_the_exit_code_tells(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install(**RIGHT)
    with pytest.raises(SystemExit, match="0"):
        main(["doctor"])
    install(**RIGHT | {"conv2d_w8a8": lambda *a: reference.conv2d_w8a8(*a) * 1.01})
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert "not right: conv2d_w8a8 on trial" in told(capsys)


@pytest.mark.parametrize("width", [66, 80, 120, 200, None])
def test_no_gain_and_no_reason_is_cut_at_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int | None
) -> None:
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    refusal = "channels must be a multiple of 16, and a [last] dimension contiguous"

    def check(op: str, backend: str, *_: Any) -> checks.Finding:
        verdict, detail = ("refuses", refusal) if op.startswith("conv2d") else ("ok", "12345.67 ms")
        return checks.Finding(op, backend, verdict, detail, 123.45)

    monkeypatch.setattr(checks, "check_op", check)
    monkeypatch.setattr(checks, "backends", lambda: {"reference": reference})
    assert checks.run_doctor()
    lines = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(lines)
    for op in ops.specs():
        (line,) = (line for line in lines if f" {op} " in line)
        assert "123.45x" in line
        assert ("12345.67 ms" in line) != op.startswith("conv2d")
    shown = " ".join(lines)
    assert all(word in shown for word in refusal.split())
    if width is None:
        assert refusal in shown
    else:
        table = lines[next(i for i, line in enumerate(lines) if "every op against its definition" in line) :]
        assert max(map(len, table)) <= width


def test_what_fails_is_switched_off_until_it_passes(
    install: Callable[..., None], own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("illegal instruction")

    install(**RIGHT | {"linear_w8a8": lambda *a: reference.linear_w8a8(*a) * 1.01, "geglu_quantize": crash})
    assert not checks.run_doctor()
    out = told(capsys)
    assert "switched off: linear_w8a8 on trial, wrong: differs by up to" in out
    assert "switched off: geglu_quantize on trial, fails: RuntimeError: illegal instruction" in out
    assert set(json.loads(own_cache.read_text())["switched_off"]) == {"linear_w8a8", "geglu_quantize"}
    assert "illegal instruction" in str(measurements.switched_off("geglu_quantize", "trial", CPU))
    install(**RIGHT | {"geglu_quantize": crash})
    assert not checks.run_doctor()
    assert "switched on again: linear_w8a8 on trial" in told(capsys)
    assert measurements.switched_off("linear_w8a8", "trial", CPU) is None
    install(**RIGHT)
    assert checks.run_doctor()
    assert json.loads(own_cache.read_text())["switched_off"] == {}


def test_a_full_memory_switches_nothing_off(install: Callable[..., None], own_cache: Path) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    install(**RIGHT | {"linear_w8a8": too_large})
    assert not checks.run_doctor()
    assert not own_cache.exists()


def test_the_reference_is_never_switched_off(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(checks, "backends", lambda: {"reference": reference})
    monkeypatch.setattr(reference, "silu_quantize", lambda *_: torch.full((1,), torch.nan))
    assert not checks.run_doctor()
    assert not own_cache.exists()


def test_a_folder_that_cannot_be_written_is_told(
    install: Callable[..., None], own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.parent.write_text("a file in the folder's place")
    install(**RIGHT | {"linear_w8a8": lambda *a: reference.linear_w8a8(*a) * 1.01})
    assert not checks.run_doctor()
    assert "linear_w8a8 on trial could not be switched" in told(capsys)


@pytest.mark.parametrize("content", ["{", '{"tiles": {"linear_w8a8 1x1x1": {"rows": 1}}}'])
def test_a_damaged_file_ends_the_check_before_it_blames_the_kernels(
    install: Callable[..., None], own_cache: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text(content)
    measurements.forget()
    install(**RIGHT)
    assert not checks.run_doctor()
    assert "no-gpu.json is damaged" in told(capsys)
    assert own_cache.read_text() == content
    measurements.forget()


def test_a_switch_with_another_word_ends_the_check_before_it_blames_the_kernels(
    install: Callable[..., None], own_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDMQ_PDL", "on")
    install(**RIGHT)
    assert not checks.run_doctor()
    assert "LDMQ_PDL is 'on', must be 0 or 1" in told(capsys)
    assert not own_cache.exists()


def test_a_user_without_a_home_gets_a_whole_check_and_one_warning(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LDMQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    measurements.forget()
    measurements.warn_once.cache_clear()
    install(**RIGHT)
    with pytest.warns(UserWarning, match="set LDMQ_CACHE") as warned:
        assert checks.run_doctor()
    assert "all is well" in told(capsys)
    assert len(warned) == 1
    measurements.forget()


def test_after_a_kernel_that_ends_all_work_on_the_gpu_nothing_else_is_blamed(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killer is switched off, and comes last in the next run."""
    checked: list[str] = []

    def check(op: str, backend: str, *_: Any) -> checks.Finding:
        checked.append(op)
        return checks.Finding(op, backend, "fails" if op == "linear_w8a8" else "ok", "CUDA error")

    served = {"trial": torch.device("cuda", 0)}
    monkeypatch.setattr(checks, "check_op", check)
    monkeypatch.setattr(checks, "_is_usable", lambda _: False)
    monkeypatch.setattr(measurements, "switched_off", lambda *_: None)
    found = {finding.op: finding for finding in checks._findings(served)}
    assert [op for op, finding in found.items() if finding.is_bad] == ["linear_w8a8"]
    assert found["quantize_static"].verdict == "not checked"
    assert "linear_w8a8 on trial left the GPU unusable" in found["quantize_static"].detail
    monkeypatch.setattr(measurements, "switched_off", lambda op, *_: "fails" if op == "linear_w8a8" else None)
    checked.clear()
    assert list(found) == [finding.op for finding in checks._findings(served)] == list(ops.specs())
    assert checked[-1] == "linear_w8a8"
    assert set(checked) == set(ops.specs())


def test_the_gain_is_over_torch_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_speed, "LINEAR", Linear(1, 32, 16, 24))
    monkeypatch.setattr(op_speed, "CONVOLUTION", Conv2d(1, 1, 16, 8, 24))
    outputs: list[torch.Tensor] = []

    def clock(call: Callable[[], torch.Tensor], _device: torch.device) -> float:
        outputs.append(call())
        rivals = torch.nn.functional.linear, torch.nn.functional.conv2d, op_speed.geglu
        return 3.0 if call.func in rivals else 1.0  # type: ignore[attr-defined]

    monkeypatch.setattr(timing, "one_call_ms", clock)
    for op in ops.specs():
        outputs.clear()
        found = op_speed.measure(op, getattr(reference, op), CPU)
        if not op.startswith(("linear", "conv2d")):
            assert found is None
            continue
        assert found == (1.0, 3.0)
        assert len({out.shape for out in outputs}) == 1
        assert {out.dtype for out in outputs} - {torch.int8} == {
            torch.float16
        }  # GEGLU's is quantized for the next layer


def test_a_backend_that_the_environment_misspells_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "backends", lambda: {"reference": reference})
    assert checks.run_doctor()
    monkeypatch.setenv("LDMQ_BACKEND", "refrence")
    assert not checks.run_doctor()


def test_what_is_missing_comes_with_a_way_to_get_it() -> None:
    on_gpu, on_cpu = backends()["cuda"].why_not(torch.device("cuda")), backends()["cpu"].why_not(CPU)
    assert "GPU" in on_gpu or "LDMQ_CUDA_ARCHS" in on_gpu
    assert "VNNI" in on_cpu or "x86-64" in on_cpu


def test_bench_runs_quantized_kernels_beside_float_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer_times, "LINEARS", ((16, 32, 32),))
    monkeypatch.setattr(layer_times, "CONVOLUTIONS", ((1, 8, 8, 8, 8),))
    monkeypatch.setattr(layer_times, "ROUNDS", 1)
    layer_times.run_bench()
    out = capsys.readouterr().out
    for op in ("linear_w8a8", "linear_w8a16", "conv2d_w8a8", "conv2d_w8a16", "quantize_per_sample"):
        assert op in out
