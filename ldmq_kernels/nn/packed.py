"""A weight in the layout of the backend that computes with it, out of sight of everything that reads the layer.

A checkpoint holds plain tensors. Where a backend packs the layer's weight, the packed form alone is held; state_dict,
deepcopy, pickle, `.weight` and a move get the plain one, exactly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import Packer
from ldmq_kernels.numerics.formats import FLOAT, Scheme


class PackedWeight(nn.Module):
    """Mixin of a layer whose buffer "weight" may be held in packed form.

    Attributes:
        scheme: what the layer computes in; its format says which op takes the weight.
        packed_weight: the backend's own form; None where the weight is plain.
        packer: how it was packed, and is unpacked.
    """

    scheme: Scheme = FLOAT
    packed_weight: Tensor | None = None
    packer: Packer | None = None

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

    def _multiplier(self) -> Tensor | None:
        """The multipliers as the op takes them, (N, groups) of a linear; None where the format has none."""
        multiplier = self._buffers.get("multiplier")
        return multiplier.flatten(1) if self.is_pointwise and multiplier is not None else multiplier

    def pack(self) -> None:
        """Hold the weight in the form of the backend that serves its device, where that packs this format's."""
        if not self.scheme.quantizes_activations:
            return
        weight: Any = self._buffers["weight"]
        op = self.scheme.format.products["linear" if self.is_pointwise else "conv2d"]
        packer = dispatch.packer(op, weight.device)
        if packer is not None:
            weight = weight.flatten(1) if self.is_pointwise else weight
            self.packed_weight = packer.pack(weight, self._multiplier(), self.weight_channels)
            self.packer, self._buffers["weight"] = packer, None

    def unpack(self) -> None:
        """Hold the plain weight again."""
        if self.packed_weight is not None:
            self._buffers["weight"] = self._unpacked(self.packed_weight)
            self.packer = self.packed_weight = None

    def _unpacked(self, packed: Tensor) -> Tensor:
        assert self.packer is not None
        weight = self.packer.unpack(packed, self._multiplier())
        return weight[:, None, None, :] if self.is_pointwise and isinstance(self, nn.Conv2d) else weight

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
            state["packer"] = state["packed_weight"] = None
        return state
