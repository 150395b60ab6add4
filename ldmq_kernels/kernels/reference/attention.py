"""out = softmax(query key^T / sqrt(head_dim) + mask) value of each head, in float32 up to the last rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, T, heads, head_dim) to (B, S, heads, head_dim); a query whose keys are all masked gets zeros."""
    query_32, key_32, value_32 = (x.float().transpose(1, 2) for x in (query, key, value))
    scores = query_32 @ key_32.mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    return (weights @ value_32).to(query.dtype).transpose(1, 2).contiguous()
