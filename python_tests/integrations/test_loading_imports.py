"""A server that loads a quantized checkpoint pays for the loader, and not for the planner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ldmq_kernels as ldmq
from python_tests.tiny import mixed_plan, tiny_unet

LOAD = """
import json, sys
import ldmq_kernels
from diffusers import UNet2DConditionModel
UNet2DConditionModel.from_pretrained(sys.argv[1])
before = set(sys.modules)
unet = UNet2DConditionModel.from_pretrained(sys.argv[2])
assert any(type(module).__name__ == "QuantLinear" for module in unet.modules())
print(json.dumps({"before": sorted(before), "after": sorted(sys.modules)}))
"""
PLANNER = ("ldmq_kernels.planning", "ldmq_kernels.sensitivity", "ldmq_kernels.report")


@pytest.mark.slow
def test_loading_a_quantized_model_imports_neither_planner_nor_scipy(tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.save_pretrained(tmp_path / "float")
    ldmq.quantize(unet, mixed_plan(unet)).save_pretrained(tmp_path / "quantized")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "float"), str(tmp_path / "quantized")]
    modules = json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1])
    assert not [name for name in modules["after"] if name.startswith(PLANNER)]
    added = {name.partition(".")[0] for name in set(modules["after"]) - set(modules["before"])}
    assert not added & {"scipy", "matplotlib", "rich", "typer"}
    assert "ldmq_kernels.integrations.diffusers.quantizer" in modules["after"]
