"""Residual block: [GroupNorm + SiLU + quantize], convolution + time embedding, the same again, convolution + skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_inactive,
    is_unwrapped,
    is_unwrapped_linear,
    quantized_norm,
    takes_quantized,
    wants_gradients,
)
from ldmq_kernels.nn import QuantConv2d


@dataclass(frozen=True)
class TimeColumns:
    """Where a block finds its share of a table's row: [time embedding | projection of each block]; see `step_cache`."""

    row: int  # width of the whole
    embedding: int  # width of the time embedding
    start: int  # of the block's own projection; start == stop: it has none there
    stop: int


class FusedResnetBlock2D(ResnetBlock2D):
    """ResnetBlock2D whose quantized convolutions take their input from a fused norm and add in their epilogue.

    Attributes:
        time_columns: its place in the rows of a step table, which may come in place of `temb`; or None.
    """

    time_columns: TimeColumns | None = None

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Take and return what the forward of ResnetBlock2D does; `temb` is (N, E), or rows of a step table."""
        vector = self._tabulated(temb)
        is_fusible = self.can_add_vector() and (vector is not None or self._has_fused_convolution())
        if args or kwargs or not is_fusible or wants_gradients(self, input_tensor, temb):
            return super().forward(input_tensor, self._embedding(temb), *args, **kwargs)
        if vector is None and self.time_emb_proj is not None and temb is not None:
            vector = self.project_time(self._embedding(temb))
        hidden = self._convolve(self.norm1, self.conv1, input_tensor, vector, None)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return self._convolve(self.norm2, self.conv2, hidden, None, shortcut)

    def can_add_vector(self) -> bool:
        """Whether the block is two convolutions of SiLU of norms, and adds its time embedding after the first."""
        # a VAE's decoder has no time embedding, and calls that "group"
        adds = self.time_embedding_norm == "default" or (
            self.time_embedding_norm == "group" and self.time_emb_proj is None
        )
        plain = self.upsample is None and self.downsample is None and adds
        return (
            plain
            and self.output_scale_factor == 1
            and is_unwrapped(self.nonlinearity, nn.SiLU)
            and is_inactive(self.dropout)
        )

    def _has_fused_convolution(self) -> bool:
        return takes_quantized(self.conv1) or takes_quantized(self.conv2)

    # -- rows of a step table ------------------------------------------------------------------------

    def _tabulated(self, temb: Tensor | None) -> Tensor | None:
        """The block's projection out of a row, (N, K); None where `temb` is no row or the block is not in it."""
        columns = self.time_columns
        if columns is None or temb is None or temb.shape[-1] != columns.row or columns.start == columns.stop:
            return None
        return temb[:, columns.start : columns.stop] if is_unwrapped_linear(self.time_emb_proj) else None

    def _embedding(self, temb: Tensor | None) -> Tensor | None:
        """The time embedding itself, (N, E)."""
        columns = self.time_columns
        if columns is None or temb is None or temb.shape[-1] != columns.row:
            return temb
        return temb[:, : columns.embedding].contiguous()

    def _leave_table(self) -> None:
        """From now on project the time embedding: the projection is no longer what was tabulated."""
        if self.time_columns is not None:
            self.time_columns = TimeColumns(self.time_columns.row, self.time_columns.embedding, 0, 0)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "time_emb_proj":
            self._leave_table()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._leave_table()

    # -- parts of the block --------------------------------------------------------------------------

    def project_time(self, temb: Any) -> Tensor:
        """The time embedding's share of each channel, (N, K); temb (N, E)."""
        projection = self.time_emb_proj
        if self.skip_time_act:
            return projection(temb)
        if not takes_quantized(projection):
            return projection(self.nonlinearity(temb))
        op_dtype = projection.scheme.activations.op_dtype
        x_q, scale = ops.silu_quantize(temb, projection.input_inv_scale, projection.smoothing, *op_dtype)
        return projection.linear(x_q, scale, temb.dtype)

    def _convolve(
        self, norm: nn.Module, conv: nn.Module, x: Tensor, vector: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """conv(silu(norm(x))) + vector + residual, fused as far as its parts allow."""
        if (
            isinstance(conv, QuantConv2d)
            and takes_quantized(conv)
            and _has_room(conv)
            and is_unwrapped(norm, nn.GroupNorm)
        ):
            x_q, scale = quantized_norm(norm, x, conv, silu=True, per_token=False)  # type: ignore[arg-type]
            return conv.convolve(x_q, scale, x.dtype, vector, residual)
        out = conv(self.nonlinearity(norm(x)))
        if vector is not None:
            out = out + vector[:, :, None, None]
        return out if residual is None else out + residual


def _has_room(conv: QuantConv2d) -> bool:
    """Whether the epilogue can add a time embedding, and the norm's output needs no padding of another mode."""
    return not conv.is_pointwise and conv.padding_mode == "zeros"
