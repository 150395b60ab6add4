"""What the producers must give: float64 results, and how far float32 may be from them.

A backend's integers must lie between those of the exact values less and plus the error that its float
arithmetic may make. With an error far below a step they may differ from the definition near a tie, by one step,
and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled
from python_tests.kernels.operands import Backend

EPS = 2.0**-23
STATIC = ("one inv_scale", "inv_scales")
MODES = (*STATIC, "measured", "smoothed")
TIES = 0.01  # the largest share of values that may be near a tie, for a test to say anything


def factors(mode: str, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A reciprocal that clamps the largest values of y (..., C), or a smoothing vector, or neither."""
    channels = y.shape[-1]
    spread = torch.exp2(torch.randint(-2, 3, (channels,)).float())
    inv_scale = 160 / y.abs().amax().float().clamp_min(1e-3)
    return {
        "one inv_scale": (inv_scale.view(1), None),
        "inv_scales": (inv_scale * spread * 0.7, None),
        "measured": (None, None),
        "smoothed": (None, spread * 1.1),
    }[mode]


def is_torch(backend: Backend, dtype: torch.dtype) -> bool:
    """Whether a producer is torch's float op in x's own dtype and a quantization."""
    return backend.name == "cpu" and not (dtype in compiled.DTYPES and compiled.load()[0] is not None)


def rounding(backend: Backend, dtype: torch.dtype, *values: Tensor) -> Tensor:
    """What torch's rounding of these float64 intermediates to x's dtype may add to the error; zero elsewhere."""
    total = sum(value.abs() for value in values)
    return total * (torch.finfo(dtype).eps if is_torch(backend, dtype) else 0.0)


def assert_quantized(
    backend: Backend,
    q: Tensor,
    scale: Tensor,
    y: Tensor,
    error: Tensor,
    inv_scale: Tensor | None,
    inv_smooth: Tensor | None,
    bound: Tensor | None = None,
    ties: float = TIES,
) -> None:
    """Check a producer's results.

    Args:
        backend: where they come from; on the CPU many values are near a tie, since it rounds to x's dtype.
        q: (..., C) int8.
        scale: what the scales of y's rows broadcast from, float32; (0,) with a reciprocal.
        y: (..., C) float64, exact.
        error: (..., C) float64, what float arithmetic may be off by.
        inv_scale: (1,) or (C,), or None where the scale is measured.
        inv_smooth: (C,), or None.
        bound: what the largest value of a row is, where it is not its largest absolute value.
        ties: more of them than TIES, where the error must be large.
    """
    if inv_scale is not None:
        assert scale.shape == (0,)
        assert scale.dtype == torch.float32
        exact, error = y * inv_scale.double(), error * inv_scale.double()
    else:
        factor = torch.ones(()) if inv_smooth is None else inv_smooth
        z, error = y * factor.double(), error * factor.double()
        largest = (z.abs().amax(-1) if bound is None else bound).clamp_min(1e-12)
        allowed = (error.amax(-1) if bound is None else error.amax()) + 4 * EPS * largest
        assert ((scale.double() * 127 - largest).abs() <= allowed).all()
        exact, error = z / scale.double().unsqueeze(-1), error / scale.double().unsqueeze(-1)
    error = error + 4 * EPS * exact.abs()
    lowest, highest = ((exact + sign * error).round().clamp(-127, 127) for sign in (-1, 1))
    if q.numel() > 1000 and backend.name != "cpu":
        assert (lowest != highest).double().mean() < ties
    worst = torch.maximum(lowest - q, q - highest).max() if q.numel() else 0
    assert worst <= 0, f"{worst} steps outside of what rounding allows"
