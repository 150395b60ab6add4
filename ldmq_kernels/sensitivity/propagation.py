"""Where noise comes from and where it is amplified: each block's own noise, its input's, and what it propagates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.outputs import output_tensor
from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.progress import track
from ldmq_kernels.sensitivity.output_noise import swapped


@dataclass(frozen=True)
class BlockNoise:
    """Relative noise powers of one block, or of one layer, in the quantized run of one sampling step.

    Attributes:
        input_noise: noise of the block's input.
        own_noise: noise of its output where it alone is quantized and its input is the float one.
        propagated_noise: noise of its output where it is in float and its input is that of the quantized run;
            `propagated_noise / input_noise` above 1 means that it amplifies.
        total_noise: noise of its output in the quantized run.
    """

    block: str
    step: int
    input_noise: float
    own_noise: float
    propagated_noise: float
    total_noise: float

    @property
    def amplification(self) -> float:
        """How many times larger relative noise leaves the float block than entered it; 0 where none entered."""
        return self.propagated_noise / self.input_noise if self.input_noise > 0 else 0.0


@dataclass
class _Visit:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _visits(model: nn.Module, call: UNetCall, names: list[str]) -> dict[str, _Visit]:
    visits: dict[str, _Visit] = {}

    def keep(name: str) -> Any:
        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            visits[name] = _Visit(args, kwargs, output_tensor(output))

        return after

    handles = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return visits


def _relative(exact: Any, test: Any) -> float:
    """Relative noise power over all floating tensors of two equal trees."""
    signal = noise = 0.0
    for a, b in zip(pytree.tree_leaves(exact), pytree.tree_leaves(test), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            signal += float(a.double().square().sum())
            noise += float((b.double() - a.double()).square().sum())
    return noise / signal if signal > 0 else 0.0


def blocks_of(model: nn.Module) -> list[str]:
    """The residual blocks, transformers, samplers and single layers that hold all quantizable layers."""
    return list(dict.fromkeys(block_of(model, name) for name in quantizable_layers(model)))


@torch.no_grad()
def propagation(
    model: nn.Module, quantized_layers: Mapping[str, nn.Module], trajectory: Trajectory, *, show: bool = False
) -> list[BlockNoise]:
    """Measure every block in a run with all quantized layers in place, call by call along the float trajectory.

    Args:
        model: the float model.
        quantized_layers: layer -> its quantized layer.

    Returns:
        One entry a block and call, in the order of the trajectory.
    """
    blocks = blocks_of(model)
    return [
        entry
        for call in track(trajectory.calls, "noise from block to block", len(trajectory.calls), show=show)
        for entry in _of_call(model, quantized_layers, call, blocks)
    ]


def _of_call(
    model: nn.Module, quantized_layers: Mapping[str, nn.Module], call: UNetCall, blocks: list[str]
) -> Iterator[BlockNoise]:
    exact = _visits(model, call, blocks)
    with swapped(model, quantized_layers):
        noisy = _visits(model, call, blocks)
    for name in blocks:
        if name not in exact:
            continue  # never called
        clean, disturbed = exact[name], noisy[name]
        own = {layer: quantized for layer, quantized in quantized_layers.items() if block_of(model, layer) == name}
        propagated = output_tensor(model.get_submodule(name)(*disturbed.args, **disturbed.kwargs))
        with swapped(model, own):
            alone = output_tensor(model.get_submodule(name)(*clean.args, **clean.kwargs))
        yield BlockNoise(
            name,
            call.step,
            _relative((clean.args, clean.kwargs), (disturbed.args, disturbed.kwargs)),
            _relative(clean.output, alone),
            _relative(clean.output, propagated),
            _relative(clean.output, disturbed.output),
        )
