"""Where noise is born and where it is amplified: a block's own noise beside what it receives and passes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.calibration.trajectory import Trajectory, UNetCall, output_tensor
from ldmq_kernels.plans.blocks import block_of
from ldmq_kernels.plans.layers import quantizable_layers
from ldmq_kernels.progress import track
from ldmq_kernels.sensitivity.output_noise import swapped


@dataclass(frozen=True)
class BlockNoise:
    """Relative noise powers of one block, or of one layer, in the quantized run of one sampling step.

    Attributes:
        received: of its input.
        born: of its output where it alone is quantized and its input is exact.
        passed: of its output where it is exact and its input is as received; `passed / received` above 1
            means that it amplifies.
        total: of its output in the quantized run.
    """

    block: str
    step: int
    received: float
    born: float
    passed: float
    total: float

    @property
    def amplification(self) -> float:
        """How many times larger relative noise leaves the exact block than entered it; 0 where none entered."""
        return self.passed / self.received if self.received > 0 else 0.0


@dataclass
class _Visit:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _visits(model: nn.Module, call: UNetCall, names: list[str]) -> dict[str, _Visit]:
    found: dict[str, _Visit] = {}

    def keep(name: str) -> Any:
        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[name] = _Visit(args, kwargs, output_tensor(output))

        return after

    handles = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    try:
        model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


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
    model: nn.Module, copies: Mapping[str, nn.Module], trajectory: Trajectory, *, show: bool = False
) -> list[BlockNoise]:
    """Measure every block in a run with all `copies` in place, call by call along the float trajectory.

    Args:
        model: the float model.
        copies: layer -> its quantized layer.

    Returns:
        One entry a block and call, in the order of the trajectory.
    """
    blocks = blocks_of(model)
    return [
        entry
        for call in track(trajectory.calls, "noise from block to block", len(trajectory.calls), show=show)
        for entry in _of_call(model, copies, call, blocks)
    ]


def _of_call(
    model: nn.Module, copies: Mapping[str, nn.Module], call: UNetCall, blocks: list[str]
) -> Iterator[BlockNoise]:
    exact = _visits(model, call, blocks)
    with swapped(model, copies):
        noisy = _visits(model, call, blocks)
    for name in blocks:
        if name not in exact:
            continue  # never called
        clean, seen = exact[name], noisy[name]
        own = {layer: copy for layer, copy in copies.items() if block_of(model, layer) == name}
        passed = output_tensor(model.get_submodule(name)(*seen.args, **seen.kwargs))
        with swapped(model, own):
            born = output_tensor(model.get_submodule(name)(*clean.args, **clean.kwargs))
        yield BlockNoise(
            name,
            call.step,
            _relative((clean.args, clean.kwargs), (seen.args, seen.kwargs)),
            _relative(clean.output, born),
            _relative(clean.output, passed),
            _relative(clean.output, seen.output),
        )
