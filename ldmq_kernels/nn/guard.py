"""`guard`: an error at the first layer of a model that gets NaN or infinity, for looking for the cause.

Calibrated scales turn both into finite integers, so pictures do not show them. The guard sees every op of a call as it
is dispatched, fused ones too, and knows a layer by the tensors that it computes with: so it changes no number and no
path. It waits for the device at each layer.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmq_kernels import graphs
from ldmq_kernels.nn.quantized import QuantizedLayer
from ldmq_kernels.tracing import is_exported

VARIABLE = "LDMQ_GUARD"


class Guard:
    """The guard of one model, until `remove` or the end of a with-block."""

    def __init__(self, model: nn.Module) -> None:
        """Watch the model's calls."""
        self._open: dict[int, list[_Checked]] = {}  # by thread
        # the handles go with every copy: they keep the ids of later hooks from colliding with these
        self._handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        ]
        _forget_compiled()

    def before(self, model: nn.Module, _args: Any) -> None:
        """Begin to look at each op.

        Raises:
            RuntimeError: the model is compiled or captured, so that its ops cannot be seen.
        """
        if torch.compiler.is_dynamo_compiling() or is_exported() or graphs.is_captured(model):
            raise RuntimeError(
                f"a guarded {type(model).__name__} runs in eager mode: remove the guard, or call the model itself and "
                "not what torch.compile or ldmq.capture made of it"
            )
        mode = _Checked(model)
        mode.__enter__()
        self._open.setdefault(threading.get_ident(), []).append(mode)

    def after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        """End it, also where the call raised.

        Raises:
            ValueError: a value that is not finite was quantized and reached no layer.
        """
        open_here = self._open.get(threading.get_ident())
        if open_here:
            mode = open_here.pop()
            mode.__exit__(None, None, None)
            if output is not None and mode.pending:
                raise ValueError(f"the input of {mode.pending} holds NaN or infinity")

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        _forget_compiled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.remove()


def _forget_compiled() -> None:
    """Make torch.compile trace anew: what it has compiled does not see that hooks came or went."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _Checked(TorchDispatchMode):
    """Looks at the floating tensors of every op that takes a tensor of one of the model's modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pending = (
            ""  # an op of ours that takes no layer's tensor got such a value: the product after it is a layer's
        )
        self._names: dict[int, str] = {}
        for name, module in model.named_modules():
            for tensor in _tensors_of(module):
                self._names.setdefault(_place(tensor), name or type(module).__name__)
        self._names.pop(0, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_flat((args, kwargs)))
        is_ours = func.namespace == "ldmq"
        name = next((self._names[place] for place in map(_place, tensors) if place in self._names), None)
        if name is not None or is_ours:
            wrong = not all(is_finite(t) for t in tensors if t.is_floating_point() and not t.is_mkldnn)
            if name is not None and (wrong or (is_ours and self.pending)):
                raise ValueError(
                    f"{name}: its input holds NaN or infinity; it is the first layer of this call that gets any "
                    f"({func.namespace}::{func.__name__.split('.')[0]})"
                )
            if wrong:
                self.pending = f"ldmq::{func.__name__.split('.')[0]}"
        return func(*args, **kwargs)


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity; torch looks at no float8."""
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """What a module computes with: its tensors, and what a quantized layer derives from them."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if isinstance(module, QuantizedLayer) and module.scheme.quantizes:
        derived = (module.packed_weight, module.call_scale, module.input_inv_scale)
        yield from (tensor for tensor in derived if tensor is not None)


def _place(tensor: Tensor) -> int:
    """Where a tensor begins, which views and transposes of the whole share; 0 where it has no memory."""
    if tensor.is_mkldnn:
        return id(tensor)
    return 0 if tensor.is_meta else tensor.data_ptr()


def _flat(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _flat(part)
    elif isinstance(tree, dict):
        yield from _flat(list(tree.values()))


def guard(model: nn.Module) -> Guard:
    """Raise at the first layer of a model that gets NaN or infinity in a call, with the layer's name.

        with ldmq.guard(pipe.unet):
            pipe("a red cat")

    It holds until `remove()` or the end of the block, in eager mode. Without one nothing is looked at in a call,
    except that a CPU refuses NaN where a scale is calibrated. With LDMQ_GUARD=1 in the environment every model is
    guarded that is quantized or loaded.

    Args:
        model: quantized or not, such as a pipeline's UNet.

    Returns:
        What ends it.
    """
    return Guard(model)


def guard_if_asked(model: nn.Module) -> None:
    """Guard a model for good where the environment asks for it."""
    if os.environ.get(VARIABLE) == "1":
        guard(model)
