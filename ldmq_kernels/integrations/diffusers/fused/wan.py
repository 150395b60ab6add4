"""Wan's block: [LayerNorm + modulation + quantize] once for q, k and v, gates and residuals in epilogues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from ldmq_kernels.integrations.diffusers.fused import feed_forward
from ldmq_kernels.integrations.diffusers.fused.attended import dispatched
from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_inactive,
    is_unwrapped,
    quantized_layer_norm,
    wants_gradients,
)
from ldmq_kernels.integrations.diffusers.fused.feed_forward import gated
from ldmq_kernels.integrations.diffusers.fused.projections import SharesProjections


class FusedWanTransformerBlock(SharesProjections, WanTransformerBlock):
    """WanTransformerBlock in fused ops, where its attentions, norms and feed-forward are diffusers' own."""

    attn1: Any
    attn2: Any
    norm1: Any
    norm2: Any
    norm3: Any
    ffn: Any
    scale_shift_table: Any

    def projections(self) -> dict[str, tuple[Any, ...]]:
        """q, k and v of the self-attention; of the text's, q, and k and v."""
        own, text = self.attn1, self.attn2
        if type(own) is not WanAttention or type(text) is not WanAttention:
            return {}
        return {
            "qkv": (own.to_q, own.to_k, own.to_v),
            "text_q": (text.to_q,),
            "text_kv": (text.to_k, text.to_v),
        }

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Take and return what the forward of WanTransformerBlock does."""
        if args or kwargs or not self._is_fusible(hidden_states, encoder_hidden_states, temb):
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb, *args, **kwargs)
        self.look_again(hidden_states)
        x, text = hidden_states, encoder_hidden_states
        table = self.scale_shift_table
        if temb.ndim == 4:  # of each token, of each sample or of all
            terms_of = (table.unsqueeze(0) + temb.float()).expand(len(x), -1, -1, -1)
            terms = [term.squeeze(2) for term in terms_of.chunk(6, dim=2)]
        else:
            terms = [*(table + temb.float()).chunk(6, dim=1)]
        x = self._self_attention(x, terms, rotary_emb)
        x = self._text_attention(x, text)
        shift, scale, gate = terms[3:]
        norm, ff = self.norm3, self.ffn
        return feed_forward.run(
            ff,
            x,
            lambda layer: quantized_layer_norm(norm, x, layer, scale, shift),
            lambda: (norm(x.float()) * (1 + scale) + shift).to(x.dtype),
            x,
            gate,
        )

    def _is_fusible(self, *given: Tensor) -> bool:
        return (
            not wants_gradients(self, *given)
            and all(_is_plain(attention) for attention in (self.attn1, self.attn2))
            and all(is_unwrapped(norm, FP32LayerNorm) for norm in (self.norm1, self.norm3))
            and (is_unwrapped(self.norm2, FP32LayerNorm) or is_unwrapped(self.norm2, nn.Identity))
            and feed_forward.is_plain(self.ffn)
        )

    def _self_attention(self, x: Tensor, terms: Sequence[Tensor], rotary: Any) -> Tensor:
        attention, norm = self.attn1, self.norm1
        shift, scale, gate = terms[:3]
        query, key, value = self._shared["qkv"](
            (attention.to_q, attention.to_k, attention.to_v),
            x.dtype,
            lambda layer: quantized_layer_norm(norm, x, layer, scale, shift),
            lambda: (norm(x.float()) * (1 + scale) + shift).to(x.dtype),
        )
        query, key, value = _heads(attention, query, key, value)
        query, key = (_rotated(part, *rotary) for part in (query, key))
        out = _attend(attention, query, key, value, attention.processor._parallel_config)
        return gated(attention.to_out[0], out, x, gate)

    def _text_attention(self, x: Tensor, text: Tensor) -> Tensor:
        attention, norm = self.attn2, self.norm2
        is_normed = isinstance(norm, FP32LayerNorm)
        (query,) = self._shared["text_q"](
            (attention.to_q,),
            x.dtype,
            lambda layer: quantized_layer_norm(norm, x, layer) if is_normed else layer.quantize(x),
            lambda: norm(x.float()).to(x.dtype),
        )
        key, value = self._shared["text_kv"](
            (attention.to_k, attention.to_v), text.dtype, lambda layer: layer.quantize(text), lambda: text
        )
        query, key, value = _heads(attention, query, key, value)
        out = _attend(attention, query, key, value, None)
        return gated(attention.to_out[0], out, x, None)


def _is_plain(attention: Any) -> bool:
    """Whether an attention computes what `_attend` does and nothing more, as one that sees a picture's tokens does."""
    return (
        is_unwrapped(attention, WanAttention)
        and type(attention.processor) is WanAttnProcessor
        and attention.add_k_proj is None
        and not attention.fused_projections
        and is_inactive(attention.to_out[1])
    )


def _heads(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """(B, T, heads, head_dim) each, normed over all heads first."""
    parts = attention.norm_q(query), attention.norm_k(key), value
    return tuple(part.unflatten(2, (attention.heads, -1)) for part in parts)


def _rotated(x: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels turned by their angle, as WanAttnProcessor does."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = freqs_cos[..., 0::2], freqs_sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, parallel_config: Any) -> Tensor:
    """Attention as WanAttnProcessor computes it, (B, T, C)."""
    out = dispatched(query, key, value, attention.processor._attention_backend, parallel_config)
    return out.flatten(2, 3).type_as(query)
