"""From URLs to pixels: data: and file: URLs, formats, and everything that is refused."""

from __future__ import annotations

import base64
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from max_ray.errors import InputError
from max_ray.images.decode import decode_image
from max_ray.images.limits import ImageLimits
from max_ray.images.references import read_image
from tests.architectures.vision import picture

LIMITS = ImageLimits()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/jpg", "IMAGE/WebP", "image/png;name=a.png"])
def test_data_urls(kind: str) -> None:
    assert read_image(data_url(b"some bytes", kind), LIMITS) == b"some bytes"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 99, 100])
def test_the_limit_of_bytes_is_exact(length: int) -> None:
    url = data_url(b"x" * length)
    assert len(read_image(url, ImageLimits(max_bytes=length))) == length
    if length > 1:
        with pytest.raises(InputError, match=f"more than {length - 1} bytes"):
            read_image(url, ImageLimits(max_bytes=length - 1))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://10.0.0.1/cat.png", "does not fetch"),
        ("HTTPS://example.com/cat.png", "does not fetch"),
        ("ftp://example.com/cat.png", "not as 'ftp"),
        ("cat.png", "not as 'cat.png'"),
        ("", "not as ''"),
        ("data:image/gif;base64,AAAA", "begins with data:image/png"),
        ("data:image/png,AAAA", "begins with data:image/png"),
        ("data:text/html;base64,AAAA", "begins with data:image/png"),
        ("data:image/png;base64,AAA", "not valid base64"),
        ("data:image/png;base64,AA A", "not valid base64"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "not valid base64"),
        ("data:image/png;base64,", "is empty"),
        ("file:///etc/passwd", "reads no files"),
    ],
)
def test_refused_urls(url: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_image(url, LIMITS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed folder, reached through a link, with a file in it and secrets outside."""
    real = tmp_path / "real"
    (real / "below").mkdir(parents=True)
    (real / "cat.png").write_bytes(b"cat")
    (real / "below" / "a dog.png").write_bytes(b"dog")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "real-too").mkdir()
    (tmp_path / "real-too" / "cat.png").write_bytes(b"secret")
    (tmp_path / "allowed").symlink_to(real)
    return tmp_path / "allowed"


def test_files_below_the_allowed_folder(root: Path) -> None:
    limits = ImageLimits(allowed_root=root)
    (root / "link.png").symlink_to(root / "cat.png")
    assert read_image(f"file://{root}/cat.png", limits) == b"cat"
    assert read_image(f"file://localhost{root}/below/a%20dog.png", limits) == b"dog"
    assert read_image(f"file://{root}/below/../cat.png", limits) == b"cat"
    assert read_image(f"file://{root}/link.png", limits) == b"cat"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.png",
        "below/../../secret.png",
        "below/%2e%2e/%2e%2e/secret.png",
        "../real-too/cat.png",  # a sibling whose name begins like the folder's
        "../missing.png",
        "out.png",
        "out/secret.png",
    ],
)
def test_nothing_outside_of_the_folder(root: Path, path: str) -> None:
    """The same answer whether the file exists or not."""
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "out").symlink_to(root.parent)
    with pytest.raises(InputError, match="is not in the folder"):
        read_image(f"file://{root.parent}/real/{path}", ImageLimits(allowed_root=root))


@pytest.mark.parametrize("name", ["missing.png", "below", "pipe", "loop"])
def test_what_is_no_file(root: Path, name: str) -> None:
    os.mkfifo(root / "pipe")  # must not block
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(InputError, match="cannot be read"):
        read_image(f"file://{root}/{name}", ImageLimits(allowed_root=root))


@pytest.mark.parametrize("url", ["file:cat.png", "file://host/cat.png", "file:///a%00b", "file://[::1", "file:///a?b"])
def test_malformed_file_urls(root: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"file:// and an absolute path|not a valid URL"):
        read_image(url, ImageLimits(allowed_root=root))


def test_a_file_has_the_same_limit_of_bytes(root: Path) -> None:
    assert read_image(f"file://{root}/cat.png", ImageLimits(allowed_root=root, max_bytes=3)) == b"cat"
    with pytest.raises(InputError, match="more than 2 bytes"):
        read_image(f"file://{root}/cat.png", ImageLimits(allowed_root=root, max_bytes=2))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats(kind: str) -> None:
    data = encoded(picture(20, 10), kind)
    assert np.array_equal(np.array(decode_image(data, LIMITS)), np.array(Image.open(BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (4, 6), 1 if mode in ("1", "L", "P", "I;16") else None)
    decoded = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), LIMITS)
    assert (decoded.mode, decoded.size) == ("RGB", (4, 6))


def test_the_orientation_of_a_photograph() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_image(encoded(picture(20, 10), "JPEG", exif=exif), LIMITS).size == (10, 20)


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, LIMITS).getpixel((0, 0)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large and holds next to nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    data = b"IDAT" + zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8193, 10_000, 20_000, 2**31 - 1])
def test_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(InputError, match="pixels: at most"):
        decode_image(png_header(side, side), LIMITS)


def test_the_limit_of_pixels_is_exact() -> None:
    data = encoded(picture(20, 10))
    assert decode_image(data, ImageLimits(max_pixels=200)).size == (20, 10)
    with pytest.raises(InputError, match="20 x 10 pixels"):
        decode_image(data, ImageLimits(max_pixels=199))


@pytest.mark.parametrize(
    "data",
    [
        b"not an image",
        png_header(100, 100),
        encoded(picture(64, 64))[:2000],
        encoded(picture(64, 64), "JPEG")[:300],
        encoded(picture(64, 64), "WEBP")[:300],
        encoded(picture(8, 8), "GIF"),
        encoded(picture(8, 8), "TIFF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    ],
    ids=["text", "short", "png", "jpeg", "webp", "gif", "tiff", "eps"],
)
def test_what_cannot_be_decoded(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^An image (cannot be decoded .*|is no PNG, JPEG or WebP file\.)") as caught:
        decode_image(data, LIMITS)
    assert "object at 0x" not in str(caught.value)


def test_random_damage_is_never_more_than_a_refusal() -> None:
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = np.frombuffer(encoded(picture(32, 32), kind), dtype=np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(0, len(whole), 6)
            damaged[places] = generator.integers(0, 256, 6)
            try:
                assert decode_image(damaged.tobytes(), LIMITS).mode == "RGB"
            except InputError:
                continue
