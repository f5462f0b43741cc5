"""Reading checkpoints: every layout of files, every way for them to be wrong, and how little is read.

python -m pytest tests/weights/test_checkpoint.py
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from max_ray.errors import ModelPathError, WeightsError
from max_ray.interfaces import WeightsFormat
from max_ray.weights import DictWeightSource, WeightSource, open_weights
from max_ray.weights import safetensors_file as reader

TENSORS = {
    "embed.weight": torch.randn(6, 4),
    "layer.weight": torch.randn(3, 5, 2).to(torch.bfloat16),
    "norm.weight": torch.randn(7).to(torch.float16),
    "scale": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "ids": torch.arange(5),
}


def save_sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **weight_map: str) -> None:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, t in shards.items() for name in t} | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def check_tensors(source: WeightSource) -> None:
    assert sorted(source.names()) == sorted(TENSORS)
    assert source.nbytes() == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.get(name), tensor)


def test_tensors_in_memory() -> None:
    check_tensors(DictWeightSource(TENSORS))


def test_one_file_by_folder_and_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_tensors(open_weights(tmp_path))
    check_tensors(open_weights(tmp_path, WeightsFormat.safetensors))
    check_tensors(open_weights(str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("dtype", list(reader.DTYPES.values()), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    actual = open_weights(tmp_path).get("x")
    assert actual.dtype == dtype
    assert torch.equal(actual.float(), tensor.float())


def halves() -> dict[str, dict[str, torch.Tensor]]:
    names = list(TENSORS)
    return {
        "model-00001-of-00002.safetensors": {name: TENSORS[name] for name in names[:3]},
        "model-00002-of-00002.safetensors": {name: TENSORS[name] for name in names[3:]},
    }


def test_shards_with_an_index(tmp_path: Path) -> None:
    save_sharded(tmp_path, halves())
    check_tensors(open_weights(tmp_path))
    check_tensors(open_weights(tmp_path / "model.safetensors.index.json"))


def test_shards_without_an_index(tmp_path: Path) -> None:
    for file, tensors in halves().items():
        save_file(tensors, tmp_path / file)
    check_tensors(open_weights(tmp_path))


def test_an_index_hides_files_and_tensors_that_it_does_not_name(tmp_path: Path) -> None:
    shards = halves()
    save_sharded(tmp_path, shards)
    save_file({"embed.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    second = "model-00002-of-00002.safetensors"
    save_file(shards[second] | {"embed.weight": torch.zeros(1)}, tmp_path / second)
    check_tensors(open_weights(tmp_path))


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    check_tensors(pickle.loads(pickle.dumps(open_weights(tmp_path))))


# --- slices


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_random_slices_equal_torch(
    data: st.DataObject, shape: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8])))
    file = tmp_path_factory.mktemp("slices") / "x.safetensors"
    save_file({"before": torch.ones(3), "x": tensor, "z": torch.ones(3)}, file)
    axis = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[axis]))
    stop = data.draw(st.integers(start, shape[axis]))
    expected = tensor.narrow(axis, start, stop - start)
    for source in (open_weights(file), DictWeightSource({"x": tensor})):
        actual = source.get_slice("x", axis, start, stop)
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slice_reads_its_own_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    tensor = torch.randn(64, 32)
    save_file({"x": tensor, "y": torch.randn(1000)}, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    counts = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: counts.append(n := preadv(fd, buffers, offset)) or n)
    source.get_slice("x", axis, 8, 16)
    assert sum(counts) == tensor.narrow(axis, 8, 8).nbytes
    counts.clear()
    source.get("x")
    assert sum(counts) == tensor.nbytes


def test_a_read_that_comes_in_pieces_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    check_tensors(open_weights(tmp_path))


def test_opening_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    monkeypatch.delattr(os, "preadv")
    assert open_weights(tmp_path).shape("norm.weight") == (7,)


# --- what is wrong, and what is said


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelPathError, match=r"absent does not exist"):
        open_weights(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelPathError, match=r"no \*.safetensors file"):
        open_weights(tmp_path)
    with pytest.raises(WeightsError, match=r"config.json is not a weights file"):
        open_weights(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(WeightsError, match=rf"{name} is a pickle.*save_pretrained"):
            open_weights(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model.safetensors is truncated or corrupt"):
        open_weights(tmp_path)


def raw_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "header"),
        (raw_file(b"{"), "not JSON"),
        (raw_file(b"\xff\xfe"), "not JSON"),
        (raw_file([1]), "not a JSON object"),
        (raw_file({"x": 1}), "does not describe tensor 'x'"),
        (raw_file({"x": {"dtype": "F32", "shape": [2]}}), "does not describe tensor 'x'"),
        (raw_file({"x": {"dtype": "F32", "shape": None, "data_offsets": [0, 8]}}), "does not describe tensor 'x'"),
        (
            raw_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
            "4 bytes, its shape needs 8",
        ),
        (raw_file({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "its header gives"),
        (raw_file({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"1234"), "its header gives"),
        (raw_file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234567"), "reaches to"),
    ],
)
def test_a_corrupt_file_is_named_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model.safetensors is truncated or corrupt") as raised:
        open_weights(tmp_path)
    assert message in str(raised.value)


@pytest.mark.parametrize("dtype", ["F4", ["F4"]])
def test_an_unknown_dtype_is_named(tmp_path: Path, dtype: object) -> None:
    content = raw_file({"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 1]}}, b"1")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"'x' has dtype .*F4"):
        open_weights(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, file)
    source = open_weights(tmp_path)
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(WeightsError, match=r"model.safetensors .* shorter"):
        source.get("x")


def test_a_weight_in_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"'x' is in two files, .*a.safetensors and .*b.safetensors"):
        open_weights(tmp_path)


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    save_sharded(tmp_path, halves())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names model-00002-of-00002.safetensors \(for tensor 'scale'\)"):
        open_weights(tmp_path)


def test_a_shard_is_missing_and_there_is_no_index(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"has 1 of the 2 files model-\*-of-\*.safetensors"):
        open_weights(tmp_path)


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    save_sharded(tmp_path, halves(), lost="model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match=r"'lost' in model-00001-of-00002.safetensors, which does not have it"):
        open_weights(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "..", "", 3])
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, shard: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(WeightsError, match=r"index.json"):
        open_weights(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["x"]}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"index.json.* weight_map"):
        open_weights(tmp_path)


def test_an_unknown_tensor_brings_the_nearest_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    for source in (open_weights(tmp_path), DictWeightSource(TENSORS)):
        for ask in (source.get, source.shape, source.dtype):
            with pytest.raises(WeightsError, match=r"no tensor 'norm.wieght'. Did you mean 'norm.weight'"):
                ask("norm.wieght")
