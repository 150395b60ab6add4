"""Flux's blocks: [LayerNorm + modulation + quantize] once for q, k and v, gates and residuals in epilogues."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused import feed_forward
from ldmq_kernels.integrations.diffusers.fused.attended import dispatched
from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_inactive,
    is_unwrapped,
    takes_quantized,
    wants_gradients,
)
from ldmq_kernels.integrations.diffusers.fused.feed_forward import gated
from ldmq_kernels.integrations.diffusers.fused.modulation import fed, is_adaptive, modulation, projected
from ldmq_kernels.integrations.diffusers.fused.projections import SharesProjections

LARGEST_FLOAT16 = 65504


class FusedFluxTransformerBlock(SharesProjections, FluxTransformerBlock):
    """FluxTransformerBlock in fused ops, where its attention, norms and feed-forwards are diffusers' own."""

    attn: Any
    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any
    ff: Any
    ff_context: Any

    def projections(self) -> dict[str, tuple[Any, ...]]:
        """q, k and v of the picture and of the text."""
        attention = self.attn
        if type(attention) is not FluxAttention or attention.added_kv_proj_dim is None:
            return {}
        return {
            "qkv": (attention.to_q, attention.to_k, attention.to_v),
            "added_qkv": (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj),
        }

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Take and return what the forward of FluxTransformerBlock does."""
        if args or kwargs or joint_attention_kwargs or not self._is_fusible(hidden_states, encoder_hidden_states, temb):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs, *args, **kwargs
            )
        self.look_again(hidden_states)
        attention, x, text = self.attn, hidden_states, encoder_hidden_states
        own, added = modulation(self.norm1, temb, 6), modulation(self.norm1_context, temb, 6)
        qkv = projected(self, "qkv", self.norm1.norm, x, *own[:2])
        text_qkv = projected(self, "added_qkv", self.norm1_context.norm, text, *added[:2])
        query, key = _heads(attention, qkv[0], attention.norm_q), _heads(attention, qkv[1], attention.norm_k)
        text_query = _heads(attention, text_qkv[0], attention.norm_added_q)
        text_key = _heads(attention, text_qkv[1], attention.norm_added_k)
        value, text_value = _heads(attention, qkv[2]), _heads(attention, text_qkv[2])
        query, key = torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1)
        value = torch.cat([text_value, value], dim=1)
        out = _attend(attention, query, key, value, image_rotary_emb)
        text_out, out = out.split_with_sizes([text.shape[1], out.shape[1] - text.shape[1]], dim=1)
        x = gated(attention.to_out[0], out.contiguous(), x, own[2])
        text = gated(attention.to_add_out, text_out.contiguous(), text, added[2])
        x = fed(self.ff, self.norm2, x, own[3:])
        text = fed(self.ff_context, self.norm2_context, text, added[3:])
        if text.dtype == torch.float16:
            text = text.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16)
        return text, x

    def _is_fusible(self, *given: Tensor) -> bool:
        return (
            not wants_gradients(self, *given)
            and _is_plain(self.attn)
            and is_inactive(self.attn.to_out[1])
            and all(is_adaptive(norm, AdaLayerNormZero) for norm in (self.norm1, self.norm1_context))
            and all(is_unwrapped(norm, nn.LayerNorm) for norm in (self.norm2, self.norm2_context))
            and all(feed_forward.is_plain(ff) for ff in (self.ff, self.ff_context))
        )


class FusedFluxSingleTransformerBlock(SharesProjections, FluxSingleTransformerBlock):
    """FluxSingleTransformerBlock in fused ops, where its attention and norm are diffusers' own."""

    attn: Any
    norm: Any
    proj_mlp: Any
    act_mlp: Any

    def projections(self) -> dict[str, tuple[Any, ...]]:
        """The feed-forward's first layer, and q, k and v."""
        attention = self.attn
        if type(attention) is not FluxAttention:
            return {}
        return {"mlp_qkv": (self.proj_mlp, attention.to_q, attention.to_k, attention.to_v)}

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Take and return what the forward of FluxSingleTransformerBlock does."""
        if args or kwargs or joint_attention_kwargs or not self._is_fusible(hidden_states, encoder_hidden_states, temb):
            return super().forward(
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs, *args, **kwargs
            )
        self.look_again(hidden_states)
        attention, length = self.attn, encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        terms = modulation(self.norm, temb, 3)
        mlp, query, key, value = projected(self, "mlp_qkv", self.norm.norm, x, *terms[:2])
        query, key = _heads(attention, query, attention.norm_q), _heads(attention, key, attention.norm_k)
        out = _attend(attention, query, key, _heads(attention, value), image_rotary_emb)
        x = self._project_out(out, mlp, x, terms[2])
        if x.dtype == torch.float16:
            x = x.clip(-LARGEST_FLOAT16, LARGEST_FLOAT16)
        return x[:, :length], x[:, length:]

    def _project_out(self, attended: Tensor, mlp: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """proj_out([attended | gelu(mlp)]) * gate + x; with a calibrated scale each part is quantized where it is."""
        layer: Any = self.proj_out
        if not (takes_quantized(layer) and layer.scheme.is_static and self.act_mlp.approximate == "tanh"):
            return gated(layer, torch.cat([attended, self.act_mlp(mlp)], dim=2), x, gate)
        inverse, width = layer.input_inv_scale, attended.shape[-1]
        first, second = (inverse, inverse) if inverse.numel() == 1 else (inverse[:width], inverse[width:])
        op_dtype = layer.scheme.activations.op_dtype
        activated, _ = ops.gelu_quantize(mlp, True, second, None, *op_dtype)
        x_q = torch.cat([ops.quantize_static(attended, first, -1, *op_dtype), activated], dim=2)
        return layer.linear(x_q, None, x.dtype, x, gate=gate)

    def _is_fusible(self, *given: Tensor) -> bool:
        return (
            not wants_gradients(self, *given)
            and _is_plain(self.attn)
            and is_adaptive(self.norm, AdaLayerNormZeroSingle)
            and is_unwrapped(self.act_mlp, nn.GELU)
        )


def _is_plain(attention: Any) -> bool:
    """Whether an attention computes what these blocks do and nothing more."""
    return (
        is_unwrapped(attention, FluxAttention)
        and type(attention.processor) is FluxAttnProcessor
        and not attention.fused_projections
    )


def _heads(attention: Any, x: Tensor, norm: Any = None) -> Tensor:
    """(B, T, heads, head_dim), normed where there is a norm."""
    x = x.unflatten(-1, (-1, attention.head_dim))
    return x if norm is None else norm(x)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, rotary: Any) -> Tensor:
    """Attention as FluxAttnProcessor computes it, (B, T, C)."""
    processor = attention.processor
    if rotary is not None:
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    out = dispatched(query, key, value, processor._attention_backend, processor._parallel_config)
    return out.flatten(2, 3).to(query.dtype)
