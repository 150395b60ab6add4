"""Attention in floating point, one node for torch.compile and export: C where a CPU has AMX, torch's elsewhere.

It has no specification, since it neither rounds nor takes integers, and torch's attention serves GPUs: there is nothing
to choose among backends, to measure or to switch off.
"""

from __future__ import annotations

from torch import Tensor

from ldmq_kernels.kernels.backend import backends
from ldmq_kernels.ops.spec import LDMQ, define_plain


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return backends()["cpu"].attention(query, key, value, mask)


def _metadata(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape)


define_plain("attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> Tensor", _attention, _metadata)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention: softmax(query key^T / sqrt(head_dim) + mask) value of each head.

    In bfloat16 on a CPU with AMX, scores and sums are float32 and each weight of a value is rounded to bfloat16 once,
    as in torch's own; the result of a sample does not depend on the others or on the number of threads. Elsewhere it
    is torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: (B, T, heads, head_dim) floating, of any strides.
        key: (B, S, heads, head_dim) of query's dtype.
        value: (B, S, heads, head_dim) of query's dtype.
        mask: what is added to the scores, floating, or bool, true where a query sees a key; it broadcasts to
            (B, heads, T, S).

    Returns:
        (B, T, heads, head_dim) of query's dtype, contiguous; zeros for a query that sees no key.
    """
    return LDMQ.attention.default(query, key, value, mask)
