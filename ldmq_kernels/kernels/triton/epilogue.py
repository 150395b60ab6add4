"""The operands of the GEMM kernels' epilogue, and the second launch that split-K needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ldmq_kernels.kernels.dispatch import Unsupported
from ldmq_kernels.kernels.triton.dependent_launch import dependent
from ldmq_kernels.kernels.triton.matrix import reduce_split_k
from ldmq_kernels.kernels.triton.tile_tables import Tile


class Epilogue(NamedTuple):
    """The operands of the epilogue, in the order in which the kernels take them; see `matrix.store_slice`.

    Attributes:
        x_scale: float32: one, or one for each row (of a linear) or sample (of a convolution).
        weight_scale: (n,) float32.
        bias: (n,) floating.
        sample_bias: (samples, n) floating.
        residual: floating, of the output's shape.
        gate: (..., n) floating, each row of n for an equal run of the output's rows.
    """

    x_scale: Tensor | None
    weight_scale: Tensor | None
    bias: Tensor | None = None
    sample_bias: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None

    def expanded(self, units: int, n: int, out_shape: Sequence[int], is_image: bool = False) -> Epilogue:
        """The same operands in the kernels' sizes, contiguous.

        Args:
            units: rows or samples that may have a scale of their own.
            n: output channels.
            out_shape: the output's.
            is_image: whether the output is channels_last.

        Raises:
            Unsupported: there are neither one activation scale nor `units` of them, or the gate's rows do not divide
                them.
        """
        return Epilogue(
            None if self.x_scale is None else _activation_scale(self.x_scale, units),
            None if self.weight_scale is None else self.weight_scale.contiguous(),
            _expanded(self.bias, (n,)),
            _expanded(self.sample_bias, (units, n)),
            _expanded(self.residual, out_shape, torch.channels_last if is_image else torch.contiguous_format),
            None if self.gate is None else _gate(self.gate, units, n),
        )

    @property
    def has_one_scale(self) -> bool:
        """Whether one activation scale holds for all rows."""
        return self.x_scale is not None and self.x_scale.numel() == 1

    @property
    def conv2d_terms(self) -> tuple[Tensor | None, ...]:
        """What the kernels of a convolution take after its activation scale; no gate."""
        return self.weight_scale, self.bias, self.sample_bias, self.residual

    def gate_rows(self, m: int) -> int:
        """How many of m rows share a row of the gate."""
        return 1 if self.gate is None else m // self.gate.shape[0]

    def finish(self, partial: Tensor, out: Tensor, m: int, n: int, unit_rows: int) -> None:
        """Reduce the partial sums (split_k, m, n) into `out`; nothing where the kernel stored `out` itself.

        Args:
            partial: what the kernel stored.
            out: (m, n) floating.
            m: rows of the output.
            n: output channels.
            unit_rows: rows that share an activation scale and a sample_bias.
        """
        if partial is out:
            return
        grid = triton.cdiv(m, 16), triton.cdiv(n, 128)
        reduce_split_k[grid](
            partial,
            *self,
            out,
            m,
            n,
            unit_rows,
            self.gate_rows(m),
            ONE_SCALE=self.has_one_scale,
            SPLIT_K=partial.shape[0],
            BLOCK_M=16,
            BLOCK_N=128,
            enable_fp_fusion=False,
            **dependent(out),
        )


def partial_sums(out: Tensor, tile: Tile, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The tensor that the main loop's sums are stored to: `out` itself, or (split_k, m, n) of this dtype."""
    if tile.split_k == 1:
        return out
    return torch.empty((tile.split_k, m, n), dtype=dtype, device=out.device)


def _expanded(
    operand: Tensor | None, shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format
) -> Tensor | None:
    return None if operand is None else operand.expand(tuple(shape)).contiguous(memory_format=layout)


def _activation_scale(x_scale: Tensor, count: int) -> Tensor:
    if x_scale.numel() not in (1, count):
        raise Unsupported(f"{x_scale.numel()} activation scales; one is taken, or one for each of {count}")
    return x_scale.reshape(-1).contiguous()


def _gate(gate: Tensor, rows: int, n: int) -> Tensor:
    if gate.shape[-1] != n or rows % max(1, gate.numel() // n):
        raise Unsupported(f"a gate of shape {tuple(gate.shape)} for {rows} rows of {n}")
    return gate.reshape(-1, n).contiguous()
