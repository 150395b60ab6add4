"""The picture of float and quantized pictures side by side."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from ldmq_kernels.report.measure import PicturePairs
from ldmq_kernels.report.side_by_side import GAP, LABEL, PICTURE, side_by_side

WIDE_PROMPT = "a prompt that is longer than its column is wide, and goes on over several lines of text, and on"


def test_every_pair_is_in_its_column_float_above_quantized() -> None:
    before = torch.zeros(3, 3, 32, 32)
    before[0, 0], before[1, 1], before[2, 2] = 1.0, 1.0, 1.0
    pairs = PicturePairs(["red", "green", WIDE_PROMPT], [0, 1, 2], before, before * 0.5)
    sheet = np.asarray(Image.open(io.BytesIO(side_by_side(pairs))))
    for column in range(3):
        x = LABEL + column * (PICTURE + GAP) + PICTURE // 2
        for row, value in ((0, 255), (1, 128)):
            pixel = sheet[row * (PICTURE + GAP) + PICTURE // 2, x]
            assert pixel.tolist() == [value if channel == column else 0 for channel in range(3)]


def test_the_difference_is_below_as_many_times_as_asked_for() -> None:
    before = torch.full((1, 3, 32, 32), 0.5)
    after = before.clone()
    after[:, 0] += 0.02
    sheet = np.asarray(Image.open(io.BytesIO(side_by_side(PicturePairs(["red"], [0], before, after), 10))))
    pixel = sheet[2 * (PICTURE + GAP) + PICTURE // 2, LABEL + PICTURE // 2]
    assert pixel.tolist() == [178, 128, 128]


def test_pictures_that_are_not_square_keep_their_shape() -> None:
    pictures = torch.rand(1, 3, 32, 64)
    sheet = Image.open(io.BytesIO(side_by_side(PicturePairs(["wide"], [0], pictures, pictures))))
    assert sheet.width == LABEL + PICTURE + GAP
    assert sheet.height < 2 * PICTURE + 2 * GAP
