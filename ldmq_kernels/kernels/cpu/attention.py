"""softmax(query key^T / sqrt(head_dim) + mask) value by `attention.c`, where the processor has AMX, or else by torch.

Without AMX bfloat16 goes to torch as float32, which takes it less time there. Scores are no int8: where AMX is, their
products are a small part beside the weights that are made of them, and int8 rounds them far more than bfloat16.

Which of the two serves a call depends on the processor, the dtypes and the sizes of one head, and on nothing that a
batch or the number of threads changes: a picture has the same bits alone and in a batch. The sizes are those at which
`python -m benchmarks attention` finds C the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmq_kernels.kernels.cpu import compiled

SIDE = 32  # keys or channels that cost as much as one
LARGEST_HEAD = 256  # channels that attention.c has room for
FEWEST_QUERIES = 192  # fewer do not make up for laying out the keys and values anew
FEWEST_KEYS = 32  # fewer are one step of tiles that is half empty
GRAIN = 1 << 19  # products of a call for one thread


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, T, heads, head_dim) to (B, S, heads, head_dim); (B, T, heads, head_dim), contiguous."""
    if is_compiled(query, key, value, mask):
        return _by_tiles(query, key, value, mask)
    dtype = query.dtype
    if dtype == torch.bfloat16 and not compiled.has_tiles() and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.ops.aten.scaled_dot_product_attention(query, key, value, mask)
    return out.transpose(1, 2).to(dtype).contiguous()


def is_compiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention.c` serves a call: no other operands are right for it, or it is the slower one."""
    operands = (query, key, value)
    if not compiled.has_tiles() or any(x.dtype != torch.bfloat16 or x.device.type != "cpu" for x in operands):
        return False
    batch, tokens, heads, channels = query.shape
    return (
        tokens >= FEWEST_QUERIES
        and key.shape[1] >= FEWEST_KEYS
        and channels % 2 == 0
        and 0 < channels <= LARGEST_HEAD
        and key.shape == value.shape == (batch, key.shape[1], heads, channels)
        and batch * heads > 0
        and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*operands, mask)))
        and _has_library()
    )


def _has_library() -> bool:
    library, _ = compiled.load()
    return library is not None and hasattr(library, "ldmq_attention")


def _by_tiles(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    library, _ = compiled.load()
    assert library is not None
    batch, tokens, heads, channels = query.shape
    keys = key.shape[1]
    operands = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    places = (size for x in operands for size in (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)))
    added = None if mask is None else _added(mask).expand(batch, heads, tokens, keys)
    if added is not None and added.stride(-1) != 1:
        added = added.contiguous()
    mask_places = (None, 0, 0, 0) if added is None else (added.data_ptr(), *added.stride()[:3])
    packed = query.new_empty(library.ldmq_attention_room(batch, heads, keys, channels))
    out = query.new_empty(batch, tokens, heads, channels)
    work = batch * heads * tokens * (keys + SIDE) * (channels + SIDE)
    threads = max(1, min(torch.get_num_threads(), work // GRAIN))
    library.ldmq_attention(
        *places,
        *(batch, heads, tokens, keys, channels),
        *mask_places,
        *(channels**-0.5, packed.data_ptr(), out.data_ptr(), threads),
    )
    return out


def _added(mask: Tensor) -> Tensor:
    """A mask as what is added to the scores, float32."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
    return mask.float()
