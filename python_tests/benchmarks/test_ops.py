"""Every op's benchmark runs beside its baselines, at sizes that take no time, and the command says what it takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.commands import op as command
from benchmarks.harness import cases, results, shapes
from benchmarks.harness.baselines import BASELINES
from ldmq_kernels.ops import specs

SMALL = {shapes.LINEAR: "24x32x64", shapes.TOKENS: "24x64", shapes.CONV2D: "1x32x6x6x32", shapes.IMAGE: "1x32x6x6"}


def test_every_op_has_a_benchmark() -> None:
    assert set(results.OPS) == set(specs())


@pytest.mark.parametrize("op", specs())
def test_an_op_is_measured_beside_its_baselines(op: str) -> None:
    module = importlib.import_module(f"benchmarks.ops.{op}")
    case = module.case(module.SHAPE.parse(SMALL[module.SHAPE]))
    (row,) = cases.measure([case], rounds=1)
    assert set(row["rivals"]) | set(row.get("notes", {})) == set(cases.usual(case))
    assert set(row["rivals"]) >= {"bf16"} or set(row["rivals"]) >= {"eager", "copy"}
    assert row["op"] == op
    assert row["backend"] == cases.own_backends(op)[0]
    assert row["ms"] > 0
    assert row["gbps"] > 0
    assert ("tops" in row) == bool(case.work)
    assert ("share_of_copy_bandwidth" in row) == bool(case.input_bytes)
    if hasattr(module, "summary"):
        json.dumps(module.summary([row]))


@pytest.mark.parametrize("op", specs())
def test_every_name_that_an_op_takes_is_made_and_described(op: str) -> None:
    module = importlib.import_module(f"benchmarks.ops.{op}")
    case = module.case(module.SHAPE.parse(SMALL[module.SHAPE]))
    named = {*case.baselines, *case.on_request}
    assert set(case.make()) == {"ldmq", *named}
    assert named <= set(BASELINES)
    module.case(module.SHAPE.parse(module.SHAPE.example))
    assert list(module.cases())


def test_the_command_prints_what_was_asked_for_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["linear_w8a8", "--device", "cpu", "--shape", "32x16x64", "--against", "bf16,fp8,reference"]
    command.main([*arguments, "--rounds", "2", "--json", str(out)])
    data = json.loads(out.read_text())
    (row,) = data["rows"]
    assert row["shape"] == {"M": 32, "K": 64, "N": 16}
    assert set(row["rivals"]) == {"bf16", "reference"}
    assert "needs a GPU" in row["notes"]["fp8"]
    printed = capsys.readouterr().out
    assert command.text(row, work=2e-9 * 32 * 16 * 64) in printed
    assert f"{row['rivals']['bf16']['ratio']:.2f}x as fast" in printed
    assert "fp8 is left out" in printed
    assert data["device"] in printed


def test_a_convolution_takes_its_kernel_beside_its_shape() -> None:
    (case,) = command.cases_of("conv2d_w8a8", ["1x32x6x6x16"], None, {"kernel": 1, "stride": 2})
    assert case.shape == {"N": 1, "C": 32, "H": 6, "W": 6, "K": 16, "kernel": 1, "stride": 2}
    assert case.work == 2e-9 * 9 * 32 * 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["linear_w9a9"], "there is no op linear_w9a9: there are conv2d_fp8"),
        (["linear_w8a8", "--against", "int_mm,cutlass"], "not measured beside cutlass; it is beside"),
        (["quantize_static", "--against", "int_mm"], "quantize_static is not measured beside int_mm"),
        (["linear_w8a8", "--shape", "4096x1280"], "the shape 4096x1280 is not MxNxK"),
        (["linear_w8a8", "--kernel", "3"], "--kernel goes with the --shape of a convolution"),
        (["conv2d_w8a8", "--shape", "2x320"], "is not NxCxHxWxK"),
    ],
)
def test_the_command_says_what_it_takes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, "--device", "cpu"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
