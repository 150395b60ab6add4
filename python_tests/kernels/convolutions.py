"""The convolutions that every conv2d op is tested on."""

from __future__ import annotations

from hypothesis import strategies as st

# name: (input (N, C, H, W), output channels, (kernel, stride, padding, dilation, groups, upsample))
CASES = {
    "3x3": ((2, 20, 7, 5), 33, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "conv_in": ((1, 4, 6, 9), 320, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "conv_out": ((1, 320, 5, 4), 4, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "wide": ((1, 960, 2, 3), 8, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "shortcut": ((3, 70, 3, 4), 40, ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)),
    "downsample": ((2, 20, 9, 8), 12, ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, 1)),
    "asymmetric": ((2, 24, 7, 11), 9, ((3, 2), (2, 1), (0, 0, 2, 2), (1, 3), 1, 1)),
    "dilated": ((1, 5, 9, 9), 6, ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1, 1)),
    "grouped": ((2, 140, 4, 3), 6, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, 1)),
    "depthwise": ((2, 8, 5, 6), 16, ((3, 3), (1, 2), (1, 1, 1, 1), (1, 1), 8, 1)),
    "one pixel": ((2, 20, 1, 1), 7, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "mostly padding": ((1, 4, 2, 1), 3, ((5, 5), (3, 3), (4, 4, 4, 4), (1, 1), 1, 1)),
    "padded at the far sides": ((2, 20, 8, 6), 12, ((3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1, 1)),
    "upsampled": ((2, 20, 5, 4), 33, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 2)),
    "many rows": ((2, 4, 31, 33), 3, ((1, 3), (1, 1), (0, 0, 1, 1), (1, 1), 1, 1)),
    # channels that are multiples of 32 are read by TMA tiles
    "tma tiles": ((2, 96, 7, 5), 33, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "tma tiles of 8x8": ((3, 320, 8, 8), 20, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "wide tma tiles": ((1, 32, 17, 63), 5, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "tma tiles downsample": ((2, 96, 8, 14), 12, ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, 1)),
    "tma tiles padded at the far sides": ((2, 96, 6, 10), 12, ((3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1, 1)),
    "tma tiles strided 1x1": ((2, 64, 6, 4), 12, ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1, 1)),
    "tma tiles upsampled": ((2, 96, 5, 4), 33, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 2)),
    "tma tiles upsampled, odd output": ((1, 32, 5, 4), 9, ((3, 3), (1, 1), (0, 1, 2, 0), (1, 1), 1, 2)),
    "tma tiles dilated": ((1, 32, 9, 9), 6, ((3, 2), (1, 1), (2, 1, 0, 2), (2, 3), 1, 1)),
    "tma tiles 1x1": ((2, 64, 5, 3), 70, ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 1)),
    # output channels that are multiples of 8 are stored whole
    "whole": ((2, 48, 7, 5), 40, ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 1)),
    "whole, upsampled": ((1, 32, 5, 4), 24, ((3, 3), (1, 1), (0, 1, 2, 0), (1, 1), 1, 2)),
}

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
ANY = st.fixed_dictionaries(
    {
        "samples": st.integers(0, 3),
        "group_channels": st.sampled_from([1, 3, 66, 32]),
        "group_out_channels": st.sampled_from([1, 17]),
        "groups": st.integers(1, 2),
        "size": st.tuples(st.integers(5, 9), st.integers(5, 9)),
        "kernel_size": PAIRS,
        "stride": PAIRS,
        "padding": st.tuples(*[st.integers(0, 2)] * 4),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "upsample": st.integers(1, 2),
    }
)


def sizes(drawn: dict) -> tuple[tuple[int, ...], int, tuple]:
    """A draw of ANY as a value of CASES."""
    groups = drawn["groups"]
    geometry = tuple(drawn[name] for name in ("kernel_size", "stride", "padding", "dilation"))
    shape = drawn["samples"], drawn["group_channels"] * groups, *drawn["size"]
    return shape, drawn["group_out_channels"] * groups, (*geometry, groups, drawn["upsample"])


def weight_shape(shape: tuple[int, ...], out_channels: int, geometry: tuple) -> tuple[int, ...]:
    """(K, R, S, C / groups)."""
    return (out_channels, *geometry[0], shape[1] // geometry[4])


def as_op(stride: tuple, padding: tuple[int, int], dilation: tuple, groups: int) -> tuple:
    """torch's geometry as the ops take it after the kernel's size: padding of four sides, no enlargement."""
    top, left = padding
    return stride, (top, top, left, left), dilation, groups, 1
