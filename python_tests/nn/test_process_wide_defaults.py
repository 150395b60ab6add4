"""The first use of the package is right whatever torch's default dtype and device are in this process."""

from __future__ import annotations

import pytest

from python_tests.processes import run_each_anew

SCRIPT = """
import copy
import itertools
import torch
from torch import nn
torch.manual_seed(0)
linear, conv = nn.Linear(64, 48), nn.Conv2d(8, 16, 3, padding=1)
x, picture = torch.randn(3, 64), torch.randn(1, 8, 8, 8)
from ldmq_kernels.nn import QuantConv2d, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.nn.timestep_groups import _on_device
cpu = torch.device("cpu")

def outputs():
    found = []
    names = ("w8a8-dynamic", "w8a8-timestep", "w8a8-rotated", "w8a8x2", "w4a8-dynamic", "w8a16", "w4a16")
    for name, dtype in itertools.product(names, (torch.float32, torch.float16)):
        split = torch.tensor([0.03], dtype=torch.float32, device=cpu) if name == "w8a8x2" else None
        scale = torch.tensor([0.03, 0.02], dtype=torch.float32, device=cpu) if "timestep" in name else split
        for kind, layer, inputs in ((QuantLinear, linear, x), (QuantConv2d, conv, picture)):
            if kind.kind in SCHEMES[name].format.layers:
                own, given = copy.deepcopy(layer).to(dtype), inputs.to(dtype)
                quantized = kind.from_float(own, SCHEMES[name], input_scale=scale)
                found += [quantized(given), quantized(given[:0])]
    return [*found, _on_device(321.0, cpu)]

with torch.no_grad():
    CHANGE
    changed = outputs()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    for a, b in zip(changed, outputs(), strict=True):
        assert a.dtype == b.dtype and a.dtype in (torch.float32, torch.float16), (a.dtype, b.dtype)
        assert a.device == b.device, (a.device, b.device)
        assert torch.equal(a, b)
"""


CHANGES = ("dtype(torch.bfloat16)", "dtype(torch.float16)", "dtype(torch.float64)", 'device("meta")')


@pytest.mark.slow
def test_a_first_use_under_other_defaults_is_as_any() -> None:
    run_each_anew([SCRIPT.replace("CHANGE", f"torch.set_default_{change}") for change in CHANGES])
