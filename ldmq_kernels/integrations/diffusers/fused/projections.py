"""Blocks whose linears share an input: which of them share its quantization, and which are one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.integrations.diffusers.fused.eligibility import takes_quantized
from ldmq_kernels.integrations.diffusers.fused.merged import MergedLinears, share_quantization, whole_weight
from ldmq_kernels.tracing import is_exported

FOUND = ("_shared", "_looked_at")  # what a block has looked up, and looks up again in a copy


class Projections:
    """Linears over one input: what they share was found when the block was fused or moved."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self._revisions = [getattr(layer, "revision", None) for layer in layers]
        self._shares = share_quantization(layers)
        weight = whole_weight(layers) if self._shares and len(layers) > 1 else None
        self._merged = None if weight is None else MergedLinears(layers, weight)

    def __call__(
        self, layers: Sequence[Any], dtype: torch.dtype, quantize: Callable[[Any], tuple], plain: Callable[[], Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs of the layers: `quantize` makes the input as a layer wants it, `plain` makes it floating."""
        if not self._is_current(layers):
            x = plain()
            return tuple(layer(x) for layer in layers)
        x_q, scale = quantize(layers[0])
        if self._merged is not None and self._merged.is_valid(layers):
            return self._merged.products(x_q, scale, dtype)
        return tuple(layer.linear(x_q, scale, dtype) for layer in layers)

    def _is_current(self, layers: Sequence[Any]) -> bool:
        return (
            self._shares
            and all(a is b and takes_quantized(a) for a, b in zip(layers, self.layers, strict=True))
            and self._revisions == [layer.revision for layer in layers]
        )


class SharesProjections(nn.Module):
    """Mixin of a fused block: it says by name which linears of it read one input, in `projections`."""

    _shared: Mapping[str, Projections]

    def projections(self) -> dict[str, tuple[Any, ...]]:
        """The linears that read the same input, by a name for them."""
        raise NotImplementedError(f"{type(self).__name__} says which linears share an input")

    def find_shared(self) -> None:
        """Look again at which projections share their quantization, and merge what can be one product."""
        self._looked_at = self._state()
        self._shared = {name: Projections(layers) for name, layers in self.projections().items()}

    def look_again(self, x: Tensor) -> None:
        """Find what is shared anew where a layer was replaced, filled or loaded; not in what is being recorded."""
        is_traced = torch.compiler.is_dynamo_compiling() or is_exported()
        is_recorded = is_traced or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        if not is_recorded and self._looked_at != self._state():
            self.find_shared()

    def _state(self) -> list[tuple[int, int | None]]:
        """Which layers project, and how often each has been filled, loaded or moved."""
        return [
            (id(layer), getattr(layer, "revision", None)) for group in self.projections().values() for layer in group
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.find_shared()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in FOUND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.find_shared()
