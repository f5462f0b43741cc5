"""The files of the page, read once, with what HTTP says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "files"
INDEX = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    """One file.

    Args:
        content: Its bytes.
        media_type: For the header Content-Type.
        etag: Changes with the content, quotes included.
    """

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> Mapping[str, Asset]:
    """The files by name."""
    return {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}


def _read(path: Path) -> Asset:
    content = path.read_bytes()
    return Asset(content, _MEDIA_TYPES[path.suffix], f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"')
