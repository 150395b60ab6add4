"""How long each layer would take in each scheme on a device that is not there: predicted, where `times` measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.kernels.devices import Device
from ldmq_kernels.nn import quantized_class
from ldmq_kernels.nn.kinds import FloatLayer
from ldmq_kernels.numerics.formats import FLOAT, Scheme
from ldmq_kernels.planning.times import LayerTimes
from ldmq_kernels.plans.layers import layer_input, quantizable_layers
from ldmq_kernels.prediction import Operation, predict, record
from ldmq_kernels.prediction.predict import Backend
from ldmq_kernels.sensitivity.analysis import Analysis

HALF_BYTES = 2
BACKEND: Backend = "triton"  # what every install has


@torch.inference_mode()
def predict_times(model: nn.Module, analysis: Analysis, call: UNetCall, device: Device) -> LayerTimes:
    """Predict the time of every layer alone, in 16 bit and in each of its candidates, and of all beside the layers.

    As where layers are measured, what fused blocks save comes on top. The float model is taken to run in 16 bit,
    whatever it computes in here.

    Args:
        model: the float model.
        call: a recorded call for one picture, which is run once.
        device: of the table of data sheets.
    """
    layers = quantizable_layers(model)
    inputs: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def observe(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.setdefault(name, tuple(layer_input(args, kwargs).shape))

        return observe

    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        operations = record(model, lambda: call.run(model))
    finally:
        for handle in handles:
            handle.remove()
    size = call.output.element_size()
    beside = [_in_half(operation, size) for operation in operations if operation.layer not in layers]
    known: dict[tuple[Any, ...], float] = {}
    times: dict[tuple[str, str], float] = {}
    for name, shape in inputs.items():
        schemes = [FLOAT, *(candidate.layer_plan.scheme for candidate in analysis.candidates.get(name, []))]
        for scheme in schemes:
            key = (repr(layers[name]), shape, str(scheme))
            if key not in known:
                known[key] = _layer_ms(layers[name], scheme, shape, device)
            times[name, str(scheme)] = known[key]
    return LayerTimes(times, predict(beside, device, BACKEND).milliseconds, predicted_for=device.name)


def _layer_ms(layer: FloatLayer, scheme: Scheme, shape: tuple[int, ...], device: Device) -> float:
    """One layer alone, on the meta device, in half precision."""
    on_meta = _on_meta(layer, scheme)
    x = torch.empty(shape, device="meta", dtype=torch.float16)
    return predict(record(on_meta, lambda: on_meta(x)), device, BACKEND).milliseconds


def _on_meta(layer: FloatLayer, scheme: Scheme) -> nn.Module:
    made = quantized_class(layer).empty(layer, scheme)
    return made if scheme.quantizes else made.half()


def _in_half(operation: Operation, size: int) -> Operation:
    """The same on tensors of two bytes in place of `size`."""

    def halved(tensors: Mapping[int, int]) -> dict[int, int]:
        return {tensor: count * HALF_BYTES // size for tensor, count in tensors.items()}

    return replace(operation, reads=halved(operation.reads), writes=halved(operation.writes))
