"""ImageLimits: what a request may ask of the server in images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageLimits:
    """max_images: of one request. max_bytes: of one image's file. max_pixels: of one image before it is resized; its
    decoded form takes three to four bytes a pixel. allowed_root: the folder below which `file:` URLs may point; None
    refuses them all."""

    max_images: int = 16
    max_bytes: int = 16 * 2**20
    max_pixels: int = 2**26
    allowed_root: Path | None = None
