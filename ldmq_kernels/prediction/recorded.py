"""What one call of a model computes, operation by operation: names, sizes, and what each reads and writes."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ldmq_kernels.ops import spec_of

ATTENTION = "scaled_dot_product_attention"


class Gemm(NamedTuple):
    """A product of (m, k) by (n, k), or `groups` of them; k is channels times the taps of a convolution."""

    m: int
    n: int
    k: int
    taps: int = 1
    groups: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k * self.groups

    def __str__(self) -> str:
        return "x".join(map(str, self[:3])) + (f", {self.taps} taps" if self.taps > 1 else "")


@dataclass(frozen=True)
class Operation:
    """One operation of a call.

    Attributes:
        op: an op of this package, or the name of torch's function, such as "conv2d" or "cat".
        layer: the layer whose parameters it reads, or the module that it runs in; layers of one product have a "+".
        reads: bytes by tensor. A tensor has one number as long as nobody writes it.
        writes: the same.
        facts: the arguments by name, with the sizes of a tensor in its place.
        gemm: the product that it is; None for other operations.
    """

    op: str
    layer: str
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    facts: Mapping[str, Any] = field(default_factory=dict)
    gemm: Gemm | None = None

    @property
    def bytes(self) -> int:
        """Read and written, each tensor once."""
        return sum(self.reads.values()) + sum(self.writes.values())


def record(model: nn.Module, call: Callable[[], Any]) -> list[Operation]:
    """The operations of a call, in their order.

    Args:
        model: whose layers name the operations; on any device, the meta device too.
        call: runs it.
    """
    recorder = _Recorder(model)
    with torch.no_grad(), recorder.following_modules(), recorder:
        call()
    return recorder.operations


class _Recorder(TorchFunctionMode):
    """Notes each function of torch that makes a tensor which is no view of what it got."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._inside: list[str] = []
        self._numbers: dict[int, int] = {}
        self._next = itertools.count()
        self._owners: defaultdict[int, dict[str, None]] = defaultdict(dict)
        for name, module in model.named_modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._owners[_storage(tensor)][name] = None

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Inside this block it is known which module runs; no module gets a hook of its own."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._inside.append(self._names.get(id(module), ""))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._inside.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = _name(func)
        # on the meta device torch takes the kernels that write the matrix of the attention
        is_fused = name == ATTENTION and given[0].is_meta
        result = _attended(args[0], args[2]) if is_fused else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if given and made and not name.startswith("__get"):
            self._note(name, given, made, args, kwargs)
        return result

    def _note(self, name: str, given: list[Tensor], made: list[Tensor], args: Any, kwargs: Any) -> None:
        storages = {_storage(tensor) for tensor in given}
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        new = [tensor for tensor in made if in_place or _storage(tensor) not in storages]
        if not new or name.startswith(("empty", "new_", "zeros_like", "ones_like")):
            return
        reads = {self._number(tensor): tensor.nbytes for tensor in given}
        for tensor in new:
            self._numbers[_storage(tensor)] = next(self._next)
        writes = {self._number(tensor): tensor.nbytes for tensor in new}
        owners: dict[str, None] = {}
        for tensor in given:
            owners |= self._owners.get(_storage(tensor), {})
        layer = _together(list(owners)) or next((inside for inside in reversed(self._inside) if inside), "")
        facts = _facts(name, args, kwargs)
        self.operations.append(Operation(name, layer, reads, writes, facts, _gemm(name, facts, new[0])))

    def _number(self, tensor: Tensor) -> int:
        key = _storage(tensor)
        if key not in self._numbers:
            self._numbers[key] = next(self._next)
        return self._numbers[key]


def _attended(query: Tensor, value: Tensor) -> Tensor:
    """What attention gives, (..., queries, C), in memory as the query is, as the fused kernels write it."""
    *outer, queries, _ = query.shape
    if query.dim() < 4 or query.stride(-2) < query.stride(-3):
        return query.new_empty((*outer, queries, value.shape[-1]))
    return query.new_empty((*outer[:-1], queries, outer[-1], value.shape[-1])).transpose(-2, -3)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _name(func: Any) -> str:
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name.split("::")[-1]
    return str(getattr(func, "__name__", func))


def _together(names: list[str]) -> str:
    """Layers that are one product: "block.to_q+to_k+to_v"."""
    if not names:
        return ""
    return names[0] + "".join("+" + name.rpartition(".")[2] for name in names[1:])


def _facts(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    names = spec_of(name).arguments if name.startswith(_OWN) else _ARGUMENTS.get(name, ())
    given = dict(zip(names, args, strict=False)) | kwargs
    return {key: tuple(value.shape) if isinstance(value, Tensor) else value for key, value in given.items()}


def _gemm(name: str, facts: Mapping[str, Any], out: Tensor) -> Gemm | None:
    if name in ("conv1d", "conv2d", "conv3d"):
        outputs, channels, *kernel = facts["weight"]
        taps, groups = torch.Size(kernel).numel(), facts.get("groups", 1)
        return Gemm(out.numel() // outputs, outputs // groups, taps * channels, taps, groups)
    if name == "linear":
        n, k = facts["weight"]
        return Gemm(out.numel() // n, n, k)
    if name.startswith("linear_"):
        x = facts.get("x_q", facts.get("x"))
        assert x is not None
        return Gemm(math.prod(x[:-1]), facts.get("weight_scale", facts["weight"])[0], x[-1])
    if name.startswith("conv2d_"):
        x = facts.get("x_q", facts.get("x"))
        assert x is not None
        n, groups = facts["weight_scale"][0], facts["groups"]
        taps = facts["kernel_size"][0] * facts["kernel_size"][1]
        return Gemm(out.numel() // n, n // groups, taps * x[1] // groups, taps, groups)
    return None


_OWN = (
    "linear_",
    "conv2d_",
    "quantize_",
    "rotate_quantize",
    "group_norm_silu",
    "layer_norm_q",
    "geglu_",
    "gelu_q",
    "silu_q",
)
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv3d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ATTENTION: ("query", "key", "value", "attn_mask"),
}
