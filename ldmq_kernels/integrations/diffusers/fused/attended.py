"""What attends in a fused block: the package's attention on a CPU in bfloat16, elsewhere torch's or the user's own.

A function that stands in the place of `torch.nn.functional.scaled_dot_product_attention`, and a backend of attention
that was set in diffusers, are called as diffusers calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from ldmq_kernels import ops


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as diffusers' processors compute it by torch's function.

    Args:
        query: (B, T, heads, head_dim); key and value: (B, S, heads, head_dim).
        mask: broadcasts to (B, heads, T, S), or None.

    Returns:
        (B, T, heads, head_dim).
    """
    if _is_ours(query, key, value, mask):
        return ops.attention(query, key, value, mask)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def dispatched(query: Tensor, key: Tensor, value: Tensor, backend: Any, parallel_config: Any) -> Tensor:
    """Attention as diffusers' processors compute it by the backend that is set: for one of them, or for all.

    Args:
        query: (B, T, heads, head_dim); key and value: (B, S, heads, head_dim).
        backend: of the processor, or None.
        parallel_config: of the processor, or None.

    Returns:
        (B, T, heads, head_dim).
    """
    asked = backend or _AttentionBackendRegistry.get_active_backend()[0]
    if asked == AttentionBackendName.NATIVE and parallel_config is None and _is_ours(query, key, value, None):
        return ops.attention(query, key, value)
    return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel_config)


def _is_ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    given = (query, key, value, mask)
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and nn.functional.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given))
    )
