"""Transformer block: [LayerNorm + quantize] once for q, k and v, attention, out + skip; GEGLU + quantize between.

PixArt's has a modulation after its norms, and gates before its skips, from a table and the time embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ldmq_kernels.integrations.diffusers.fused import feed_forward
from ldmq_kernels.integrations.diffusers.fused.attention import attend, is_plain_attention
from ldmq_kernels.integrations.diffusers.fused.eligibility import (
    is_unwrapped,
    is_unwrapped_linear,
    quantized_layer_norm,
    wants_gradients,
)
from ldmq_kernels.integrations.diffusers.fused.projections import SharesProjections
from ldmq_kernels.nn import QuantLinear


@dataclass(frozen=True)
class TextColumns:
    """Where a block finds its share of what comes in place of the text; see `text_cache`."""

    row: int  # width of the whole
    text: int  # width of the text itself
    start: int  # of the block's keys
    middle: int  # of its values
    stop: int


class FusedBasicTransformerBlock(SharesProjections, BasicTransformerBlock):
    """BasicTransformerBlock in fused ops, where its attentions and feed-forward are diffusers' own.

    Attributes:
        text_columns: its place in what may come in place of the text, or None.
    """

    attn1: Any
    attn2: Any
    norm1: Any
    norm2: Any
    norm3: Any
    ff: Any
    scale_shift_table: Any
    text_columns: TextColumns | None = None

    def projections(self) -> dict[str, tuple[Any, ...]]:
        """q, k and v of the self-attention; of the text's, q, and k and v."""
        shared: dict[str, tuple[Any, ...]] = {}
        for name, attention in (("attn1", self.attn1), ("attn2", self.attn2)):
            if type(attention) is Attention and attention.to_k is not None:
                q, k, v = attention.to_q, attention.to_k, attention.to_v
                groups = {"attn1.qkv": (q, k, v)} if name == "attn1" else {"attn2.q": (q,), "attn2.kv": (k, v)}
                shared.update(groups)
        return shared

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
        encoder_hidden_states, text = self._tabulated(encoder_hidden_states)
        knows = not (args or cross_attention_kwargs or hidden_states.dim() != 3)
        lacks_context = self.attn2 is not None and encoder_hidden_states is None
        is_fusible = knows and not lacks_context and self._is_fusible()
        if not is_fusible or wants_gradients(self, hidden_states, encoder_hidden_states, attention_mask):
            return super().forward(
                hidden_states,
                attention_mask,
                _whole(encoder_hidden_states, text is not None),
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                *args,
                **kwargs,
            )
        self.look_again(hidden_states)
        terms = self._terms(hidden_states, timestep)
        x = self._self_attention(hidden_states, attention_mask, terms)
        if encoder_hidden_states is not None and self.attn2 is not None:
            x = self._cross_attention(x, encoder_hidden_states, text, encoder_attention_mask)
        return self._feed_forward(x, terms)

    @property
    def _is_modulated(self) -> bool:
        return self.norm_type == "ada_norm_single"

    def _is_fusible(self) -> bool:
        text_norm = is_unwrapped(self.norm2, nn.LayerNorm)
        return (
            self.norm_type in ("layer_norm", "ada_norm_single")
            and not self.only_cross_attention
            and self.pos_embed is None
            and self._chunk_size is None
            and is_unwrapped(self.norm1, nn.LayerNorm)
            and is_plain_attention(self.attn1)
            and (self.attn2 is None or ((text_norm or self._is_modulated) and is_plain_attention(self.attn2)))
        )

    def _terms(self, x: Tensor, timestep: Any) -> tuple[Tensor | None, ...]:
        """Shift, scale and gate of the attention and of the feed-forward, (B, 1, C) each; None where there are none."""
        if not self._is_modulated:
            return (None,) * 6
        return (self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)

    def _self_attention(self, x: Tensor, mask: Tensor | None, terms: tuple[Tensor | None, ...]) -> Tensor:
        attention, norm = self.attn1, self.norm1
        shift, scale, gate = terms[:3]
        layers = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = self._shared["attn1.qkv"](
            layers,
            x.dtype,
            lambda layer: quantized_layer_norm(norm, x, layer, scale, shift),
            lambda: _modulated(norm(x), scale, shift),
        )
        return attend(attention, query, key, value, mask, None, x, gate)

    # -- the text ------------------------------------------------------------------------------------

    @property
    def text_widths(self) -> tuple[int, int]:
        """Columns of the keys and of the values of the text."""
        return self.attn2.to_k.out_features, self.attn2.to_v.out_features

    def project_text(self, context: Tensor) -> tuple[Tensor, ...]:
        """Keys and values of a text (B, T, C), (B, T, columns) each."""
        layers = (self.attn2.to_k, self.attn2.to_v)
        return self._shared["attn2.kv"](layers, context.dtype, lambda layer: layer.quantize(context), lambda: context)

    def _tabulated(self, context: Tensor | None) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """The text itself, and its keys and values where they come with it."""
        columns = self.text_columns
        if columns is None or context is None or context.shape[-1] != columns.row:
            return context, None
        text = context[..., : columns.text]
        if not projects_text_alone(self):
            return text.contiguous(), None
        return text, (context[..., columns.start : columns.middle], context[..., columns.middle : columns.stop])

    # -- parts of the block --------------------------------------------------------------------------

    def _cross_attention(
        self, x: Tensor, context: Tensor, text: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> Tensor:
        attention, norm = self.attn2, self.norm2
        (query,) = self._shared["attn2.q"](
            (attention.to_q,),
            x.dtype,
            lambda layer: layer.quantize(x) if self._is_modulated else quantized_layer_norm(norm, x, layer),
            lambda: x if self._is_modulated else norm(x),
        )
        key, value = self.project_text(context) if text is None else text
        return attend(attention, query, key, value, mask, context, x, None)

    def _feed_forward(self, x: Tensor, terms: tuple[Tensor | None, ...]) -> Tensor:
        norm, ff = self.norm2 if self._is_modulated else self.norm3, self.ff
        shift, scale, gate = terms[3:]
        if not (is_unwrapped(norm, nn.LayerNorm) and feed_forward.is_plain(ff)):
            out = ff(_modulated(norm(x), scale, shift))
            return (out if gate is None else gate * out) + x
        return feed_forward.run(
            ff,
            x,
            lambda layer: quantized_layer_norm(norm, x, layer, scale, shift),
            lambda: _modulated(norm(x), scale, shift),
            x,
            gate,
        )


def _whole(text: Tensor | None, is_part: bool) -> Tensor | None:
    """A text as diffusers' own forward gets it: a copy where it is a part of what came in its place."""
    return text.contiguous() if is_part and text is not None else text


def projects_text_alone(block: Any) -> bool:
    """Whether a block's keys and values of the text depend on the text alone: nothing is on the layers."""
    layers = (block.attn2.to_k, block.attn2.to_v)
    return all(
        is_unwrapped_linear(layer) and not (isinstance(layer, QuantLinear) and layer.scheme.has_timestep_scales)
        for layer in layers
    )


def _modulated(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return x if scale is None or shift is None else x * (1 + scale) + shift
