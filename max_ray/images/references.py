"""From an image's URL in a message to the bytes of its file.

`data:` URLs (RFC 2397, base64) carry the file. `file:` URLs name one below a folder that the operator allows. The
server fetches nothing: a URL that it fetched could point into the operator's own network.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from max_ray.errors import InputError
from max_ray.images.limits import ImageLimits

_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp)(;[\w.=+-]+)*;base64,", re.IGNORECASE)
_HEAD_CHARACTERS = 256


def read_image(url: str, limits: ImageLimits) -> bytes:
    """The bytes of the image that `url` names. Blocking. Raises InputError that says what to send instead."""
    scheme = url[:_HEAD_CHARACTERS].partition(":")[0].lower()
    if scheme == "data":
        return _of_data_url(url, limits)
    if scheme == "file":
        return _of_file_url(url, limits)
    if scheme in ("http", "https"):
        raise _wrong("This server does not fetch images from the network: send the image itself as a data: URL")
    raise _wrong(f"An image is given as a data: URL ('data:image/png;base64,...'), not as {url[:40]!r}")


def _of_data_url(url: str, limits: ImageLimits) -> bytes:
    head = _DATA_URL.match(url[:_HEAD_CHARACTERS])
    if head is None:
        raise _wrong("A data: URL of an image begins with data:image/png;base64, (or jpeg, or webp)")
    if (len(url) - head.end()) * 3 // 4 > limits.max_bytes + 2:  # the padding counts as well
        raise _too_many_bytes(limits)
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise _wrong(f"The data: URL of an image is not valid base64 ({error})") from None
    return _checked(data, limits)


def _of_file_url(url: str, limits: ImageLimits) -> bytes:
    """Reads below the allowed folder only. What lies outside gets the same answer whether it exists or not."""
    if limits.allowed_root is None:
        raise _wrong("This server reads no files for its clients (--allowed-image-root): send a data: URL")
    path = _path_of(url)
    root = Path(os.path.realpath(limits.allowed_root))
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise _wrong(f"{str(path)!r} is not in the folder from which this server reads images")
    try:
        return _checked(_read_regular(real, limits.max_bytes + 1), limits)
    except OSError as error:
        raise _wrong(f"The image {str(path)!r} cannot be read: {error.strerror}") from None


def _path_of(url: str) -> Path:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _wrong(f"{url[:40]!r} is not a valid URL ({error})") from None
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path or parts.query:
        raise _wrong("A file: URL of an image is file:// and an absolute path")
    return Path(path)


def _read_regular(path: Path, max_bytes: int) -> bytes:
    """At most `max_bytes` of a regular file. The path was free of links when it was looked at; one that has appeared at
    its end since is not followed. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is not a regular file")
        return file.read(max_bytes)


def _checked(data: bytes, limits: ImageLimits) -> bytes:
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(limits)
    if not data:
        raise _wrong("An image is empty")
    return data


def _too_many_bytes(limits: ImageLimits) -> InputError:
    return _wrong(f"An image has more than {limits.max_bytes} bytes (--max-image-bytes): send a smaller file")


def _wrong(sentence: str) -> InputError:
    return InputError(f"{sentence}.", param="messages")
