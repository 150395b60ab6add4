"""The class that takes the place of a float layer, also of one whose class has a forward around torch's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ldmq_kernels.nn.folded import QuantConv1d, QuantConv3d
from ldmq_kernels.nn.kinds import float_class, has_own_forward, kind_of, prepares_its_input
from ldmq_kernels.nn.quant_conv2d import QuantConv2d
from ldmq_kernels.nn.quant_linear import QuantLinear
from ldmq_kernels.nn.quantized import QuantizedLayer

QUANTIZED: dict[str, type[QuantizedLayer]] = {
    "linear": QuantLinear,
    "conv1d": QuantConv1d,
    "conv2d": QuantConv2d,
    "conv3d": QuantConv3d,
}


def quantized_class(layer: nn.Module) -> type[QuantizedLayer]:
    """The class that replaces a float layer.

    Of a class that prepares its input and calls `super().forward`, such as the causal convolutions of video
    autoencoders, it is a subclass of that class too: models count such layers and hand them frames that they kept.
    """
    if isinstance(layer, QuantizedLayer):
        return type(layer)
    base = QUANTIZED[kind_of(layer)]
    if not has_own_forward(layer) or not prepares_its_input(layer):
        return base
    return _subclass(type(layer), base)


def product_of_layer(layer: Any, x: Tensor) -> Tensor:
    """What a layer, float or quantized, makes of an input that its class has prepared already; see `watch_product`."""
    is_quantized = isinstance(layer, QuantizedLayer)
    kind: Any = QUANTIZED[kind_of(layer)] if is_quantized else float_class(layer)
    output: Tensor = kind.forward(layer, x)
    return output


_subclasses: dict[tuple[Any, Any], type[QuantizedLayer]] = {}


def _subclass(prepares: Any, base: Any) -> type[QuantizedLayer]:
    """The class whose forward is that of `prepares`, and whose product is that of `base`."""
    if (prepares, base) not in _subclasses:
        _subclasses[prepares, base] = _made_subclass(prepares, base)
    return _subclasses[prepares, base]


def _made_subclass(prepares: Any, base: Any) -> type[QuantizedLayer]:

    def structure_of(cls: Any, module: Any) -> Any:
        """A float layer of this class on the meta device, with what `module` has set on itself."""
        layer: Any = base.structure_of(module)
        layer.__class__ = cls  # its constructor would be that of `prepares`, with arguments of its own
        for name, value in vars(module).items():
            if not hasattr(QuantizedLayer, name):  # what a quantized one has beside what `prepares` has set
                vars(layer).setdefault(name, value)
        return layer

    def reduce(self: QuantizedLayer) -> Any:
        return _empty, (prepares, base), self.__getstate__()

    body = {"structure_of": classmethod(structure_of), "__reduce__": reduce, "__module__": __name__}
    return type(f"Quantized{prepares.__name__}", (prepares, base), body)


def _empty(prepares: type[nn.Module], base: type[QuantizedLayer]) -> QuantizedLayer:
    """An instance without a state, for a copy or a pickle to fill."""
    cls = _subclass(prepares, base)
    return cls.__new__(cls)
