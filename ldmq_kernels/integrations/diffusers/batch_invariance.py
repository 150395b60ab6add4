"""The same picture alone and in a batch, to the bit: `batch_invariant`, and `find_variance`, which looks.

A sum of floats depends on its order, and the order in which a product, a convolution or a norm adds depends on how
many samples come at once; the last bits that change turn roundings to int8 further down. So, of a batch, only what is
exact in any order sees all pictures together: the integer products, which are most of a quantized model's
work, what is rounded once for each element, and what adds within a row, as a layer norm does. Everything else runs
once for each picture, on tensors of the sizes and strides that the picture's own call would have, and so adds in the
order of that call; on a CPU, where torch's kernels are known, only if `cpu_order` does not say that it adds so anyway.

diffusers' pipelines lay a batch out as [all pictures without the prompt | all pictures with it]: the samples of picture
i are i, i + pictures, and so on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldmq_kernels.calibration.denoisers import denoisers
from ldmq_kernels.integrations.diffusers.cpu_order import is_elementwise_alike, is_gated_alike, is_group_norm_alike

# By name of function or op: how many of the leading arguments are batches, or the places of those that are.
SUMS: dict[str, int | tuple[int, ...]] = {
    "linear": 1,
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "matmul": 2,
    "__matmul__": 2,
    "bmm": 2,
    "baddbmm": 3,
    "scaled_dot_product_attention": 4,
    "attention": 4,
    "group_norm": 1,
    "rms_norm": 1,
    "mean": 1,
    "sum": 1,
    "std": 1,
    "var": 1,
    "norm": 1,
    "linear_w8a16": 1,
    "linear_w4a16": 1,
    "conv2d_w8a16": 1,
    "linear_fp8": (0, 1, 5, 7),  # input, its scales, residual, gate
    "linear_geglu_fp8": (0, 1),
    "conv2d_fp8": (0, 1, 5, 6),  # input, its scales, the bias of each sample, residual
    "group_norm_silu_quantize": 1,
}
# On a CPU these come from a vector's function or from a scalar one, by where in the tensor an element lies.
ON_CPU: dict[str, int | tuple[int, ...]] = dict.fromkeys(
    (
        "silu",
        "gelu",
        "mish",
        "sigmoid",
        "tanh",
        "softplus",
        "softmax",
        "exp",
        "sin",
        "cos",
        "erf",
        "pow",
        "silu_quantize",
        "geglu_quantize",
        "gelu_quantize",
    ),
    1,
) | {"linear_geglu_w8a8": (0, 1)}
# Of these, on a CPU, by a test of the batch and its pictures: whether all of it gives each the bits of its own call.
ALIKE_ON_CPU: dict[str, Callable[[Tensor, int], bool]] = {
    "silu": is_elementwise_alike,
    "gelu": is_elementwise_alike,
    "silu_quantize": is_elementwise_alike,
    "gelu_quantize": is_elementwise_alike,
    "geglu_quantize": is_gated_alike,
    "group_norm": is_group_norm_alike,
    "group_norm_silu_quantize": is_group_norm_alike,
}
NAMED = ("input", "query", "key", "value", "attn_mask", "x")  # the same arguments, given by name


class _Apart(TorchFunctionMode):
    """Calls what adds in floating point once for each picture.

    Attributes:
        pictures: of the batch.
        samples: of the denoiser's batch while it runs, a multiple of `pictures`; else `pictures`.
    """

    def __init__(self, pictures: int) -> None:
        super().__init__()
        self.pictures = pictures
        self.samples = pictures

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").removesuffix(".default").removesuffix("_")
        batches = SUMS.get(name) or ON_CPU.get(name)
        if batches is None:
            return func(*args, **kwargs)
        first = args[0] if args else next((kwargs[key] for key in NAMED if key in kwargs), None)
        if not isinstance(first, Tensor) or not first.dim() or first.shape[0] % self.pictures:
            return func(*args, **kwargs)
        if first.device.type == "cpu":
            is_alike = ALIKE_ON_CPU.get(name)
            if is_alike is not None and is_alike(first, self.pictures):
                return func(*args, **kwargs)
        elif name not in SUMS:
            return func(*args, **kwargs)
        return self._each(func, args, kwargs, range(batches) if isinstance(batches, int) else batches)

    def _each(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], batches: Collection[int]
    ) -> Any:
        results = []
        for picture in range(self.pictures):
            own = [self._own(arg, picture) if place in batches else arg for place, arg in enumerate(args)]
            named = {key: self._own(arg, picture) if key in NAMED else arg for key, arg in kwargs.items()}
            results.append(func(*own, **named))
        if isinstance(results[0], Tensor):
            return self._together(results)
        return tuple(self._together(parts) for parts in zip(*results, strict=True))

    def _own(self, batch: Any, picture: int) -> Any:
        """A picture's samples of a batch, as its own call has them; what is no batch as it is."""
        if not isinstance(batch, Tensor) or not batch.dim() or batch.shape[0] % self.pictures:
            return batch
        passes = self._passes(batch.shape[0])
        count = batch.shape[0] // self.pictures
        whole = batch.stride(0)
        if 0 in batch.stride():  # expanded: the picture's own call expands it too
            return batch.unflatten(0, (passes, self.pictures, -1))[:, picture].flatten(0, 1)
        strides = [s if s <= whole else s // self.pictures for s in batch.stride()]
        own = torch.empty_strided((count, *batch.shape[1:]), strides, dtype=batch.dtype, device=batch.device)
        own.unflatten(0, (passes, -1)).copy_(batch.unflatten(0, (passes, self.pictures, -1))[:, picture])
        return own

    def _together(self, results: Sequence[Tensor]) -> Tensor:
        """The batch of what each picture's call gave."""
        if not results[0].shape[0]:  # no scales, where they are calibrated
            return results[0]
        first = results[0]
        rows = first.shape[0] * self.pictures
        whole = first.stride(0) if first.shape[0] > 1 else first[0].numel()
        inner = [s if s <= whole else s * self.pictures for s in first.stride()[1:]]
        batch = torch.empty_strided((rows, *first.shape[1:]), (whole, *inner), dtype=first.dtype, device=first.device)
        places = batch.unflatten(0, (self._passes(rows), self.pictures, -1))
        for picture, result in enumerate(results):
            places[:, picture].copy_(result.unflatten(0, (places.shape[0], -1)))
        return batch

    def _passes(self, rows: int) -> int:
        """How many times all pictures come one after the other in a batch of so many rows."""
        return (self.samples if rows % self.samples == 0 else rows) // self.pictures


@contextlib.contextmanager
def batch_invariant(pipe: Any, pictures: int) -> Iterator[None]:
    """Inside this block a call of `pipe` that draws so many pictures draws each as a call of its own would.

        with ldmq.batch_invariant(pipe, 4):
            images = pipe([prompt] * 4, generator=[torch.Generator().manual_seed(i) for i in range(4)]).images

    Text encoders are called by the pipeline with all prompts at once, and see each alone here, too. It holds for
    the thread that enters the block, for models that run in Python or are captured inside it, and not for compiled
    ones.

    Args:
        pipe: a diffusers pipeline.
        pictures: how many the call draws, each with a generator of its own.
    """
    if pictures == 1:
        yield
        return
    mode = _Apart(pictures)

    def enter(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1), None)
        if given is not None and given.shape[0] % pictures == 0:
            mode.samples = given.shape[0]

    def leave(*_: Any) -> None:
        mode.samples = pictures

    vae: Any = getattr(pipe, "vae", None)
    slices = not getattr(vae, "use_slicing", True)  # a picture's decoder is its own call, strides and all
    if slices:
        vae.enable_slicing()
    handles = []
    for model in denoisers(pipe).values():
        handles.append(model.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.register_forward_hook(leave))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
        if slices:
            vae.disable_slicing()


@dataclass(frozen=True)
class Variance:
    """A picture that was another in a batch than alone.

    Attributes:
        pictures: of the batch.
        place: the picture's in it, from 0.
        largest: difference of a value, of 0 to 1.
    """

    pictures: int
    place: int
    largest: float


def find_variance(
    draw: Callable[[Sequence[int]], Tensor], batches: Sequence[int] = (2, 3), seed: int = 0
) -> Variance | None:
    """Draw pictures alone and in batches, and tell the first that differs in a bit.

    Args:
        draw: seeds -> pictures (n, ...), float or integers; each call is one batch.
        batches: how many pictures each batch has.
        seed: of the first picture; the others' count up.

    Returns:
        None where all are equal.
    """
    alone = torch.cat([draw([seed + i]) for i in range(max(batches))])
    for pictures in batches:
        together = draw([seed + i for i in range(pictures)])
        for place in range(pictures):
            if not torch.equal(together[place], alone[place]):
                difference = (together[place].float() - alone[place].float()).abs().max()
                return Variance(pictures, place, float(difference))
    return None
