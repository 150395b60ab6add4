"""Where a quantized layer holds its weight: as a backend packs it or plain, out of sight of whoever reads the layer.

A checkpoint holds plain tensors, and the integers are "weight" there. In memory they are the buffer "quantized_weight",
or where a backend packs them the buffer "packed_weight" alone; state_dict, deepcopy, pickle and a move get the plain
ones, exactly. The attribute `weight` is what a float layer's is: floating values in the float layer's layout.
"""

from __future__ import annotations

import contextlib
import multiprocessing.context
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.backend import Packer
from ldmq_kernels.nn.dequantized import READ_ONLY, DequantizedWeight
from ldmq_kernels.numerics.formats import FLOAT, Scheme
from ldmq_kernels.numerics.formats.float8 import FLOAT8
from ldmq_kernels.numerics.hadamard import unrotate
from ldmq_kernels.tracing import is_exported

M = TypeVar("M", bound=nn.Module)
PLAIN, PACKED = "quantized_weight", "packed_weight"
SAVED_NAME = "ldmq_layer"  # in the metadata of a state dict: what the layer is called in its model


def buffer_name(stored: str) -> str:
    """The name of the buffer that holds a tensor of a checkpoint."""
    return PLAIN if stored == "weight" else stored


class _ByValue:
    """A tensor that a spawned process gets with the pickle itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return torch.from_numpy, (self._tensor.numpy(),)


class _AsBytes:
    """A float8 tensor that is pickled as its bytes, since torch pickles no float8 but in its own files."""

    def __init__(self, tensor: Tensor, by_value: bool) -> None:
        values = tensor.view(torch.uint8)
        self.tensor = tensor
        self._given = _ByValue(values) if by_value else values, tensor.dtype

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _of_bytes, self._given


def _of_bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.view(dtype)


class PackedWeight(nn.Module):
    """Mixin of a layer whose weight may be quantized, and held in packed form.

    Attributes:
        scheme: what the layer computes in; its format says which op takes the weight.
        float_dtype: of the float layer that this stands for.
        packer: how the weight was packed, and is unpacked; None where it is plain.
    """

    scheme: Scheme = FLOAT
    name: str = ""  # in its model, for errors; empty where nobody gave one
    float_dtype: torch.dtype = torch.float32
    packer: Packer | None = None
    _packed_for_linear: bool = False

    @property
    def weight_channels(self) -> int:
        """Input channels of one output's weight."""
        raise TypeError("a quantized layer knows its channels")

    @property
    def is_pointwise(self) -> bool:
        """Whether this is computed as a linear."""
        raise TypeError("a quantized layer knows whether it is a linear")

    @property
    def taps(self) -> tuple[int, ...]:
        """The axes of a stored weight between its outputs and its input channels."""
        return ()

    def as_picture(self, stored: Tensor) -> Tensor:
        """A stored tensor (out, *taps, c) as the 2-D convolution takes it, (out, rows, columns, c)."""
        return stored

    @property
    def folds_time(self) -> int:
        """How many temporal taps the 2-D convolution has among its channels."""
        return 1

    @staticmethod
    def from_channels_last(weight: Tensor) -> Tensor:
        """A weight with its input channels last in the float layer's layout."""
        raise TypeError("a quantized layer says where its input channels are")

    @property
    def weight(self) -> Any:
        """The float layer's weight: of a quantized layer what its integers stand for, made anew and not writable.

        Shape (out, in), or (out, in / groups, ...) of a convolution; `float_dtype`; on the meta device while a loader
        fills the layer.
        """
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        if not self.scheme.quantizes:
            raise AttributeError(f"this {type(self).__name__} has no weight yet")
        stored = self.stored_tensors()
        if stored["weight"].is_meta or any(tensor.is_meta for tensor in stored.values()):
            stored = {name: tensor.to("meta") for name, tensor in stored.items()}
        weight = self.from_channels_last(self._real(stored)).to(self.float_dtype).contiguous()
        is_traced = torch.compiler.is_dynamo_compiling() or is_exported()
        return weight if is_traced else weight.as_subclass(DequantizedWeight)

    @weight.setter
    def weight(self, _value: Any) -> None:
        raise RuntimeError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; a quantized layer takes no float weight.

        Raises:
            RuntimeError: the layer is quantized, and this would be its weight.
        """
        if name == "weight" and self.scheme.quantizes:
            raise RuntimeError(READ_ONLY)
        super().register_parameter(name, param)

    def real_weight(self) -> Tensor:
        """(out, ..., C) float32: what the stored integers stand for, for an input that is not smoothed nor rotated."""
        return self._real(self.stored_tensors())

    def _real(self, stored: dict[str, Tensor]) -> Tensor:
        real = self.scheme.format.weight.dequantize(stored, self.weight_channels)
        if self.scheme.is_rotated:
            real = unrotate(real)
        return real * stored["smoothing"] if "smoothing" in stored else real

    @property
    def packed_weight(self) -> Tensor | None:
        """The backend's own form of the weight; None where it is plain."""
        return self._buffers.get(PACKED)

    @property
    def plain_weight(self) -> Tensor:
        """The integers as a checkpoint has them, whatever form they are held in."""
        packed = self._buffers.get(PACKED)
        weight: Any = self._buffers[PLAIN] if packed is None else self._unpacked(packed)
        return weight

    def kernel_weight(self, as_linear: bool) -> Tensor:
        """The weight as the op of a linear, or of a convolution, takes it: packed, or plain."""
        packed = self._buffers.get(PACKED)
        if packed is not None and as_linear == self._packed_for_linear:
            return packed
        plain = self.plain_weight
        return plain.flatten(1) if as_linear else self.as_picture(plain)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint of the layer's scheme has, by their names there."""
        stored = {name: self._buffers.get(name) for name in self.scheme.dtypes if name != "weight"}
        held = {name: tensor for name, tensor in stored.items() if tensor is not None}
        return {"weight": self.plain_weight, **held}

    def fill(self, name: str, tensor: Tensor) -> None:
        """Take a tensor of a checkpoint by its name there; `finish` follows when all are in."""
        self._buffers[buffer_name(name)] = tensor

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        """Have a buffer that state_dict leaves out, or with None not have it: tools look up each name that is there."""
        if tensor is None:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        else:
            self._buffers[name] = tensor
            self._non_persistent_buffers_set.add(name)

    def _multiplier(self, as_linear: bool) -> Tensor | None:
        """The multipliers as the op takes them, (N, groups) of a linear; None where the format has none."""
        multiplier = self._buffers.get("multiplier")
        if multiplier is None:
            return None
        return multiplier.flatten(1) if as_linear else self.as_picture(multiplier)

    def pack(self) -> None:
        """Hold the weight in the form of the backend that serves its device, where that packs this format's."""
        if not self.scheme.quantizes_activations:
            return
        weight: Any = self._buffers[PLAIN]
        as_linear = self.is_pointwise
        packer = dispatch.packer(self.scheme.format.products["linear" if as_linear else "conv2d"], weight.device)
        if packer is not None:
            weight = weight.flatten(1) if as_linear else self.as_picture(weight)
            channels = self.weight_channels * self.folds_time
            self._hold(PACKED, packer.pack(weight, self._multiplier(as_linear), channels))
            self._hold(PLAIN, None)
            self.packer, self._packed_for_linear = packer, as_linear

    def hold_part(self, whole: Tensor) -> None:
        """Hold the weight, packed or plain, as a part of a larger one that has the same values."""
        self._buffers[PLAIN if self.packed_weight is None else PACKED] = whole

    def unpack(self) -> None:
        """Hold the plain weight again."""
        packed = self._buffers.get(PACKED)
        if packed is not None:
            self._hold(PLAIN, self._unpacked(packed))
            self._hold(PACKED, None)
            self.packer = None

    def _unpacked(self, packed: Tensor) -> Tensor:
        assert self.packer is not None
        outputs: Any = self.out_features if isinstance(self, nn.Linear) else self.out_channels
        weight = self.packer.unpack(packed, self._multiplier(self._packed_for_linear), outputs)
        return weight.reshape(weight.shape[0], *self.taps, -1) if self.taps else weight

    # -- under its name in checkpoints ---------------------------------------------------------------

    @contextlib.contextmanager
    def _as_stored(self) -> Iterator[None]:
        """Inside this block the buffers are called as in a checkpoint: for torch's own loading."""
        self._buffers["weight"] = self._buffers[PLAIN]
        try:
            yield
        finally:
            self._buffers[PLAIN] = self._buffers.pop("weight")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.scheme.quantizes:
            destination[prefix + "weight"] = self.plain_weight
            if hasattr(destination, "_metadata"):  # whoever loads these says where they are from
                destination._metadata[prefix[:-1]][SAVED_NAME] = self.name
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # of the copy alone, since `finish` holds other buffers in a shallow one, too
        buffers = {name: buffer for name, buffer in self._buffers.items() if name != PACKED}
        hidden = self._non_persistent_buffers_set - {PACKED}
        state["_buffers"], state["_non_persistent_buffers_set"] = buffers, hidden
        is_packed, plain = self.packed_weight is not None, self._buffers.get(PLAIN)
        if is_packed or (plain is not None and plain.dtype == FLOAT8):
            held: Any = self.plain_weight
            # by value: a tensor goes as a file that is shared, which is closed with this one before it is opened
            by_value = is_packed and multiprocessing.context.get_spawning_popen() is not None
            if held.dtype == FLOAT8:
                held = _AsBytes(held, by_value)
            elif by_value:
                held = _ByValue(held)
            buffers[PLAIN] = held
            hidden.add(PLAIN)
            state["packer"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = state["_buffers"]
        if isinstance(held := buffers.get(PLAIN), _AsBytes):  # as copy.copy hands it on
            state = {**state, "_buffers": {**buffers, PLAIN: held.tensor}}
        super().__setstate__(state)


def hold_plain(model: nn.Module) -> list[PackedWeight]:
    """Have a model hold plain weights until it is moved; gives the layers that held packed ones.

    oneDNN's packed weights, which layers on a CPU hold where it serves, are tensors that nothing but it can read.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedWeight) and m.packed_weight is not None]
    for layer in layers:
        layer.unpack()
    return layers


@contextlib.contextmanager
def unpacked(model: M) -> Iterator[M]:
    """Inside this block a model holds plain weights, which `torch.export.save` can write; the same numbers.

    Args:
        model: with quantized layers in it, or none.
    """
    layers = hold_plain(model)
    try:
        yield model
    finally:
        for layer in layers:
            if layer.packed_weight is None:  # moving the model inside the block has packed it
                layer.pack()
