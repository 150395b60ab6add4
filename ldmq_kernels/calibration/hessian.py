"""The Hessians of layers: the second moments of their inputs, by which GPTQ rounding weighs errors."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import Trajectory, replay
from ldmq_kernels.nn.kinds import FloatConvolution, FloatLayer, axes_of, watch_product
from ldmq_kernels.numerics.sums import is_finite
from ldmq_kernels.plans.layers import layer_input, quantizable_layers

ROWS_PER_CALL = 512


def hessian_bytes(layer: FloatLayer) -> int:
    """Bytes of a layer's Hessian: (K, K) float32."""
    return 4 * layer.weight[0].numel() ** 2


def input_hessians(
    model: nn.Module, trajectory: Trajectory, layers: Sequence[str], *, rows_per_call: int = ROWS_PER_CALL
) -> dict[str, Tensor]:
    """The sum of x x^T over what each layer multiplies its weight with, along a recorded trajectory.

    Rows beyond `rows_per_call` are sampled, the same ones each time, and the sum is scaled up to stand
    for all. The result takes 4 K^2 bytes a layer, half a gigabyte where K = 11520: ask for few of the
    large layers at once.

    Args:
        model: the full-precision model that the trajectory was recorded of.
        layers: names of linears and of convolutions that are not grouped.
        rows_per_call: tokens or output positions of a layer, over the batch, taken in one call of the model.

    Returns:
        layer -> (K, K) float32 on the model's device. K is in the order of a linear's channels or of a
        convolution's (R, S, C); zeros where the layer is never called.

    Raises:
        ValueError: a layer is not in the model, is a grouped convolution, or sees values that are not finite.
    """
    known = quantizable_layers(model)
    for name in layers:
        if name not in known:
            raise ValueError(f"{name} is not a linear or convolution of this {type(model).__name__}")
        if getattr(known[name], "groups", 1) != 1:
            raise ValueError(
                f"{name} is a grouped convolution, whose channels see different inputs: round it to nearest"
            )
    observers = {name: HessianObserver(name, known[name], rows_per_call) for name in layers}
    handles = [watch_product(known[name], observer) for name, observer in observers.items()]
    try:
        for _ in replay(model, trajectory):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: observer.total for name, observer in observers.items()}


class HessianObserver:
    """A forward hook that adds up one layer's Hessian.

    Attributes:
        total: (K, K) float32, the sum of x x^T.
    """

    def __init__(self, name: str, layer: FloatLayer, rows: int) -> None:
        width = layer.weight[0].numel()
        self.total = torch.zeros(width, width, dtype=torch.float32, device=layer.weight.device)
        self._name, self._rows = name, rows
        self._random = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Take the rows of one call, or a sample of them that stands for all; a forward hook with keywords."""
        x = layer_input(args, kwargs).detach()
        channels = output.shape[-1 - axes_of(layer)]
        available = output.numel() // channels
        count = min(self._rows, available)
        chosen = torch.randperm(available, generator=self._random, device="cpu")[:count].to(x.device)
        seen = rows_of(layer, x, output.shape, chosen)
        if not is_finite(seen):
            raise ValueError(f"{self._name}: its input holds NaN or infinite values")
        self.total.addmm_(seen.t(), seen, alpha=available / count)


def rows_of(layer: FloatLayer, x: Tensor, shape: Sequence[int], positions: Tensor | None = None) -> Tensor:
    """(positions, K) float32: what a layer multiplies its weight with, in the order of its stored weight.

    Args:
        x: the layer's input.
        shape: of its output.
        positions: which of its output positions, counted over (N, ...); all in this order, if None.
    """
    if not isinstance(layer, FloatConvolution):
        flat = x.flatten(0, -2)
        return (flat if positions is None else flat[positions]).float()
    axes = axes_of(layer)
    if positions is None:
        batch = x.shape[0] if x.dim() == axes + 2 else 1
        positions = torch.arange(batch * math.prod(shape[-axes:]), device=x.device)
    return _patches(layer, x, positions, shape[-axes:]).float()


def _patches(layer: FloatConvolution, x: Tensor, positions: Tensor, size: Sequence[int]) -> Tensor:
    """(positions, taps * C): what the convolution sees at some of its output positions, counted over (N, *size).

    Taps are in the order of the stored weight: of a 3-D kernel (T, R, S) the ones in time are last.
    """
    axes = len(size)
    x = x.unsqueeze(0) if x.dim() == axes + 1 else x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode).movedim(1, -1)
    rest = positions
    index: list[Tensor] = []
    for axis in reversed(range(axes)):
        taps = torch.arange(layer.kernel_size[axis], device=x.device) * layer.dilation[axis]
        of_axis = (rest % size[axis])[:, None] * layer.stride[axis] + taps
        index.insert(0, of_axis.view(-1, *(len(taps) if other == axis else 1 for other in range(axes))))
        rest = rest // size[axis]
    seen = padded[rest.view(-1, *[1] * axes), *index]
    return (seen.movedim(1, 3) if axes == 3 else seen).flatten(1)
