"""A module whose calls replay CUDA graphs: `capture` and `release`.

A UNet call launches some two thousand kernels from Python; a graph launches them at once. The first call with
new shapes runs the module twice to warm up and then records it; later calls copy their inputs into the
recorded call's buffers, replay it and return copies of its outputs. Whatever in the module depends on the
values of its inputs by Python control flow is frozen as it was recorded. Hooks of the module run before a replay, in
the calling thread; one whose owner says `is_recorded` runs in the recording too, on the recorded inputs.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ldmq_kernels.tracing import is_exported

M = TypeVar("M", bound=nn.Module)
MOST_GRAPHS = 8  # each keeps its outputs and intermediate tensors
WATCHED = 8  # tensors whose place is looked at in every call
WARM_UPS = 2  # the first call compiles and allocates, the second finds both done


class CaptureError(ValueError):
    """A module, or a call of it, that cannot be recorded."""


@dataclass
class _Recorded:
    """One recorded call: its graph, the buffers of its tensor inputs, and its output as a tree."""

    graph: Any
    inputs: list[Tensor]
    outputs: list[Any]
    structure: pytree.TreeSpec


class _Replayer:
    """Stands in for a module's forward; keeps a graph for each signature, the least recently used one goes first."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.forward: Callable[..., Any] = module.forward
        self.gpu = _Gpu(device)
        self._module = module
        self._name = type(module).__name__
        self._watched = _watched(module)
        self._addresses = _addresses(self._watched)
        self.graphs: OrderedDict[Any, _Recorded] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_traced = torch.compiler.is_dynamo_compiling() or is_exported()
        if is_traced or (torch.is_grad_enabled() and _needs_grad((args, kwargs))):
            return self.forward(*args, **kwargs)
        if _addresses(self._watched) != self._addresses:
            raise CaptureError(
                f"this {self._name}'s weights were moved or replaced since it was captured: release it first"
            )
        device = self.gpu.device
        # buffers made in inference mode could not be written outside of it
        with torch.inference_mode(False), torch.no_grad(), self._lock, self.gpu.in_turn():
            leaves, structure = pytree.tree_flatten(_with_timestep(args, kwargs, device))
            for leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.device != device:
                    raise CaptureError(f"an input is on {leaf.device}, the captured module on {device}: move it there")
            key = (structure, tuple(_signature(leaf) for leaf in leaves))
            recorded = self.graphs.get(key)
            if recorded is None:
                recorded = self.graphs[key] = self._record(leaves, structure)
                if len(self.graphs) > MOST_GRAPHS:
                    self.graphs.popitem(last=False)
            self.graphs.move_to_end(key)
            given = (leaf for leaf in leaves if isinstance(leaf, Tensor))
            for buffer, leaf in zip(recorded.inputs, given, strict=True):
                buffer.copy_(leaf, non_blocking=True)
            recorded.graph.replay()
            outputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in recorded.outputs]
            return pytree.tree_unflatten(outputs, recorded.structure)

    def __reduce__(self) -> Any:
        raise CaptureError("a captured module cannot be copied or pickled: ldmq.release it first")

    def _record(self, leaves: list[Any], structure: pytree.TreeSpec) -> _Recorded:
        buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(buffers, structure)
        graph, out = self.gpu.record(lambda: self._call(args, kwargs))
        outputs, out_structure = pytree.tree_flatten(out)
        for leaf in outputs:
            if not (leaf is None or isinstance(leaf, Tensor | int | float | str)):
                raise CaptureError(
                    f"the module returns a {type(leaf).__name__}: tensors in tuples or dicts can be replayed"
                )
        return _Recorded(graph, [leaf for leaf in buffers if isinstance(leaf, Tensor)], outputs, out_structure)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for hook in self._module._forward_pre_hooks.values():
            if getattr(getattr(hook, "__self__", None), "is_recorded", False):
                hook(self._module, args, kwargs)
        return self.forward(*args, **kwargs)


class _Gpu:
    """The GPU operations of a replayer: order between streams, and recording."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Work inside the block comes after that of the last block, whatever stream either is on."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._done is None:
                self._done = torch.cuda.Event()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)

    def record(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        """A graph of a call, and the call's output in the graph's memory."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads may go on using the GPU while this one records
        with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
            out = call()
        return graph, out


def _watched(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """A few of a module's tensors, by the dict that holds each and its name there: moving the module replaces them."""
    places = (
        (tensors, name)
        for part in module.modules()
        for tensors in (part._buffers, part._parameters)
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return list(itertools.islice(places, WATCHED))


def _addresses(places: list[tuple[dict[str, Any], str]]) -> list[int | None]:
    """The addresses of these tensors now."""
    watched = (tensors.get(name) for tensors, name in places)
    return [None if tensor is None else tensor.data_ptr() for tensor in watched]


def _needs_grad(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(tree))


def _signature(leaf: Any) -> Any:
    """The part of a leaf that a recorded call depends on: a tensor's form, another value itself."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    try:
        hash(leaf)
    except TypeError:
        raise CaptureError(
            f"an argument is a {type(leaf).__name__}, which cannot identify a recorded call: pass tensors, numbers, "
            "strings, tuples, lists or dicts of them"
        ) from None
    return type(leaf), leaf


def _with_timestep(
    args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the timestep on the device, so that every step replays the same graph.

    diffusers' denoisers take it second, or by name.
    """
    args = (*args[:1], *(_timestep(value, device) for value in args[1:2]), *args[2:])
    return args, {name: _timestep(value, device) if name == "timestep" else value for name, value in kwargs.items()}


def _timestep(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        return value
    return torch.full((), value, dtype=torch.float32 if isinstance(value, float) else torch.int64, device=device)


def capture(module: M) -> M:
    """Make a module's calls replay CUDA graphs, one for each combination of input shapes, in place.

        pipe.unet = ldmq.capture(pipe.unet)

    The second positional argument, or `timestep`, may be a number: it is passed in a device buffer. Calls that
    need gradients, and calls under torch.compile, run the module itself. After `.to`, new weights or LoRA,
    `release` and `capture` again.

    Args:
        module: in eval mode, all of it on one GPU, such as a pipeline's UNet.

    Returns:
        `module` itself.

    Raises:
        CaptureError: it is captured already, in training mode, or not on one GPU.
    """
    name = type(module).__name__
    if is_captured(module):
        raise CaptureError(f"this {name} is captured already: ldmq.release it first")
    if module.training:
        raise CaptureError(f"this {name} is in training mode: call .eval() first")
    if "forward" in vars(module):
        raise CaptureError(f"this {name}'s forward is hooked, by offloading perhaps: capture it without that")
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        where = ", ".join(sorted(map(str, devices))) or "nowhere"
        raise CaptureError(f"this {name} is on {where}: CUDA graphs need all of it on one GPU, move it there first")
    module.forward = _Replayer(module, devices.pop())
    return module


def is_captured(module: nn.Module) -> bool:
    """Whether a module's calls replay CUDA graphs."""
    return isinstance(vars(module).get("forward"), _Replayer)


def release(module: M) -> M:
    """Undo `capture` and free its graphs; a module that is not captured is left as it is.

    Returns:
        `module` itself.
    """
    replayer = vars(module).get("forward")
    if isinstance(replayer, _Replayer):
        replayer.graphs.clear()
        del module.forward
    return module
