"""From the bytes of an image file to RGB pixels, within limits: PNG, JPEG and WebP."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from max_ray.errors import InputError
from max_ray.images.limits import ImageLimits

_FORMATS = ("PNG", "JPEG", "WEBP")
_MALFORMED = (  # what Pillow raises for damaged files, by format
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, MemoryError),
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The first frame as RGB, turned as its EXIF orientation says. Blocking.

    Width and height are taken from the header and checked before a pixel is decoded. Raises InputError.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= limits.max_pixels:
                turned = ImageOps.exif_transpose(image)
                return turned if turned.mode == "RGB" else turned.convert("RGB")
    except _BOMBS:
        raise _too_many_pixels("too many", limits) from None
    except UnidentifiedImageError:
        raise InputError("An image is no PNG, JPEG or WebP file.", param="messages") from None
    except _MALFORMED as error:
        raise InputError(
            f"An image cannot be decoded ({error}): send a PNG, JPEG or WebP file.", param="messages"
        ) from None
    raise _too_many_pixels(f"{width} x {height}", limits)


def _too_many_pixels(size: str, limits: ImageLimits) -> InputError:
    return InputError(
        f"An image has {size} pixels: at most {limits.max_pixels} are allowed (--max-image-pixels), "
        f"send a smaller one.",
        param="messages",
    )
