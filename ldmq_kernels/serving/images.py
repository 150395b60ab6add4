"""Pictures in and out: uploads read within bounds, results in the asked format, and those that are kept for a URL."""

from __future__ import annotations

import io
import secrets
import threading
import time
from collections import OrderedDict
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from ldmq_kernels.serving.errors import ApiError

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


def read_picture(data: bytes, param: str, max_pixels: int) -> Image.Image:
    """An uploaded picture, whose size is looked at before it is decoded.

    Raises:
        ApiError: it is none, or too large.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > 16 * max_pixels:
            raise ApiError(400, f"{param} has {picture.width}x{picture.height} pixels, too many", param)
        picture.load()
    except UnidentifiedImageError:
        raise ApiError(400, f"{param} is no picture that can be read: send png, jpeg or webp", param) from None
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise ApiError(400, f"{param} is no picture that can be read: {error}", param) from None
    return picture


def mask_of(picture: Image.Image) -> Image.Image:
    """What is drawn anew in white: where the alpha channel is transparent, or the picture white if it has none."""
    if "A" in picture.getbands():
        return picture.getchannel("A").point(lambda alpha: 255 - alpha)
    return picture.convert("L")


def encoded(picture: Any, kind: str, compression: int) -> bytes:
    """A picture in one of FORMATS; `compression` 0..100 is the quality of jpeg and webp, as OpenAI names it."""
    out = io.BytesIO()
    options = {} if kind == "png" else {"quality": compression}
    picture.save(out, FORMATS[kind], **options)
    return out.getvalue()


class Pictures(Protocol):
    """Where pictures are kept for answers by URL; any thread may call it."""

    def add(self, data: bytes, kind: str) -> str:
        """Keep a picture, and give it a name that cannot be guessed."""

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A picture and its format, while it is kept."""


class Kept:
    """Pictures in this process' memory: at most so many bytes, each for so many seconds."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._files: OrderedDict[str, tuple[bytes, str, float]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, data: bytes, kind: str) -> str:
        """Keep a picture; its name cannot be guessed."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        with self._lock:
            self._files[name] = (data, kind, time.monotonic())
            self._bytes += len(data)
            while len(self._files) > 1 and self._bytes > self.max_bytes:
                self._drop(next(iter(self._files)))
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """A picture and its format, while it is kept."""
        with self._lock:
            for old, (_, _, since) in list(self._files.items()):
                if time.monotonic() - since <= self.seconds:
                    break
                self._drop(old)
            found = self._files.get(name)
        return None if found is None else found[:2]

    def _drop(self, name: str) -> None:
        self._bytes -= len(self._files.pop(name)[0])
