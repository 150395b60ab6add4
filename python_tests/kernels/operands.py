"""Operands of the ops, their exact results in int64 and float64, and how near a backend must come."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from ldmq_kernels import ops  # noqa: F401  (defines torch.ops.ldmq)
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.agreement import FLOAT8_SUMS
from ldmq_kernels.numerics.formats.int4 import GROUP_SIZE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW_EXAMPLES = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def cuda_refusal(op: str, operands: dict[str, Any]) -> str | None:
    """Why the CUDA backend must leave these operands to the next one, in the words of its refusal; None if it must not.

    csrc/README.md states these rules. python_tests/kernels/cuda has what a wrapper or the binding refuses otherwise.
    """
    x = operands.get("x", operands.get("x_q"))
    if op.startswith("quantize"):  # which lays out nothing anew, unlike the other ops
        channels_last = x.dim() == 4 and (op == "quantize_per_sample" or operands.get("channel_dim") == 1)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return None if x.is_contiguous(memory_format=layout) else f"must be {str(layout).removeprefix('torch.')}"
    if not op.startswith(("linear", "conv2d")):
        return None
    gate = operands.get("gate")
    if gate is not None and gate.dtype != operands.get("out_dtype", x.dtype):
        return f"the gate is {gate.dtype}"
    if operands.get("groups", 1) != 1:
        return f"groups is {operands['groups']}, must be 1"
    multiple = 32 if op == "linear_w4a8" else 16
    if x.shape[1 if op.startswith("conv2d") else -1] % multiple:
        return f"input channels must be a multiple of {multiple}"
    if len(operands["weight_scale"]) // (2 if "geglu" in op else 1) % 8:
        return "output channels must be a multiple of 8"
    return None


@dataclass(frozen=True)
class Backend:
    """A backend by name, and the device it is tested on."""

    name: str
    device: torch.device

    def call(self, op: str, *arguments: Any) -> Any:
        """Run an op here; its result must have the metadata that its fake kernel promises.

        What the CUDA backend must refuse, it has to refuse; the reference then serves the call.
        """
        arguments = tree_map_only(Tensor, lambda t: t.to(self.device) if t.layout == torch.strided else t, arguments)
        function = getattr(torch.ops.ldmq, op)
        names = [argument.name for argument in function.default._schema.arguments]
        why = cuda_refusal(op, dict(zip(names, arguments, strict=False))) if self.name == "cuda" else None
        if why is not None:
            with dispatch.use_backend("cuda"), pytest.raises(RuntimeError, match=re.escape(why)):
                function(*arguments)
        with dispatch.use_backend(self.name if why is None else "reference"):
            result = function(*arguments)
        if not any(isinstance(a, Tensor) and a.layout != torch.strided for a in arguments):
            with FakeTensorMode() as mode:
                promised = function(*tree_map_only(Tensor, mode.from_tensor, arguments))
            assert tree_map_only(Tensor, metadata, result) == tree_map_only(Tensor, metadata, promised)
        return tree_map_only(Tensor, Tensor.cpu, result)


def metadata(tensor: Tensor) -> tuple:
    """Shape, dtype, device, and the strides that mean anything."""
    strides = [s for s, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]
    return tuple(tensor.shape), tensor.dtype, tensor.device.type, strides


def random_int8(*shape: int) -> Tensor:
    """Uniform over [-127, 127]."""
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def random_int4(*shape: int) -> Tensor:
    """Uniform over [-7, 7], one to an int8."""
    return torch.randint(-7, 8, shape, dtype=torch.int8)


def random_multiplier(*shape: int) -> Tensor:
    """Uniform over 1..18 for weights of this shape: a multiplier for each group along the last axis."""
    return torch.randint(1, 19, (*shape[:-1], -(-shape[-1] // GROUP_SIZE)), dtype=torch.uint8)


def random_float8(*shape: int) -> Tensor:
    """Normal values of about 50, some of them subnormal, with the largest at 448."""
    values = torch.randn(shape) * torch.exp2(torch.randint(-10, 1, shape[-1:]).float())
    return (values * (448 / values.abs().amax().clamp_min(1e-9) if values.numel() else 1)).to(torch.float8_e4m3fn)


def random_scale(*shape: int) -> Tensor:
    """Positive float32 around 1e-2."""
    return torch.rand(shape) * 1e-2 + 1e-3


def folded(integers: Tensor, multiplier: Tensor) -> Tensor:
    """int4 times the multiplier of its group, int64, by indexing."""
    group = torch.arange(integers.shape[-1]) // GROUP_SIZE
    return integers.long() * multiplier.long()[..., group]


def scrambled(x: Tensor) -> Tensor:
    """The same values with the axes of its memory in reverse order."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in int64, or in float64 for floating operands."""
    wide = torch.float64 if x.is_floating_point() else torch.int64
    return x.to(wide) @ weight.to(wide).T


def exact_conv2d(x: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    """Convolution tap by tap in int64, or in float64 for floating x. Weight is (K, R, S, C / groups)."""
    (r_count, s_count), stride, padding, dilation, groups, upsample = geometry
    wide = torch.float64 if x.is_floating_point() else torch.int64
    top, bottom, left, right = padding
    rows, columns = (torch.arange(upsample * length) // upsample for length in x.shape[2:])
    x = torch.nn.functional.pad(x[:, :, rows][..., columns].to(wide), (left, right, top, bottom))
    weight = weight.to(wide)
    spans = [s * (k - 1) for s, k in zip(dilation, (r_count, s_count), strict=True)]
    size = [(x.shape[2 + i] - spans[i] - 1) // stride[i] + 1 for i in range(2)]
    x = x.unflatten(1, (groups, -1))
    weight = weight.unflatten(0, (groups, -1))
    out = x.new_zeros(x.shape[0], groups, weight.shape[1], *size)
    for r, s in itertools.product(range(r_count), range(s_count)):
        h, w = r * dilation[0], s * dilation[1]
        tap = x[
            ..., h : h + stride[0] * (size[0] - 1) + 1 : stride[0], w : w + stride[1] * (size[1] - 1) + 1 : stride[1]
        ]
        out += torch.einsum("ngchw,gkc->ngkhw", tap, weight[:, :, r, s])
    return out.flatten(1, 2)


def exact_epilogue(
    accumulator: Tensor, *factors: Tensor, terms: tuple[Tensor | None, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The accumulator times all factors plus all terms in float64, and the sum of their absolute values."""
    out = accumulator.double()
    for factor in factors:
        out = out * factor.double()
    magnitude = out.abs()
    for term in terms:
        if term is not None:
            out, magnitude = out + term.double(), magnitude + term.double().abs()
    return out, magnitude


def assert_rounded_once(actual: Tensor, exact: Tensor, magnitude: Tensor, steps: float = 4) -> None:
    """Within half a unit in the last place, plus `steps` float32 roundings of the magnitude."""
    info = torch.finfo(actual.dtype)
    half_unit = 0.0 if actual.dtype == torch.float32 else exact.abs() * info.eps / 2 + info.smallest_normal * info.eps
    error = (actual.double() - exact).abs()
    allowed = half_unit * (1 + 1e-6) + steps * 2.0**-24 * magnitude
    worst = (error - allowed).argmax() if error.numel() else 0
    assert (error <= allowed).all(), f"{actual.flatten()[worst]} for {exact.flatten()[worst]}"


def assert_weight_only(backend: Backend, actual: Tensor, exact: Tensor, magnitude: Tensor, in_torch: Tensor) -> None:
    """Rounded once after a float32 sum in any order; on the CPU, which rounds restored weights, as good as torch."""
    if backend.name != "cpu":
        assert_rounded_once(actual, exact, magnitude, steps=16)
    elif exact.numel():
        error, error_in_torch = ((out.double() - exact).abs().max() for out in (actual, in_torch))
        assert error <= 2 * error_in_torch + 2.0**-22 * magnitude.max()


def rounded_int8(y: np.ndarray) -> np.ndarray:
    """clamp(rint(y), -127, 127), half to even."""
    assert y.dtype == np.float32
    return np.clip(np.rint(y), -127, 127).astype(np.int8)


def rounded_float8(y: np.ndarray) -> Tensor:
    """The e4m3 values next to float32 ones, half to even, from the list of all of them."""
    assert y.dtype == np.float32
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().double().numpy()  # 0 to 448
    size = np.minimum(np.abs(y.astype(np.float64)), 448)
    above = np.searchsorted(grid, size).clip(1, 126)
    low, high = grid[above - 1], grid[above]
    is_even_high = above % 2 == 0
    up = (size - low > high - size) | ((size - low == high - size) & is_even_high)
    return torch.from_numpy(np.copysign(np.where(up, high, low), y)).float().to(torch.float8_e4m3fn)


def assert_float8_sum(backend: Backend, actual: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """A float32 sum in any order, rounded once; on a GPU the sum of Hopper's tensor cores, see FLOAT8_SUMS.

    Args:
        backend: where it comes from.
        actual: the output.
        exact: float64.
        magnitude: of all terms of the sum.
    """
    if backend.name == "cuda" or backend.device.type == "cuda":
        assert not FLOAT8_SUMS.difference(actual, exact.to(actual.dtype))
    else:
        assert_rounded_once(actual, exact, magnitude, steps=16)


def dynamically_quantized(y: np.ndarray, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales over these axes, by numpy's IEEE float32 arithmetic."""
    absmax = np.abs(y).max(axes, keepdims=True)
    scale = np.maximum(absmax, np.float32(1e-12)) / np.float32(127)
    q = rounded_int8(y * (np.float32(1) / scale))
    return torch.from_numpy(q), torch.from_numpy(scale.squeeze(axes))
