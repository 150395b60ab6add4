"""The float weight that a quantized layer shows to whoever reads it, and that nobody can write to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

READ_ONLY = (
    "the weight of a quantized layer of ldmq_kernels is made of its integers and cannot be written to: change the "
    "float model and quantize that with ldmq.quantize, or add to it by an adapter of PEFT, such as LoRA, which may be "
    "fused"
)


class DequantizedWeight(Tensor):
    """A float tensor that is made of a layer's integers when it is asked for; a write would be lost, and is refused.

    What is computed from it is an ordinary tensor; a view of it is of this class, and refuses as well.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute as on an ordinary tensor.

        Raises:
            RuntimeError: the call writes to a dequantized weight. No TypeError: Python would try `x + y` for `x += y`.
        """
        kwargs = kwargs or {}
        if (_writes(func) and isinstance(args[0], cls)) or isinstance(kwargs.get("out"), cls):
            raise RuntimeError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        is_view = isinstance(result, Tensor) and any(
            isinstance(arg, cls) and torch._C._is_alias_of(result, arg)  # type: ignore[attr-defined]
            for arg in args
        )
        return result.as_subclass(cls) if is_view else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)


def _writes(func: Callable[..., Any]) -> bool:
    """Whether a function changes the tensor that is its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or func == Tensor.data.__set__  # type: ignore[attr-defined]
    return name.endswith("_") and name not in ("requires_grad_", "retain_grad_")
