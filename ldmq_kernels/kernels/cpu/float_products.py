"""float32 linears and convolutions in AMX tiles: each operand is two bfloat16 values, whose products are added up.

x = x1 + x2 and w = w1 + w2, each the next part rounded to bfloat16: x w = x1 w1 + x2 w1 + x1 w2, less a product of two
rests, 2^-17 of it. Sums are float32. Noise is more than 103 dB below the result, as its test has it: enough for
trajectories and ranges, and for a reference that noise of 8-bit layers is measured against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled, products
from ldmq_kernels.kernels.cpu.compiled import Epilogue

FEWEST_ROWS = 16  # a tile's; fewer cost as much
PARTS = 3  # of an operand, side by side


def serves() -> bool:
    """Whether this processor multiplies so."""
    return products.form() == products.TILES


def takes(weight: Tensor) -> bool:
    """Whether a weight (N, K) or (N, C, R, S) can be multiplied so: float32, of an even number of channels."""
    channels = weight.shape[1] if weight.dim() in (2, 4) else 1
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() > 0 and channels % 2 == 0


def packed_bytes(weight: Tensor) -> int:
    """Bytes of a packed weight, outputs filled up to whole panels."""
    return 2 * PARTS * weight.numel() // weight.shape[0] * (-(-weight.shape[0] // products.PANEL) * products.PANEL)


def pack(weight: Tensor) -> Tensor:
    """A weight (N, K), or (N, C, R, S), as `linear` and `conv2d` take it: 6 bytes for each value."""
    channels_last = weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1)
    return products.pack(_split(channels_last.contiguous(), True))


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x (..., K) float32 by a packed weight, and the bias: (..., N) float32.

    Raises:
        MemoryError: there is none left.
    """
    return products.linear(
        _split(x.contiguous(), False), packed, _epilogue(bias), outputs, torch.float32, floating=True
    )


def conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """x (N, C, H, W) float32 by a packed weight, and the bias: (N, K, P, Q) float32, channels_last.

    Raises:
        Unsupported: the windows do not fit into the input.
        MemoryError: there is none left.
    """
    parts = _split(x.permute(0, 2, 3, 1).contiguous(), False).permute(0, 3, 1, 2)
    geometry = (stride, padding, dilation)
    return products.conv2d(parts, packed, _epilogue(bias), outputs, *geometry, torch.float32, floating=True)


def _epilogue(bias: Tensor | None) -> Epilogue:
    return Epilogue(compiled.ONE, bias=bias)


def _split(x: Tensor, is_weight: bool) -> Tensor:
    """x (..., C) float32, contiguous, as its parts in bfloat16: their bytes, (..., 6 C) int8."""
    channels = x.shape[-1]
    out = x.new_empty((*x.shape[:-1], PARTS * channels), dtype=torch.bfloat16)
    if x.numel():
        rows = x.numel() // channels
        threads = compiled.threads(x)
        compiled.call("ldmq_split", threads, x.data_ptr(), rows, channels, out.data_ptr(), is_weight)
    return out.view(torch.int8)
