"""What a quantized UNet really is, whoever quantized it: integer layers, bytes, and its pictures' likeness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.nn.kinds import kind_of
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES
from ldmq_kernels.plans.cost import FLOAT_BYTES, weight_bytes
from ldmq_kernels.plans.layers import quantizable_layers

BYTE_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


@dataclass(frozen=True)
class LayerCounts:
    """Layers of one kind: all of them, those with weights stored in 8 bits, those that multiply in 8 bits."""

    all: int
    stored: int
    computed: int


@dataclass(frozen=True)
class Inspection:
    """What is quantized in a model, seen in its tensors and in one call of it.

    Attributes:
        stored: names of the layers that hold a weight of 8 bits or fewer.
        computed: names of the layers that ran a product of two 8-bit tensors.
        bytes: of a checkpoint whose remaining float tensors are in 16 bits.
        simulated: the model rounds floats to 8 bits and back, and what it would store and compute is counted.
    """

    counts: dict[str, LayerCounts]
    stored: frozenset[str]
    computed: frozenset[str]
    bytes: int
    simulated: bool = False


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor subclass is made of, or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every plain tensor of a model's checkpoint; parts of a subclass have its name and a number."""
    return {
        f"{name}#{index}" if index else name: part
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor)
        for index, part in enumerate(plain_tensors(tensor))
    }


def checkpoint_bytes(model: nn.Module, original: nn.Module) -> int:
    """Bytes that a checkpoint takes: tensors left as they were in 16 bits, all others as they are stored."""
    floats = original.state_dict()
    total = 0
    for name, tensor in stored_tensors(model).items():
        untouched = name in floats and tensor.dtype == floats[name].dtype and tensor.shape == floats[name].shape
        total += tensor.numel() * (FLOAT_BYTES if untouched else tensor.element_size())
    return total


class _IntegerProducts(TorchDispatchMode):
    """Tells `seen` of every op that takes two 8-bit matrices and gives something wider.

    Ops of this package may quantize the activations themselves, or take a weight that is widened: they have "a8" or
    "fp8" in their name.
    """

    def __init__(self, seen: Callable[[], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented  # a tool's tensor subclass: it comes back with its plain tensors
        out = func(*args, **(kwargs or {}))
        operands = [a for a in args if isinstance(a, Tensor) and a.dtype in BYTE_DTYPES and a.dim() >= 2]
        own = func.namespace == "ldmq" and ("a8" in func.name() or "fp8" in func.name())
        if (own or len(operands) >= 2) and isinstance(out, Tensor) and out.dtype not in (*BYTE_DTYPES, torch.bool):
            self.seen()
        return out


@contextmanager
def _named_calls(model: nn.Module, names: list[str], running: list[str]) -> Iterator[None]:
    handles = []
    for name in names:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(layer.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def integer_layers(model: nn.Module, names: list[str], call: UNetCall) -> set[str]:
    """Which of these layers multiply 8-bit activations by 8-bit weights in this call."""
    running: list[str] = []
    found: set[str] = set()

    def seen() -> None:
        found.update(running)

    with torch.compiler.set_stance("force_eager"), _named_calls(model, names, running), _IntegerProducts(seen):
        model(*call.args, **call.kwargs)
    return found


def _holds_integers(model: nn.Module, name: str, layer: nn.Module) -> bool:
    """Whether a layer has its weight in bytes: one a value, or one for two values of 4 bits."""
    values = layer.weight.numel()
    return any(
        tensor.dtype in BYTE_DTYPES and values // 2 <= tensor.numel() <= values
        for tensor in stored_tensors(model.get_submodule(name)).values()
    )


def _simulated_layers(model: nn.Module, names: list[str]) -> tuple[set[str], set[str]]:
    """Layers whose weight, and whose input too, nvidia-modelopt rounds to 8 bits."""

    def enabled(name: str, part: str) -> bool:
        quantizer = getattr(model.get_submodule(name), part, None)
        return quantizer is not None and quantizer.is_enabled

    stored = {name for name in names if enabled(name, "weight_quantizer")}
    return stored, {name for name in stored if enabled(name, "input_quantizer")}


def _simulated_bytes(model: nn.Module, original: nn.Module, stored: set[str], computed: set[str]) -> int:
    total = checkpoint_bytes(original, original)
    for name, layer in quantizable_layers(original).items():
        if name in stored:
            scheme = SCHEMES["w8a8-static" if name in computed else "w8a16"]
            smoothed = hasattr(model.get_submodule(name).input_quantizer, "_pre_quant_scale")
            total += weight_bytes(layer, scheme, smoothed=smoothed) - weight_bytes(layer, FLOAT)
    return total


def inspect_model(model: nn.Module, original: nn.Module, call: UNetCall) -> Inspection:
    """Look at a quantized copy of `original`: its tensors, and one call of it; what has looked itself is believed."""
    if isinstance(own := getattr(model, "inspected", None), Inspection):
        return own
    layers = quantizable_layers(original)
    stored, computed = _simulated_layers(model, list(layers))
    simulated = bool(stored)
    if simulated:
        size = _simulated_bytes(model, original, stored, computed)
    else:
        stored = {name for name, layer in layers.items() if _holds_integers(model, name, layer)}
        computed = integer_layers(model, list(layers), call)
        size = checkpoint_bytes(model, original)
    counts = {
        kind: LayerCounts(len(names), len(names & stored), len(names & computed))
        for kind in ("conv2d", "linear")
        for names in [{name for name, layer in layers.items() if kind_of(layer) == kind}]
    }
    return Inspection(counts, frozenset(stored), frozenset(computed), size, simulated)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """(N,) float64 structural similarity of pictures (Wang et al. 2004): Gaussian window of 11, K1 0.01, K2 0.03.

    Args:
        first, second: (N, C, H, W) floating in [0, 1].
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    bell = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = (bell[:, None] * bell[None, :] / bell.sum() ** 2)[None, None]

    def blur(pictures: Tensor) -> Tensor:
        return nn.functional.conv2d(pictures.flatten(0, 1)[:, None], window)

    a, b = first.double(), second.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return similarity.unflatten(0, first.shape[:2]).flatten(1).mean(1)
