"""An attention whose inputs are projected already and whose output is added to the block's, by any attention function.

diffusers' default processor is computed here. Other processors run as they are, on a stand-in for their attention:
its `to_q`, `to_k` and `to_v` give what the block has computed, and its `to_out[0]` adds the residual in the product's
epilogue. That holds for processors that do no more with their two inputs than project them. Those of diffusers that do
so are known; others are declared by `fuse_with_processor`. All get inputs without memory, so that a processor that
computes something of its own from them cannot do so unnoticed.
"""

from __future__ import annotations

from typing import Any, TypeVar

from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from ldmq_kernels.integrations.diffusers.fused import feed_forward
from ldmq_kernels.integrations.diffusers.fused.attended import attended
from ldmq_kernels.integrations.diffusers.fused.eligibility import is_inactive, is_unwrapped

P = TypeVar("P", bound=type)
PROCESSORS: set[type] = {
    AttnProcessor2_0,
    attention_processor.AttnProcessor,
    attention_processor.SlicedAttnProcessor,
    attention_processor.XFormersAttnProcessor,
    attention_processor.AttnProcessorNPU,
}


def fuse_with_processor(processor: P) -> P:
    """Declare that blocks with this class of attention processor may run fused; also as a decorator of the class.

        @ldmq.fuse_with_processor
        class SageAttnProcessor: ...

    A processor is called with the attention, the hidden states, the text and the mask, and may do no more with hidden
    states and text than look at their sizes and project them by `attn.to_q`, `attn.to_k` and `attn.to_v`: both are
    tensors of the meta device. An attention function that takes the place of
    `torch.nn.functional.scaled_dot_product_attention` needs no declaration.

    Returns:
        The class itself.

    Raises:
        TypeError: it is no class.
    """
    if not isinstance(processor, type):
        raise TypeError(f"found a {type(processor).__name__}, the class of an attention processor is needed")
    PROCESSORS.add(processor)
    return processor


def is_plain_attention(attention: Any) -> bool:
    """Whether an attention projects, attends by a processor that is known, and projects out, and nothing more."""
    return (
        is_unwrapped(attention, Attention)
        and type(attention.processor) in PROCESSORS
        and attention.to_k is not None
        and attention.spatial_norm is None
        and attention.group_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and is_inactive(attention.to_out[1])
    )


def attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    text: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """Attention as its processor computes it, and the residual added by the projection out, after the gate.

    Args:
        attention: one that `is_plain_attention`.
        query: (B, T, C); key and value: (B, S, C).
        mask: as the processor gets it.
        text: what key and value were projected from, (B, S, C of the text); None for the block's own hidden states.
        residual: (B, T, C of the block).
        gate: (B, 1, C of the block), or None.

    Raises:
        RuntimeError: the processor computes something of its own from its inputs.
    """
    if type(attention.processor) is not AttnProcessor2_0:
        return _by_processor(attention, query, key, value, mask, text, residual, gate)
    batch, head_dim = query.shape[0], key.shape[-1] // attention.heads
    if mask is not None:
        mask = attention.prepare_attention_mask(mask, key.shape[1], batch)
        mask = mask.view(batch, attention.heads, -1, mask.shape[-1])
    query, key, value = (t.view(batch, -1, attention.heads, head_dim) for t in (query, key, value))
    out = attended(query, key, value, mask).reshape(batch, -1, attention.heads * head_dim)
    return feed_forward.gated(attention.to_out[0], out, residual, gate)


class _Projected:
    """Stands in for an attention whose projections are made: all else is the attention's own."""

    rescale_output_factor: Any

    def __init__(self, attention: Any, query: Tensor, key: Tensor, value: Tensor, residual: Any, gate: Any) -> None:
        self._attention = attention
        self.to_q, self.to_k, self.to_v = (lambda _x, made=made: made for made in (query, key, value))
        self.to_out = [lambda out: feed_forward.gated(attention.to_out[0], out, residual, gate), attention.to_out[1]]
        self.rescale_output_factor = _One()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class _One:
    """What a tensor is divided by without a pass over it."""

    def __rtruediv__(self, other: Tensor) -> Tensor:
        return other


def _by_processor(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    text: Tensor | None,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    stand_in = _Projected(attention, query, key, value, residual, gate)
    hidden, text = residual.to("meta"), None if text is None else text.to("meta")
    name = type(attention.processor).__name__
    advice = (
        "it computes something from the hidden states or the text beside projecting them: do not give this class to "
        "fuse_with_processor, and its blocks run as diffusers has them"
    )
    try:
        out = attention.processor(stand_in, hidden, encoder_hidden_states=text, attention_mask=mask)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise RuntimeError(f"{name} cannot run in a fused block: {advice}") from error
    if out.is_meta or out.shape != residual.shape:
        raise RuntimeError(f"{name} cannot run in a fused block: {advice}")
    return out
