"""A weight in the layout of the backend that computes with it, out of sight of everything that reads the layer.

A checkpoint holds plain tensors. Where a backend packs the layer's weight, the packed form alone is held; state_dict,
deepcopy, pickle, `.weight` and a move get the plain one, exactly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldmq_kernels.kernels import cpu
from ldmq_kernels.kernels.cpu.packing import pack_conv2d, pack_linear, unpack_conv2d, unpack_linear
from ldmq_kernels.numerics.formats import FLOAT, Scheme


class PackedWeight(nn.Module):
    """Mixin of a layer whose buffer "weight" may be held in packed form.

    Attributes:
        scheme: what the layer computes in; its format says which int8 weight may be packed.
        packed_weight: the backend's own form; None where the weight is plain.
    """

    scheme: Scheme = FLOAT
    packed_weight: Tensor | None = None

    @property
    def weight_channels(self) -> int:
        """Input channels of one output's weight."""
        raise TypeError("a quantized layer knows its channels")

    @property
    def is_pointwise(self) -> bool:
        """Whether this is computed as a linear."""
        raise TypeError("a quantized layer knows whether it is a linear")

    @property
    def kernel_weight(self) -> Tensor:
        """The weight as the ops take it: packed, or plain."""
        packed = self.packed_weight
        return self.weight if packed is None else packed

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that the layer holds, by name; without "weight" where that is packed."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def pack(self) -> None:
        """Hold the weight in the form of the backend that serves its device, where that packs this format's."""
        stored = self.stored_tensors()
        if not (self.scheme.quantizes_activations and cpu.serves(stored["weight"].device)):
            return
        weight = self.scheme.format.weight.kernel_weight(stored, self.weight_channels)
        if weight is not None:
            self.packed_weight = pack_linear(weight.flatten(1)) if self.is_pointwise else pack_conv2d(weight)
            self._buffers["weight"] = None

    def unpack(self) -> None:
        """Hold the plain weight again."""
        if self.packed_weight is not None:
            self._buffers["weight"] = self._unpacked(self.packed_weight)
            self.packed_weight = None

    def _unpacked(self, packed: Tensor) -> Tensor:
        weight = unpack_linear(packed) if self.is_pointwise else unpack_conv2d(packed)
        if self.is_pointwise and isinstance(self, nn.Conv2d):
            weight = weight[:, None, None, :]
        return self.scheme.format.weight.stored_weight(weight, self.stored_tensors())

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("packed_weight") is not None:
            return self._unpacked(self.__dict__["packed_weight"])
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed_weight is not None:
            destination[prefix + "weight"] = self._unpacked(self.packed_weight)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.packed_weight is not None:
            state["_buffers"] = {**self._buffers, "weight": self._unpacked(self.packed_weight)}
            state["packed_weight"] = None
        return state
