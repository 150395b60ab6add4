"""Transformer block: [LayerNorm + quantize] once for q, k and v, attention, out + skip; GEGLU + quantize between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ldmq_kernels import ops
from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_inactive,
    is_unhooked,
    is_unwrapped,
    quantized_layer_norm,
    takes_int8,
    wants_gradients,
)
from ldmq_kernels.integrations.diffusers.fused.merged import MergedLinears, can_merge, share_quantization
from ldmq_kernels.tracing import is_exported

FOUND = ("_shared", "_looked_at")  # what a block has looked up, and looks up again in a copy


class _Projections:
    """Linears over one input: what they share was found when the block was fused or moved."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self._revisions = [getattr(layer, "revision", None) for layer in layers]
        self._shares = share_quantization(layers)
        self._merged = MergedLinears(layers) if self._shares and len(layers) > 1 and can_merge(layers) else None

    def __call__(
        self, layers: Sequence[Any], dtype: torch.dtype, quantize: Callable[[Any], tuple], plain: Callable[[], Tensor]
    ) -> tuple[Tensor, ...]:
        """Outputs of the layers: `quantize` makes the input as a layer wants it, `plain` makes it floating."""
        if not self._is_current(layers):
            x = plain()
            return tuple(layer(x) for layer in layers)
        x_q, scale = quantize(layers[0])
        if self._merged is not None and self._merged.is_valid(layers):
            return self._merged.products(x_q, scale, dtype)
        return tuple(layer.linear(x_q, scale, dtype) for layer in layers)

    def _is_current(self, layers: Sequence[Any]) -> bool:
        return (
            self._shares
            and all(a is b and takes_int8(a) for a, b in zip(layers, self.layers, strict=True))
            and self._revisions == [layer.revision for layer in layers]
        )


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """BasicTransformerBlock in fused ops, where its attentions and feed-forward are diffusers' own."""

    def find_shared(self) -> None:
        """Look again at which projections share their quantization, and merge what can be one product."""
        self._looked_at = self._projections()
        shared: dict[str, _Projections] = {}
        for name, attention in (("attn1", self.attn1), ("attn2", self.attn2)):
            if type(attention) is Attention and attention.to_k is not None:
                q, k, v = attention.to_q, attention.to_k, attention.to_v
                if name == "attn1":
                    shared["attn1.qkv"] = _Projections([q, k, v])
                else:
                    shared["attn2.q"], shared["attn2.kv"] = _Projections([q]), _Projections([k, v])
        self._shared = shared

    def _projections(self) -> list[tuple[int, int | None]]:
        """Which layers project, and how often each has been filled, loaded or moved."""
        attentions = [attention for attention in (self.attn1, self.attn2) if attention is not None]
        layers = [layer for a in attentions for layer in (a.to_q, a.to_k, a.to_v)]
        return [(id(layer), getattr(layer, "revision", None)) for layer in layers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.find_shared()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in FOUND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.find_shared()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Take and return what the forward of BasicTransformerBlock does."""
        knows = not (args or cross_attention_kwargs or hidden_states.dim() != 3)
        lacks_context = self.attn2 is not None and encoder_hidden_states is None
        is_fusible = knows and not lacks_context and self._is_fusible()
        if not is_fusible or wants_gradients(self, hidden_states, encoder_hidden_states, attention_mask):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                *args,
                **kwargs,
            )
        is_traced = torch.compiler.is_dynamo_compiling() or is_exported()
        is_recorded = is_traced or (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing())
        if not is_recorded and self._looked_at != self._projections():
            self.find_shared()
        x = self._self_attention(hidden_states, attention_mask)
        if encoder_hidden_states is not None and self.attn2 is not None:
            x = self._cross_attention(x, encoder_hidden_states, encoder_attention_mask)
        return self._feed_forward(x)

    def _is_fusible(self) -> bool:
        return (
            self.norm_type == "layer_norm"
            and not self.only_cross_attention
            and self.pos_embed is None
            and self._chunk_size is None
            and is_unwrapped(self.norm1, nn.LayerNorm)
            and _is_plain(self.attn1)
            and (self.attn2 is None or (is_unwrapped(self.norm2, nn.LayerNorm) and _is_plain(self.attn2)))
        )

    def _self_attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attention, norm = self.attn1, self.norm1
        layers = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = self._shared["attn1.qkv"](
            layers, x.dtype, lambda layer: quantized_layer_norm(norm, x, layer), lambda: norm(x)
        )
        return _attend(attention, query, key, value, mask, x)

    def _cross_attention(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        attention, norm = self.attn2, self.norm2
        (query,) = self._shared["attn2.q"](
            (attention.to_q,), x.dtype, lambda layer: quantized_layer_norm(norm, x, layer), lambda: norm(x)
        )
        key, value = self._shared["attn2.kv"](
            (attention.to_k, attention.to_v), context.dtype, lambda layer: layer.quantize(context), lambda: context
        )
        return _attend(attention, query, key, value, mask, x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        norm, net = self.norm3, self.ff.net
        is_plain = is_unhooked(self.ff) and is_unwrapped(net[0], GEGLU) and is_unwrapped(norm, nn.LayerNorm)
        if not (is_plain and all(is_inactive(module) for module in (net[1], *net[3:]))):
            return self.ff(norm(x)) + x
        proj, out = net[0].proj, net[2]
        hidden = proj.linear(*quantized_layer_norm(norm, x, proj), x.dtype) if takes_int8(proj) else proj(norm(x))
        if takes_int8(out):
            x_q, scale = ops.geglu_quantize(hidden, out.input_inv_scale, out.smoothing)
            return out.linear(x_q, scale, x.dtype, x)
        value, gate = hidden.chunk(2, dim=-1)
        return out(value * net[0].gelu(gate)) + x


def _is_plain(attention: Any) -> bool:
    """Whether an attention computes what `_attend` does and nothing more."""
    return (
        is_unwrapped(attention, Attention)
        and type(attention.processor) is AttnProcessor2_0
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


def _attend(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, residual: Tensor
) -> Tensor:
    """Attention as AttnProcessor2_0 computes it, and the residual added by the projection out."""
    batch, head_dim = query.shape[0], key.shape[-1] // attention.heads
    if mask is not None:
        mask = attention.prepare_attention_mask(mask, key.shape[1], batch)
        mask = mask.view(batch, attention.heads, -1, mask.shape[-1])
    query, key, value = (t.view(batch, -1, attention.heads, head_dim).transpose(1, 2) for t in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out = out.transpose(1, 2).reshape(batch, -1, attention.heads * head_dim)
    layer = attention.to_out[0]
    if takes_int8(layer):
        return layer.project(out, residual)
    return layer(out) + residual
