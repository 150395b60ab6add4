"""Whole models, the machine and cold starts are measured, at sizes that take no time."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from benchmarks.commands import all as every
from benchmarks.commands import model as command
from benchmarks.commands.predict import recorded
from benchmarks.harness.baselines import TOOLS
from benchmarks.machine import ceilings, host_time
from benchmarks.models import cpu, cpu_rivals, gpu, memory
from benchmarks.models.definitions import MODELS, TOYS
from ldmq_kernels import ops
from ldmq_kernels.kernels.devices import DEVICES
from ldmq_kernels.numerics.sqnr import sqnr_db
from ldmq_kernels.prediction import predict

ROOT = Path(__file__).parents[2]
# kernels that one UNet call compiles on an H100, by model; each takes 0.2 to 0.5 s on a CPU core
MOST_KERNELS = {"unet_sd15": 110, "unet_sdxl": 60}


@pytest.mark.parametrize("name", TOYS)
def test_a_model_is_measured(name: str) -> None:
    (row,) = gpu.measure(name, TOYS[name], torch.float32, rounds=1)
    assert set(row["ms"]) == {"ldmq_eager", "eager_fp16"}
    assert 0.25 < row["summary"]["weights/w8_share_of_fp16"] < 0.6
    key = name if name == "vae_decoder" else f"unet_{name}"
    assert row["summary"][f"{key}/ms"] == row["ms"]["ldmq_eager"]
    assert "| ldmq_eager |" in gpu.table({"rows": [row]})


def test_a_backend_can_be_offered_every_call_first_and_the_row_says_who_served() -> None:
    def served() -> dict[str, dict[str, int]]:
        return gpu.served(lambda: ops.quantize_per_token(torch.randn(3, 8), None)[1])

    before = served()
    with gpu.served_first("reference"):
        assert served() == {"quantize_per_token": {"reference": 1}}
    assert served() == before


def test_memory_is_told_after_the_first_size_and_after_every_so_many() -> None:
    before = memory.resident_mb()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 < memory.resident_mb() - before < 70
    del block
    assert [seen for seen, _ in memory.growth(7, 3)] == [1, 3, 6]


def test_a_model_is_measured_on_a_cpu_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.SUBJECTS, "sd15", cpu.SUBJECTS["sd15"]._replace(model=TOYS["sd15"]))
    monkeypatch.setattr(cpu, "memory_of", lambda name, variant: {"imports": 1, "peak": 4 if variant == "fp32" else 1})
    rows = list(cpu.measure("sd15", rounds=1))
    assert [row["name"] for row in rows] == ["fp32", "bf16", "w8a8"]
    summary = rows[-1]["summary"]
    assert summary["unet_sd15_cpu/peak_memory_share"] == 0.25
    assert summary["unet_sd15_cpu/vs_bf16"] == rows[1]["ms"] / rows[2]["ms"]
    shown = cpu.table({"rows": rows, "summary": summary, "threads": 1})
    assert "UNet of SD 1.5's size" in shown
    assert all(f"| {cpu.WORDS[row['name']]} |" in shown for row in rows)
    (alone,) = cpu.measure("sd15", rounds=1, against=())
    assert alone["name"] == "w8a8"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp32", cpu.OURS])
def test_a_transformer_with_buffers_and_text_runs_on_a_cpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = diffusers.PixArtTransformer2DModel
    narrow = functools.partial(kind, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32)
    monkeypatch.setattr(diffusers, "PixArtTransformer2DModel", narrow)
    assert cpu.caller("pixart", variant)().isfinite().all()


@pytest.mark.parametrize("rival", [name for name in cpu.RIVALS if name != "bf16"])
def test_a_rival_computes_the_same_model(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := cpu_rivals.missing(rival):
        pytest.skip(why)
    monkeypatch.setitem(cpu.SUBJECTS, "sd15", cpu.SUBJECTS["sd15"]._replace(model=TOYS["sd15"]))
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    wanted, out = cpu.caller("sd15", "fp32")(), cpu.caller("sd15", rival)()
    out = out if isinstance(out, torch.Tensor) else torch.as_tensor(out[0])
    assert out.shape == wanted.shape
    assert out.isfinite().all()
    if rival in ("openvino_int8", "torchao", "sdnq"):  # of random weights no more is to be expected of int8
        assert not torch.equal(out, wanted)
    else:
        assert sqnr_db(wanted, out) > 40


def test_a_rival_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rivals, "multiplies_bf16", lambda: False)
    assert cpu_rivals.missing("bf16") == "this processor has no bfloat16 products"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r benchmarks/requirements-openvino.txt" in str(cpu_rivals.missing("openvino_int8"))
    assert "pip install --no-deps -r benchmarks/requirements-peers.txt" in str(cpu_rivals.missing("sdnq"))
    assert cpu.usual_rivals() == ["fp32", "compiled"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sd15", "--against", "cutlass"], "no model is measured beside cutlass here; it is beside fp32, bf16"),
        (["demo", "--toy"], "demo is measured on a CPU, with --device cpu and without --toy"),
        (["sd15", "--toy", "--record"], "a toy is no result"),
    ],
)
def test_the_command_says_what_it_takes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*arguments, "--device", "cpu"])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_another_tool_quantizes_a_copy(tool: str) -> None:
    pytest.importorskip(tool.removesuffix("_fp8"))
    if tool.endswith("fp8") and not torch.cuda.is_available():
        pytest.skip("torchao's FP8 needs a GPU")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 32)).to(torch.bfloat16)
    x = torch.randn(40, 64).to(torch.bfloat16)
    with torch.no_grad():
        wanted, out = model(x), TOOLS[tool](model)(x)
    assert not torch.equal(out, wanted)
    assert (out - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_ceilings_and_host_time_are_measured() -> None:
    rows = list(ceilings.measure(rounds=1))
    assert {row["name"] for row in rows} == {"256^3", "copy"}
    assert "GB/s" in "\n".join(map(ceilings.text, rows))
    assert host_time.microseconds("quantize_static") > 0


def test_all_is_each_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[list[str]] = []

    def note(command: list[str]) -> Any:
        run.append(command[3:])
        return subprocess.CompletedProcess(command, int(command[3:5] == ["op", "linear_w8a8"]))

    monkeypatch.setattr(every.subprocess, "run", note)
    assert every.main(["--device", "cpu"]) == 1
    assert len(run) == len(every.commands("cpu")) == len({tuple(command) for command in run})
    assert all(command[-1] == "--record" for command in run)


@pytest.mark.slow
def test_a_cold_start_compiles_few_kernels() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "compilations"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 4
    for row in found:
        assert 20 < row["kernels"] <= MOST_KERNELS[row["op"]]
        assert row["launches"] < 2000
    predicted = predict(recorded(MODELS["sd15"], "w8a8-dynamic"), DEVICES["h200"], "triton").rows
    (counted,) = (row for row in found if (row["op"], row["scheme"]) == ("unet_sd15", "w8a8-dynamic"))
    assert sum(row.launches for row in predicted if row.op in ops.specs()) == counted["launches"]
