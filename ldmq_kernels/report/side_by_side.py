"""One PNG of float and quantized pictures, a column for each prompt: for a README, or to send to somebody."""

from __future__ import annotations

import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldmq_kernels.report.measure import PicturePairs

PICTURE = 160  # pixels of a picture's width
GAP, LABEL, CAPTION = 8, 84, 60  # pixels between pictures, left of them, and below them
INK, PAPER = (32, 36, 40), (255, 255, 255)
FONT_SIZE = 12


def side_by_side(pairs: PicturePairs, amplified: int = 0) -> bytes:
    """A PNG whose first row holds the float pictures and whose second the quantized ones of the same noise.

    With `amplified`, a third row holds their difference that many times, around mid-grey.

    Below each column stand its prompt and the PSNR of the quantized picture against the float one, in dB.

    Args:
        pairs: the pictures, all of which are shown.
        amplified: how many times the difference is shown; 0 shows none.
    """
    height = round(PICTURE * pairs.before.shape[2] / pairs.before.shape[3])
    rows = [("float", pairs.before), ("quantized", pairs.after)]
    if amplified:
        rows.append((f"difference,\n{amplified} times", 0.5 + amplified * (pairs.after - pairs.before)))
    below = len(rows) * (height + GAP)
    size = LABEL + len(pairs.prompts) * (PICTURE + GAP), below + CAPTION
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for row, (label, pictures) in enumerate(rows):
        top = row * (height + GAP)
        draw.text((GAP, top + height // 2 - FONT_SIZE), label, INK, font)
        for column, picture in enumerate(pictures):
            sheet.paste(_image(picture, height), (LABEL + column * (PICTURE + GAP), top))
    for column, (prompt, psnr) in enumerate(zip(pairs.prompts, pairs.psnr_db, strict=True)):
        text = "\n".join([*textwrap.wrap(prompt, PICTURE // 7)[:3], f"PSNR {psnr:.1f} dB"])
        draw.multiline_text((LABEL + column * (PICTURE + GAP), below), text, INK, font, spacing=1)
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _image(picture: Tensor, height: int) -> Image.Image:
    """A picture (3, H, W) in [0, 1], enlarged without smoothing where it is smaller than its place."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    enlarged = picture.shape[2] < PICTURE
    how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((PICTURE, height), how)
