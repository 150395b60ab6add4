"""Quantized layers and models arrive in spawned processes, packed ones too, with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from ldmq_kernels.conversion import convert
from ldmq_kernels.nn import QuantizedLayer
from python_tests.nn.layers import quantized
from python_tests.tiny import SHALLOW, mixed_plan, run_unet, tiny_unet

SCHEMES = ("w8a8-dynamic", "w4a8-static", "w8a16")
X, PICTURE = torch.arange(144.0).sin().reshape(2, 72), torch.arange(600.0).cos().reshape(2, 12, 5, 5)


def outputs(models: Any) -> list[Tensor]:
    linears, convolutions, unet = models
    with torch.no_grad():
        return [layer(X) for layer in linears] + [layer(PICTURE) for layer in convolutions] + [run_unet(unet)]


def answer(models: Any, connection: Any) -> None:
    torch.set_num_threads(1)
    connection.send([out.numpy() for out in outputs(models)])


@pytest.mark.slow
def test_a_spawned_process_gets_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linears = nn.ModuleList(quantized(nn.Linear(72, 20), scheme) for scheme in SCHEMES)
    convolutions = nn.ModuleList(quantized(nn.Conv2d(12, 8, 3, padding=1), scheme) for scheme in SCHEMES)
    unet = tiny_unet(**SHALLOW)
    convert(unet, mixed_plan(unet))
    models = linears, convolutions, unet
    wanted = outputs(models)
    monkeypatch.setattr("ldmq_kernels.kernels.cpu.backend.serves", lambda device: True)
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, QuantizedLayer)]
    for layer in layers:
        layer.unpack()
        layer.finish()
    assert sum(layer.packed_weight is not None for layer in layers) > 10
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(models, there))
    process.start()
    there.close()
    try:
        for found, expected in zip(here.recv(), wanted, strict=True):
            assert torch.equal(torch.from_numpy(found), expected)
    finally:
        process.join()
    assert all(layer.packed_weight is not None for layer in layers[:2])
