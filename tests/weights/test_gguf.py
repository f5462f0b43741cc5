"""GGUF files: every readable type against the `gguf` package, slices, and each way for a file to be wrong."""

from __future__ import annotations

import os
import pickle
import struct
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from max_ray.errors import MaxRayError, ModelPathError, ParallelismError, WeightsError
from max_ray.gguf import huggingface_values, read_gguf
from max_ray.gguf.strings import StringArray
from max_ray.kernels import native
from max_ray.nn.quantized_linear import pack, pack_codes
from max_ray.weights import open_weights
from max_ray.weights.parameter import StoredPart
from max_ray.weights.quantize import quantize
from tests.gguf_files import write

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
OTHER_TYPES = ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
"""Kept in another encoding. As random blocks: the `gguf` package cannot write all of them."""
SCALES_AT = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}
ROWS, COLUMNS = 24, 512


def random_blocks(kind: str) -> torch.Tensor:
    """uint8 [ROWS, bytes a row], with scales between 0.01 and 0.02."""
    size, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = torch.randint(0, 256, (ROWS, COLUMNS // size, nbytes), dtype=torch.uint8)
    if kind == "MXFP4":  # a power of two in a byte
        blocks[..., 0] = torch.randint(118, 124, (ROWS, COLUMNS // size), dtype=torch.uint8)
        return blocks.flatten(1)
    for at in SCALES_AT.get(kind, (0,)):
        scales = (torch.rand(ROWS, COLUMNS // size, 1) * 0.01 + 0.01).half()
        blocks[..., at : at + 2] = scales.view(torch.uint8)
    return blocks.flatten(1)


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tensors = {kind: (kind, torch.randn(ROWS, COLUMNS)) for kind in TYPES}
    tensors |= {kind: (kind, random_blocks(kind)) for kind in OTHER_TYPES}
    return write(tmp_path_factory.mktemp("gguf") / "types.gguf", tensors)


@pytest.mark.parametrize("kind", TYPES + OTHER_TYPES)
def test_tensors_equal_the_gguf_package(every_type: Path, kind: str) -> None:
    stored = next(t for t in gguf.GGUFReader(every_type).tensors if t.name == kind)
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32))
    source = open_weights(every_type)
    assert source.shape(kind) == (ROWS, COLUMNS)
    assert source.tensor_bytes(kind) == stored.n_bytes
    if kind in OTHER_TYPES:
        torch.testing.assert_close(source.get(kind), expected, atol=1e-6, rtol=1e-6)
        expected = source.get(kind)
    assert torch.equal(source.get(kind).float(), expected)
    assert torch.equal(source.get_slice(kind, 0, 5, 17).float(), expected[5:17])
    assert torch.equal(source.get_slice(kind, 1, 100, 300).float(), expected[:, 100:300])


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_types_without_a_kernel_are_kept_in_an_encoding_that_has_one(every_type: Path, kind: str) -> None:
    source, exact = open_weights(every_type, keep_quantized=True), open_weights(every_type).get(kind)
    rows = source.get_quantized(kind, range(ROWS), range(COLUMNS))
    assert source.quantization(kind) == rows.kind == ("q6_k" if kind == "Q3_K" else "q8_0")
    assert rows.scales.dtype in (torch.float16, torch.int8)
    step = exact.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / 127
    most = {"Q5_0": 0.0, "MXFP4": 0.0, "IQ4_NL": 0.0, "Q3_K": 0.0, "IQ4_XS": 0.07}.get(kind, 0.57)  # of a step of q8_0
    assert ((rows.dequantize() - exact).abs() <= most * step + 1e-7).all()
    part = StoredPart(source, kind, range(3, 20), range(256, 512), rows.kind)
    matrix, _ = pack([part], 0, torch.device("cpu"))
    torch.testing.assert_close(matrix.dequantize(slice(0, 2))[:17], rows.dequantize()[3:20, 256:])


def test_quantized_tensors_are_offered_as_codes_only_when_wanted(every_type: Path) -> None:
    kept, plain = open_weights(every_type, keep_quantized=True), open_weights(every_type)
    assert [kept.quantization(kind) for kind in TYPES] == ["", "", "", "q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k"]
    assert [plain.quantization(kind) for kind in TYPES] == [""] * len(TYPES)
    rows = kept.get_quantized("Q4_K", range(3, 9), range(256, 512))
    assert torch.equal(rows.dequantize(), plain.get("Q4_K")[3:9, 256:512])
    with pytest.raises(ParallelismError, match=r"2 blocks of 256 columns.*divides 2"):
        kept.get_quantized("Q4_K", range(1), range(128))


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("kind", TYPES[3:] + OTHER_TYPES)
@pytest.mark.parametrize(("rows", "columns", "padding"), [(range(24), range(512), 0), (range(3, 20), range(256), 9)])
def test_blocks_go_to_the_same_tiles_as_their_codes(
    every_type: Path, kind: str, rows: range, columns: range, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("max_ray.nn.quantized_linear._BLOCK_BYTES", 9000)  # a chunk is a tile
    monkeypatch.setattr("max_ray.nn.quantized_linear._thread", threading.local())
    source = open_weights(every_type, keep_quantized=True)
    part = StoredPart(source, kind, rows, columns, source.quantization(kind))
    assert_same_tiles(part, padding)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("rows", [range(120), range(24, 96), range(5, 77), range(48, 48)])
@pytest.mark.parametrize("buffer", [4000, 1 << 20])
def test_heads_are_put_in_order_while_blocks_are_read(
    rows: range, buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five heads of 24 rows, in chunks of 48 or all at once; a buffer too small for a chunk; ranks that cut a head."""
    torch.manual_seed(0)
    monkeypatch.setattr("max_ray.nn.quantized_linear._BLOCK_BYTES", buffer)
    monkeypatch.setattr("max_ray.nn.quantized_linear._thread", threading.local())
    keys = {"llama__attention__head_count": 5, "llama__attention__head_count_kv": 5}
    for columns in (32, 512):
        blocks = torch.cat([random_blocks("Q4_1") for _ in range(5)])[:, : columns // 32 * 20].contiguous()
        path = write(tmp_path / f"{columns}.gguf", {"blk.0.attn_q.weight": ("Q4_1", blocks)}, **keys)
        source = open_weights(path, keep_quantized=True)
        assert_same_tiles(StoredPart(source, "blk.0.attn_q.weight", rows, range(columns), "q4_1"), padding=3)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
def test_a_file_that_shrinks_or_goes_while_it_is_read(every_type: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(every_type.read_bytes())
    source = open_weights(path, keep_quantized=True)
    part = StoredPart(source, "Q6_K", range(ROWS), range(COLUMNS), "q6_k")
    with path.open("r+b") as file:
        file.truncate(source._tensor("Q6_K").offset + 100)  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match=r"m.gguf is truncated or corrupt: it has become shorter"):
        pack([part], 0, torch.device("cpu"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.gguf"):
        pack([part], 0, torch.device("cpu"))


def assert_same_tiles(part: StoredPart, padding: int = 0) -> None:
    """The C++ tiles of a part are those of torch, its definition, to the bit."""
    fast, order = pack([part], padding, torch.device("cpu"))
    slow, _ = pack_codes([part], padding, torch.device("cpu"))
    assert order is None
    assert type(fast) is type(slow)
    for name, value in vars(slow).items():
        got = getattr(fast, name)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name


def border_blocks(kind: str, rows: int) -> torch.Tensor:
    """uint8 [rows, bytes a row] of COLUMNS: random bytes; scales of every size that a float16 has, 0 and subnormal ones
    included; rows of the smallest and the largest codes."""
    generator = torch.Generator().manual_seed(rows)
    size, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    shape = (rows, COLUMNS // size)
    blocks = torch.randint(0, 256, (*shape, nbytes), dtype=torch.uint8, generator=generator)
    blocks[0], blocks[1] = 0, 255
    if kind == "MXFP4":  # up to 2^15, the largest power of two of a float16
        blocks[..., 0] = torch.randint(0, 144, shape, dtype=torch.uint8, generator=generator)
        blocks[2:5, :, 0] = torch.tensor([0, 1, 143], dtype=torch.uint8).unsqueeze(1)
        return blocks.flatten(1)
    top = 0x7C00 if kind != "IQ4_XS" else 0x6400  # its scale is taken 32 times
    for at in SCALES_AT.get(kind, (208,) if kind == "Q6_K" else (0, 2) if kind in ("Q4_K", "Q5_K") else (0,)):
        bits = torch.randint(0, top, (*shape, 1), generator=generator)
        bits[2:4] = torch.tensor([[[0]], [[1]]])
        signs = torch.randint(0, 2, (*shape, 1), generator=generator) << 15
        blocks[..., at : at + 2] = (bits | signs).to(torch.int16).view(torch.uint8)
    return blocks.flatten(1)


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("kind", TYPES[3:] + OTHER_TYPES)
@pytest.mark.parametrize("rows", [16, 37, 300])
def test_every_byte_goes_to_the_same_tiles(kind: str, rows: int, tmp_path: Path) -> None:
    path = write(tmp_path / "borders.gguf", {"w": (kind, border_blocks(kind, rows))})
    source = open_weights(path, keep_quantized=True)
    assert_same_tiles(StoredPart(source, "w", range(rows), range(COLUMNS), source.quantization("w")))


@pytest.mark.skipif(native.library() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "IQ4_XS", "MXFP4"])
def test_scales_that_become_no_numbers_are_refused(kind: str, tmp_path: Path) -> None:
    """Those that are made while the blocks are tiled: of rounded numbers, and as products."""
    blocks = border_blocks(kind, 16)
    at = SCALES_AT.get(kind, (0,))[-1]
    blocks[7, at : at + 2] = torch.tensor([0xFF, 0x7B] if kind == "IQ4_XS" else [254, 0x7C], dtype=torch.uint8)
    source = open_weights(write(tmp_path / "nan.gguf", {"w": (kind, blocks)}), keep_quantized=True)
    part = StoredPart(source, "w", range(16), range(COLUMNS), source.quantization("w"))
    for packing in (pack, pack_codes):
        with pytest.raises(WeightsError, match="no finite numbers"):
            packing([part], 0, torch.device("cpu"))


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "nan.gguf", {"w": ("Q8_0", torch.ones(2, 32))})
    source = open_weights(path, keep_quantized=True)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, source._tensor("w").offset + 34, 0x7E00)  # type: ignore[attr-defined]
    path.write_bytes(data)
    part = StoredPart(source, "w", range(2), range(32), "q8_0")
    for packing in (pack, pack_codes):
        with pytest.raises(WeightsError, match="no finite numbers"):
            packing([part], 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("encoding", "most"),
    [("q4_k", 0.085), ("q4_0", 0.09), ("q4_1", 0.08), ("q5_k", 0.043), ("q6_k", 0.02), ("q8_0", 0.006)],
)
def test_quantizing_is_close(encoding: str, most: float) -> None:
    values = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    values[0] = 0
    error = (quantize(encoding, values).dequantize() - values).norm() / values.norm()
    assert 0 < error < most
    assert torch.equal(quantize(encoding, values).dequantize()[0], values[0])


# --- what is wrong, and what is said


def test_rows_of_queries_come_in_hugging_faces_order(tmp_path: Path) -> None:
    heads, size = 3, 8
    theirs = torch.arange(heads * size * 4.0).reshape(heads * size, 4)
    stored = theirs.unflatten(0, (heads, 2, size // 2)).transpose(1, 2).flatten(0, 2).contiguous()
    keys = {"llama__attention__head_count": heads, "llama__attention__head_count_kv": heads}
    source = open_weights(write(tmp_path / "q.gguf", {"blk.0.attn_q.weight": ("F32", stored)}, **keys))
    assert torch.equal(source.get("blk.0.attn_q.weight"), theirs)
    assert torch.equal(source.get_slice("blk.0.attn_q.weight", 0, 3, 14), theirs[3:14])
    assert torch.equal(source.get_slice("blk.0.attn_q.weight", 1, 1, 3), theirs[:, 1:3])


def small(tmp_path: Path) -> Path:
    return write(tmp_path / "m.gguf", {"a": ("F32", torch.ones(4, 8)), "b": ("Q8_0", torch.ones(2, 32))})


@pytest.mark.parametrize("keep", [0, 3, 20, 60, 130, -40])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = small(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"m.gguf is truncated or corrupt"):
        open_weights(path)


def changed(path: Path, at: int, layout: str, value: int) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, at, value)
    path.write_bytes(data)
    return path


def at_tensor(path: Path, name: str) -> int:
    """Where the description of a tensor goes on behind its name."""
    return path.read_bytes().index(struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", 2)) + 8 + len(name)


def test_headers_that_lie(tmp_path: Path) -> None:
    def said(at: int, layout: str, value: int) -> str:
        with pytest.raises(WeightsError) as raised:
            open_weights(changed(small(tmp_path), at, layout, value))
        return str(raised.value)

    place = at_tensor(small(tmp_path), "a")
    assert "does not begin with GGUF" in said(0, "<I", 1)
    assert "GGUF version 1" in said(4, "<I", 1)
    assert "big-endian" in said(4, "<I", 3 << 24)
    assert "truncated or corrupt" in said(8, "<Q", 1 << 60)
    assert "cut off" in said(16, "<Q", 1 << 60)
    assert "9 dimensions" in said(place, "<I", 9)
    assert "reaches to" in said(place + 4, "<Q", 8000)
    assert "shape" in said(place + 4, "<Q", 0)
    assert "unknown type 77" in said(place + 20, "<I", 77)
    assert "type Q8_K; types that can be read" in said(place + 20, "<I", 15)
    assert "has the shape" in said(place + 20, "<I", 12)
    assert "overlap" in said(at_tensor(small(tmp_path), "b") + 24, "<Q", 32)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_headers_never_crash(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = small(tmp_path_factory.mktemp("mutated"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 200))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        file = read_gguf(path)
        for name in file.tensors:
            open_weights(path).get(name)
        huggingface_values(file)
    except MaxRayError as error:
        said = str(error)
        if str(path) not in said:
            raise AssertionError(f"the file is not named: {said}") from error


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    path = small(tmp_path)
    tensor = read_gguf(path).tensors["b"]
    with pytest.raises(WeightsError, match=r"'b' has scales that are no finite numbers"):
        open_weights(changed(path, tensor.offset, "<H", 0x7E00)).get("b")


def test_models_in_several_files(tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    write(first, {"a": ("F32", torch.ones(2, 2))})
    with pytest.raises(WeightsError, match=r"m-00002-of-00002.gguf is not beside it"):
        open_weights(first)
    write(second, {"b": ("F32", torch.zeros(2, 2))})
    assert open_weights(second).names() == open_weights(tmp_path / first.name).names() == ["a", "b"]
    write(second, {"a": ("F32", torch.zeros(2, 2))})
    with pytest.raises(WeightsError, match=r"'a' is in two files"):
        open_weights(first)


def test_a_folder_with_several_models(tmp_path: Path) -> None:
    from max_ray.huggingface import resolve_model_path

    one = small(tmp_path)
    assert resolve_model_path(tmp_path) == one
    write(tmp_path / "other.gguf", {"a": ("F32", torch.ones(2, 2))})
    with pytest.raises(ModelPathError, match=r"several GGUF files \(m.gguf, other.gguf\)"):
        resolve_model_path(tmp_path)


def test_a_folder_with_later_parts_only(tmp_path: Path) -> None:
    from max_ray.huggingface import resolve_model_path

    write(tmp_path / "m-00002-of-00003.gguf", {"a": ("F32", torch.ones(2, 2))})
    with pytest.raises(ModelPathError, match=r"a part of a model, and not the first, m-00001-of-00003\.gguf"):
        resolve_model_path(tmp_path)


# --- strings in a header


def with_tokens(path: Path, tokens: list[str]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_tensor("a", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@given(st.lists(st.text(max_size=12), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_strings_are_read_when_they_are_asked_for(tmp_path_factory: pytest.TempPathFactory, tokens: list[str]) -> None:
    file = read_gguf(with_tokens(tmp_path_factory.mktemp("strings") / "m.gguf", tokens))
    strings = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(strings, StringArray)
    assert len(strings) == len(tokens)
    assert list(strings) == tokens == strings
    assert [strings[i] for i in range(-len(tokens), len(tokens))] == tokens * 2
    assert strings[1:7:2] == tokens[1:7:2]
    assert list(pickle.loads(pickle.dumps(strings))) == tokens
    assert open_weights(file.path).names() == ["a"]  # what stands behind the strings is where it was


def test_strings_that_are_not_utf8_or_reach_beyond_the_file(tmp_path: Path) -> None:
    path = with_tokens(tmp_path / "m.gguf", ["ab", "cd"])
    at = path.read_bytes().index(struct.pack("<Q", 2) + b"cd")
    with pytest.raises(WeightsError, match=r"m.gguf is truncated or corrupt: .*reaches beyond its end"):
        read_gguf(changed(path, at, "<Q", 1 << 63))
    strings = read_gguf(changed(with_tokens(path, ["ab", "cd"]), at + 8, "<B", 0xFF)).metadata["tokenizer.ggml.tokens"]
    assert strings[0] == "ab"
    with pytest.raises(UnicodeDecodeError):
        list(strings)


def test_a_header_is_read_once_until_the_file_changes(tmp_path: Path) -> None:
    path = small(tmp_path)
    young = read_gguf(path)
    os.utime(path, (1, 1))
    first = read_gguf(path)
    assert read_gguf(path).metadata is first.metadata is not young.metadata
    write(path, {"c": ("F32", torch.ones(2, 2))})
    os.utime(path, (1, 1))
    assert list(read_gguf(path).tensors) == ["c"]
