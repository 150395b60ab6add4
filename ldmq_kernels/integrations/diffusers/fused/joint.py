"""SD3's block: [LayerNorm + modulation + quantize] once for q, k and v, gates and residuals in epilogues."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from ldmq_kernels.integrations.diffusers.fused import feed_forward
from ldmq_kernels.integrations.diffusers.fused.attended import attended
from ldmq_kernels.integrations.diffusers.fused.eligibility import is_inactive, is_unwrapped, wants_gradients
from ldmq_kernels.integrations.diffusers.fused.feed_forward import gated
from ldmq_kernels.integrations.diffusers.fused.modulation import fed, is_adaptive, modulation, projected
from ldmq_kernels.integrations.diffusers.fused.projections import SharesProjections


class FusedJointTransformerBlock(SharesProjections, JointTransformerBlock):
    """JointTransformerBlock in fused ops, where its attentions, norms and feed-forwards are diffusers' own."""

    attn: Any
    attn2: Any
    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any
    ff: Any
    ff_context: Any

    def projections(self) -> dict[str, tuple[Any, ...]]:
        """q, k and v of the picture and of the text; and those of a second attention to the picture."""
        groups: dict[str, tuple[Any, ...]] = {}
        joint, own = self.attn, self.attn2
        if type(joint) is Attention and joint.to_k is not None and joint.add_q_proj is not None:
            groups["qkv"] = (joint.to_q, joint.to_k, joint.to_v)
            groups["added_qkv"] = (joint.add_q_proj, joint.add_k_proj, joint.add_v_proj)
        if type(own) is Attention and own.to_k is not None:
            groups["second_qkv"] = (own.to_q, own.to_k, own.to_v)
        return groups

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """Take and return what the forward of JointTransformerBlock does."""
        if args or kwargs or joint_attention_kwargs or not self._is_fusible(hidden_states, encoder_hidden_states, temb):
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs, *args, **kwargs)
        self.look_again(hidden_states)
        x, text, attention, norm = hidden_states, encoder_hidden_states, self.attn, self.norm1.norm
        own = modulation(self.norm1, temb, 9 if self.use_dual_attention else 6)
        qkv = _heads(attention, projected(self, "qkv", norm, x, *own[:2]), attention.norm_q, attention.norm_k)
        if self.context_pre_only:
            scale, shift = modulation(self.norm1_context, temb, 2)
            added: tuple[Tensor, ...] = (shift, scale)
        else:
            added = modulation(self.norm1_context, temb, 6)
        text_qkv = projected(self, "added_qkv", self.norm1_context.norm, text, *added[:2])
        text_qkv = _heads(attention, text_qkv, attention.norm_added_q, attention.norm_added_k)
        out = _attend(*(torch.cat(pair, dim=2) for pair in zip(qkv, text_qkv, strict=True)))
        out, text_out = out[:, : x.shape[1]], out[:, x.shape[1] :]
        second = None
        if self.use_dual_attention:  # it reads the block's input, too
            again = projected(self, "second_qkv", norm, x, *own[6:8])
            second = _attend(*_heads(self.attn2, again, self.attn2.norm_q, self.attn2.norm_k))
        x = gated(attention.to_out[0], out, x, own[2])
        if second is not None:
            x = gated(self.attn2.to_out[0], second, x, own[8])
        x = fed(self.ff, self.norm2, x, own[3:6])
        if self.context_pre_only:
            return None, x
        text = gated(attention.to_add_out, text_out, text, added[2])
        return fed(self.ff_context, self.norm2_context, text, added[3:]), x

    def _is_fusible(self, *given: Tensor) -> bool:
        own_norm = SD35AdaLayerNormZeroX if self.use_dual_attention else AdaLayerNormZero
        text_norm = AdaLayerNormContinuous if self.context_pre_only else AdaLayerNormZero
        norms = [self.norm2] if self.context_pre_only else [self.norm2, self.norm2_context]
        feed_forwards = [self.ff] if self.context_pre_only else [self.ff, self.ff_context]
        attentions = [self.attn, self.attn2] if self.use_dual_attention else [self.attn]
        return (
            not wants_gradients(self, *given)
            and self._chunk_size is None
            and is_adaptive(self.norm1, own_norm)
            and is_adaptive(self.norm1_context, text_norm)
            and all(is_unwrapped(norm, nn.LayerNorm) for norm in norms)
            and all(feed_forward.is_plain(ff) for ff in feed_forwards)
            and all(_is_plain(attention) for attention in attentions)
            and self.attn.add_q_proj is not None
        )


def _is_plain(attention: Any) -> bool:
    """Whether an attention computes what this block does and nothing more."""
    return (
        is_unwrapped(attention, Attention)
        and type(attention.processor) is JointAttnProcessor2_0
        and attention.to_k is not None
        and is_inactive(attention.to_out[1])
    )


def _heads(attention: Any, qkv: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(B, heads, T, head_dim) each, q and k normed where there are norms."""
    query, key, value = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in qkv)
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as JointAttnProcessor2_0 computes it, (B, T, C)."""
    out = attended(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.flatten(2).to(query.dtype)
