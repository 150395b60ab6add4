"""What QuantLinear and QuantConv2d share: quantized buffers, and their packed form on a CPU.

The checkpoint form of a layer is plain tensors (`weight`, scales). Where the CPU backend serves
the layer, the weight is held only in that backend's packed form; anything that reads the layer
(state_dict, deepcopy, pickle, `.weight`, a move to another device) gets the plain one, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmq_kernels.kernels import cpu
from ldmq_kernels.numerics import affine
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES, Scheme
from ldmq_kernels.numerics.packing import pack_int4

FLOAT32_BUFFERS = ("weight_scale", "group_scale", "input_scale", "smoothing")
BUFFERS = ("weight", "multiplier", *FLOAT32_BUFFERS)


class QuantizedLayer(nn.Module):
    """Mixin over nn.Linear or nn.Conv2d; `kind` is "linear" or "conv2d".

    Attributes:
        scheme: what the layer computes in; the float scheme until `from_float` or the loader says more.
        weight: int8 (N, K) or (K, R, S, C), or uint8 with two int4 to a byte of the last axis.
        weight_scale: (out,) float32; with w4a8 beside `multiplier` (uint8).
        group_scale: (out, groups) float32, w4a16 only.
        input_scale: (1,) float32, static activations only.
        smoothing: (C,) float32, the reciprocal that inputs are multiplied with, or None.
    """

    kind: str
    scheme: Scheme = FLOAT
    packed_weight: Tensor | None = None
    revision: int = 0  # of the buffers: grows whenever they are filled, loaded or moved

    # -- to be given by the layer ------------------------------------------------------------------

    @staticmethod
    def to_channels_last(weight: Tensor) -> Tensor:
        """The float layer's weight with input channels as the last axis, contiguous."""
        raise TypeError("a quantized layer says where its input channels are")

    def _pack(self, weight: Tensor) -> Tensor:
        raise TypeError("a quantized layer knows its packed form")

    def _unpack(self, packed: Tensor) -> Tensor:
        raise TypeError("a quantized layer knows its packed form")

    @classmethod
    def structure_of(cls, module: Any) -> Self:
        """A float layer of this class on the meta device, shaped as `module`."""
        raise TypeError("a quantized layer knows its float layer")

    # -- construction ------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls, module: nn.Module, scheme: Scheme, *, input_scale: Tensor | None = None, smoothing: Tensor | None = None
    ) -> Self:
        """Quantize a float layer; the bias is shared with it, the weight is not.

        Args:
            module: nn.Linear or nn.Conv2d.
            scheme: what to compute in, of `numerics.formats.SCHEMES`.
            input_scale: (1,) float32, required by a static scheme.
            smoothing: (C,) float32 reciprocal of the smoothing vector; the weight takes the vector itself.

        Raises:
            ValueError: the scheme does not exist for this kind of layer or lacks its input scale, the weight
                is not finite, or a scale is not finite and positive.
        """
        layer = cls.empty(module, scheme, smoothed=smoothing is not None)
        layer.bias = module.bias
        layer.train(module.training)
        if not scheme.quantizes:
            layer.weight = module.weight  # type: ignore[assignment]
            return layer
        if scheme.is_static and input_scale is None:
            raise ValueError(f"{scheme} needs a calibrated input scale: calibrate first, or choose a dynamic scheme")
        float_weight: Any = module.weight
        weight = cls.to_channels_last(float_weight.detach())
        if smoothing is not None:
            weight = weight.float() / smoothing
        device = weight.device
        layer._fill(weight)
        if scheme.is_static and input_scale is not None:
            layer.input_scale = input_scale.detach().float().reshape(1).to(device)
        if smoothing is not None:
            layer.smoothing = smoothing.detach().float().to(device)
        for name in FLOAT32_BUFFERS:
            layer.check_stored(name, getattr(layer, name))
        layer.finish()
        return layer

    @classmethod
    def empty(cls, module: nn.Module, scheme: Scheme, *, smoothed: bool) -> Self:
        """The layer with all its buffers on the meta device, for a loader to fill."""
        layer = cls.structure_of(module)
        if layer.kind not in scheme.format.layers:
            raise ValueError(f"there is no {scheme} for a {layer.kind}: choose {', '.join(_schemes_of(layer.kind))}")
        if not scheme.quantizes:
            return layer
        if smoothed and getattr(layer, "groups", 1) != 1:
            raise ValueError("a grouped convolution cannot be smoothed: its channels are not those of its weight")
        layer.scheme = scheme
        shape = cls.to_channels_last(layer.weight).shape
        out_channels, channels = shape[0], shape[-1]
        groups = (*shape[:-1], affine.group_count(channels))
        four_bit = scheme.format.weight_bits == 4
        two_level = four_bit and scheme.format.activation_bits == 8
        del layer.weight
        meta = torch.device("meta")

        def buffer(name: str, size: tuple[int, ...], dtype: torch.dtype, exists: bool = True) -> None:
            layer.register_buffer(name, torch.empty(size, dtype=dtype, device=meta) if exists else None)

        stored = (*shape[:-1], -(-channels // 2)) if four_bit else tuple(shape)
        buffer("weight", stored, torch.uint8 if four_bit else torch.int8)
        buffer("multiplier", groups, torch.uint8, two_level)
        buffer("weight_scale", (out_channels,), torch.float32, not four_bit or two_level)
        buffer("group_scale", groups, torch.float32, four_bit and not two_level)
        buffer("input_scale", (1,), torch.float32, scheme.is_static)
        buffer("smoothing", (channels,), torch.float32, smoothed)
        layer.register_buffer("input_reciprocal", None, persistent=False)
        return layer

    def _fill(self, weight: Tensor) -> None:
        if self.scheme.format.weight_bits == 8:
            self.weight, self.weight_scale = affine.quantize_weight_int8(weight)
        elif self.scheme.format.activation_bits == 8:
            grouped = affine.quantize_weight_w4a8(weight)
            self.weight, self.multiplier = pack_int4(grouped.integers), grouped.multiplier
            self.weight_scale = grouped.scale
        else:
            integers, self.group_scale = affine.quantize_weight_w4a16(weight)
            self.weight = pack_int4(integers)

    def check_stored(self, name: str, stored: Tensor | None) -> None:
        """Refuse a tensor that this layer never stores; None and meta tensors hold nothing to check.

        Args:
            name: one of BUFFERS.
            stored: its tensor in a checkpoint.

        Raises:
            ValueError: it has another dtype, a scale is not finite and positive, or integers are out of range.
        """
        if stored is None or stored.is_meta:
            return
        four_bit = self.scheme.format.weight_bits == 4
        integers = {"weight": torch.uint8 if four_bit else torch.int8, "multiplier": torch.uint8}
        expected = integers.get(name, torch.float32)
        if stored.dtype != expected:
            raise ValueError(f"{name} is {stored.dtype}, {expected} is needed: is this a checkpoint of another plan?")
        if name in FLOAT32_BUFFERS:
            wrong, accepted = ~(torch.isfinite(stored) & (stored > 0)), "finite and positive"
        elif name == "multiplier":
            wrong, accepted = (stored < 1) | (stored > affine.MULTIPLIER_MAX), f"in 1..{affine.MULTIPLIER_MAX}"
        elif four_bit:
            wrong, accepted = ((stored & 0xF) == 8) | ((stored >> 4) == 8), "a pair of int4 in [-7, 7]"
        else:
            wrong, accepted = stored == -128, "in [-127, 127]"
        if bool(wrong.any()):
            raise ValueError(f"{name} holds a value that is not {accepted}: the checkpoint is damaged")

    def finish(self) -> None:
        """Derive what is not stored and pack for the device, once all buffers are filled."""
        self.revision += 1
        if not self.scheme.quantizes or self._buffers["weight"] is None or self.weight.is_meta:
            return
        if self.input_scale is not None:
            inverse = 1 / self.input_scale
            self.input_reciprocal = inverse if self.smoothing is None else self.smoothing * inverse
        if self.scheme.format.activation_bits == 8 and cpu.serves(self.weight.device):
            self.packed_weight = self._pack(self.weight)
            self._buffers["weight"] = None

    # -- the packed weight stays out of sight --------------------------------------------------------

    def unpack(self) -> None:
        """Hold the plain weight again."""
        if self.packed_weight is not None:
            self._buffers["weight"] = self._unpack(self.packed_weight)
            self.packed_weight = None

    @property
    def kernel_weight(self) -> Tensor:
        """The weight as the ops take it: packed, or plain."""
        packed = self.packed_weight
        return self.weight if packed is None else packed

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("packed_weight") is not None:
            return self._unpack(self.__dict__["packed_weight"])
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.scheme.quantizes:
            return super()._apply(fn, recurse)
        self.unpack()
        kept = {name: self._buffers[name] for name in FLOAT32_BUFFERS}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            moved = self._buffers[name]
            if original is not None and moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        self.finish()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_weight is not None:
            destination[prefix + "weight"] = self._unpack(self.packed_weight)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        if self.scheme.quantizes:
            for name in BUFFERS:
                try:
                    self.check_stored(name, state_dict.get(prefix + name))
                except ValueError as error:
                    raise ValueError(f"{prefix}{error}") from None
        self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.finish()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed_weight is not None:
            state["_buffers"] = {**self._buffers, "weight": self._unpack(self.packed_weight)}
            state["packed_weight"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.finish()

    # -- for people ----------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The float layer's description, the scheme, the input scale and the backend's packing."""
        words = [super().extra_repr(), str(self.scheme)]
        if self.scheme.quantizes:
            if self.input_scale is not None and not self.input_scale.is_meta:
                words.append(f"input_scale={float(self.input_scale):.4g}")
            if self.smoothing is not None:
                words.append("smoothed")
            if self.packed_weight is not None:
                words.append("packed for oneDNN")
        return ", ".join(words)


def _schemes_of(kind: str) -> list[str]:
    return [name for name, scheme in SCHEMES.items() if kind in scheme.format.layers]
