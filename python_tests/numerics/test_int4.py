"""Every int4 value survives packing, at every place of a byte."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldmq_kernels.numerics.formats.int4 import pack_int4, unpack_int4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=2), st.integers(1, 70), st.integers(0, 2**31))
def test_unpacking_gives_back_what_was_packed(leading, length, seed):
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (*leading, length), dtype=torch.int8, generator=random)
    packed = pack_int4(values)
    assert packed.shape == (*leading, -(-length // 2))
    assert torch.equal(unpack_int4(packed, length), values)


def test_the_even_index_is_the_low_nibble():
    assert pack_int4(torch.tensor([1, -1], dtype=torch.int8)).tolist() == [0xF1]


def test_one_hot_values_decode_to_their_own_place():
    for place in range(7):
        values = torch.zeros(7, dtype=torch.int8)
        values[place] = -7
        assert unpack_int4(pack_int4(values), 7).tolist() == values.tolist()
