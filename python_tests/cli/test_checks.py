"""ldmq doctor tells right from wrong; ldmq bench says who served what."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmq_kernels import ops
from ldmq_kernels.cli import checks, layer_times, main
from ldmq_kernels.kernels import dispatch, reference

CPU = torch.device("cpu")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts functions in as a backend named `trial`, the only one that doctor looks at."""

    def put(**functions: Callable[..., Any]) -> None:
        backend = types.ModuleType("ldmq_kernels.kernels.trial")
        vars(backend).update(functions, serves=lambda device: True)
        monkeypatch.setitem(sys.modules, backend.__name__, backend)
        monkeypatch.setattr(dispatch, "BACKENDS", ("trial",))

    return put


def test_every_op_has_a_case_and_the_reference_takes_it_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = [checks.check_op(op, "reference", CPU, dtype) for op in ops.SCHEMAS]
        assert [f.verdict for f in found] == ["ok"] * len(ops.SCHEMAS), found


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


def test_the_exit_code_tells(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    right = {op: getattr(reference, op) for op in ops.SCHEMAS}
    install(**right)
    with pytest.raises(SystemExit, match="0"):
        main(["doctor"])
    install(**right | {"conv2d_w8a8": lambda *a: reference.conv2d_w8a8(*a) * 1.01})
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert "conv2d_w8a8 on trial" in " ".join(capsys.readouterr().out.split())


def test_a_backend_that_the_environment_misspells_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", ("reference",))
    assert checks.run_doctor()
    monkeypatch.setenv("LDMQ_BACKEND", "refrence")
    assert not checks.run_doctor()


def test_what_is_missing_comes_with_a_way_to_get_it() -> None:
    assert "GPU" in checks.missing_why("cuda") or "LDMQ_CUDA_ARCHS" in checks.missing_why("cuda")
    assert "VNNI" in checks.missing_why("cpu") or "x86-64" in checks.missing_why("cpu")


def test_bench_runs_quantized_kernels_beside_float_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(layer_times, "LINEARS", ((16, 32, 32),))
    monkeypatch.setattr(layer_times, "CONVOLUTIONS", ((1, 8, 8, 8, 8),))
    monkeypatch.setattr(layer_times, "ROUNDS", 1)
    layer_times.run_bench()
    told = capsys.readouterr().out
    for op in ("linear_w8a8", "linear_w8a16", "conv2d_w8a8", "conv2d_w8a16", "quantize_per_sample"):
        assert op in told
