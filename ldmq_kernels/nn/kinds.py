"""The kinds of float layers that have a quantized form: linears, and convolutions over 1, 2 and 3 axes."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrize

FloatLayer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
FloatConvolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

CLASSES: dict[str, type[FloatLayer]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}
CHANNEL_AXES = {
    "linear": "the last axis",
    "conv1d": "the axis before the length",
    "conv2d": "the axis before height and width",
    "conv3d": "the axis before frames, height and width",
}
ORIGINAL_CONVOLUTIONS = {kind: kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def kind_of(layer: nn.Module) -> str:
    """ "linear", "conv1d", "conv2d" or "conv3d".

    Raises:
        TypeError: the module is none of them.
    """
    for kind, base in CLASSES.items():
        if isinstance(layer, base):
            return kind
    raise TypeError(f"a {type(layer).__name__} is neither a linear nor a convolution over 1, 2 or 3 axes")


def float_class(layer: nn.Module) -> Any:
    """The class of torch whose computation the layer's is, or is derived from."""
    return CLASSES[kind_of(layer)]


def axes_of(layer: nn.Module) -> int:
    """How many axes a convolution moves along; 0 of a linear."""
    return len(getattr(layer, "kernel_size", ()))


def has_own_convolution(layer: Any) -> bool:
    """Whether someone has replaced `_conv_forward`, of this convolution, of its class or of all of its kind."""
    kind = float_class(layer)
    own = "_conv_forward" in vars(layer) or type(layer)._conv_forward is not kind._conv_forward
    return own or kind._conv_forward is not ORIGINAL_CONVOLUTIONS[kind]


def prepares_its_input(layer: nn.Module) -> bool:
    """Whether the layer's class has a forward of its own that leaves the product to torch's by `super().forward`.

    Such a layer, as the causal convolutions of video autoencoders that pad and keep frames, is quantized by quantizing
    what it calls. A forward that reads the weight itself is not one of these.
    """
    if isinstance(layer, nn.Linear) or layer._modules or not {*layer._parameters} <= {"weight", "bias"}:
        return False
    for cls in type(layer).__mro__[: type(layer).__mro__.index(float_class(layer))]:
        forward = vars(cls).get("forward")
        if forward is None:
            continue
        code = forward.__code__ if isinstance(forward, FunctionType) else None
        if code is None or "__class__" not in code.co_freevars or not {"forward", "super"} <= {*code.co_names}:
            return False
        if "weight" in code.co_names:
            return False
    return True


def has_own_forward(layer: nn.Module) -> bool:
    """Whether the class of a float layer has a forward of its own, around torch's or in its place."""
    return type(layer).forward is not float_class(layer).forward


class ProductHandle:
    """Ends what `watch_product` began."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._before = layer.__dict__.get("_conv_forward")  # what tiling, for one, has put there

    def remove(self) -> None:
        """Watch no longer."""
        if self._before is None:
            del self._layer._conv_forward
        else:
            self._layer._conv_forward = self._before


def watch_product(layer: Any, hook: Callable[..., Tensor | None]) -> Any:
    """Call `hook(layer, args, kwargs, output)` at each product of a float layer; what it gives replaces the output.

    Of most layers that is a forward hook. Of one whose class prepares the input, the input is the prepared one: what
    its class has padded, and joined with what it kept of earlier calls.

    Returns:
        What ends it, by `remove()`.
    """
    if not has_own_forward(layer):
        return layer.register_forward_hook(hook, with_kwargs=True)
    original = layer._conv_forward

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output: Tensor = original(x, weight, bias)
        given = hook(layer, (x,), {}, output)
        return output if given is None else given

    handle = ProductHandle(layer)
    layer._conv_forward = watched
    return handle


def own_computation(layer: nn.Module) -> str:
    """What a layer computes that its quantized form would not, in words; "" where nothing stands in the way."""
    if has_own_forward(layer) and not prepares_its_input(layer):
        return f"a {type(layer).__qualname__} has a forward of its own, not {float_class(layer).__name__}'s"
    hooks = type(layer).__name__, *(type(hook).__name__ for hook in layer._forward_pre_hooks.values())
    if parametrize.is_parametrized(layer) or {"WeightNorm", "SpectralNorm"} & {*hooks}:
        return "its weight is made anew in each call, as weight_norm does"
    return ""
