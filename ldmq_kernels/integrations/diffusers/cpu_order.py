"""Which float work of torch on a CPU gives every picture of a batch the bits of its own call, in one call for all.

torch cuts an elementwise call into a run of elements for each thread and a run into vectors; what is left at the end of
a run is computed by other functions, whose last bit may be another. Where every run is whole vectors, alone and in
the batch, no value depends on its place. A group norm adds within a sample, in an order that depends on other samples
only where it splits the pixels of all of them over the threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTOR = 64  # elements: two vectors of AVX-512 in 16 bits, the most that one step of a kernel takes
GRAIN = 32768  # elements, up to which a call is one thread's
SPLIT_PIXELS = 1024  # from so many on, a group norm of a channels_last map splits them over the threads


def has_whole_vectors(elements: int) -> bool:
    """Whether no thread's run of so many elements ends within a vector."""
    threads = max(1, min(torch.get_num_threads(), -(-elements // GRAIN)))
    return elements % VECTOR == 0 and -(-elements // threads) % VECTOR == 0


def is_elementwise_alike(x: Tensor, pictures: int) -> bool:
    """Whether an elementwise call on a batch gives each picture the bits of its own call.

    Args:
        x: (samples, ...), in which each of the pictures has equally many samples.
        pictures: of the batch.
    """
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return is_dense and has_whole_vectors(x.numel()) and has_whole_vectors(x.numel() // pictures)


def is_gated_alike(x: Tensor, pictures: int) -> bool:
    """`is_elementwise_alike` for a call whose gates are the second half of each row.

    Args:
        x: (samples, ..., 2 C), values and then gates.
        pictures: of the batch.
    """
    channels, gates = x.shape[-1] // 2, x.numel() // 2
    return (
        channels % VECTOR == 0
        and x.is_contiguous()
        and has_whole_vectors(gates)
        and has_whole_vectors(gates // pictures)
    )


def is_group_norm_alike(x: Tensor, pictures: int) -> bool:
    """`is_elementwise_alike` for a group norm, the SiLU after it and the bounds of each sample's channels.

    Args:
        x: (samples, channels, height, width).
        pictures: of the batch.
    """
    if x.dim() != 4 or not is_elementwise_alike(x, pictures):
        return False
    samples, channels, height, width = x.shape
    is_split = height * width >= SPLIT_PIXELS and torch.get_num_threads() > 1
    bounds = samples * channels
    return not is_split and has_whole_vectors(bounds) and has_whole_vectors(bounds // pictures)
