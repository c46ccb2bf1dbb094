"""Reading and writing safetensors one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kbit.checkpoint import CheckpointReader, CheckpointWriter

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


def assorted() -> dict[str, Tensor]:
    """Every dtype, in shapes that would misalign one another: odd, empty, scalar, non-contiguous."""
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        for shape in ((3,), (5, 7), (), (0, 4), (1, 3, 1)):
            tensors[f"t{i}.{len(tensors)}"] = (torch.rand(shape) * 20 - 3).to(dtype)
    tensors["transposed"] = torch.randn(6, 5).t()
    return tensors


def same(a: Tensor, b: Tensor) -> bool:
    one, two = a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(one, two)


@pytest.mark.parametrize("size", [1, 100, 10_000_000])
def test_round_trip(tmp_path: Path, size: int) -> None:
    tensors = assorted()
    with CheckpointWriter(tmp_path, size) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        files = writer.finish()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors") == sorted(files)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.keys()) == set(tensors)
        for key, tensor in reader.items():
            assert same(tensor, tensors[key]), key
            assert reader.shape(key) == tuple(tensors[key].shape)
    # The safetensors library itself reads the files, and maps every key to the shard that holds it.
    merged = {key: value for file in files for key, value in load_file(tmp_path / file).items()}
    assert merged.keys() == tensors.keys()
    assert all(same(merged[key], tensors[key]) for key in tensors)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        for file in files:
            data = load_file(tmp_path / file)
            assert all(index["weight_map"][key] == file for key in data)
            assert len(data) == 1 or sum(t.nbytes for t in data.values()) <= size


def test_bytes_equal_the_librarys(tmp_path: Path) -> None:
    """One dtype, keys in order: the same file as save_file's."""
    tensors = {f"layer.{i}": torch.randn(3, i + 1) for i in range(5)}
    with CheckpointWriter(tmp_path) as writer:
        for key, tensor in tensors.items():
            writer.add(key, tensor)
        writer.finish()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_empty_checkpoint(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        assert writer.finish() == ["model.safetensors"]
    assert CheckpointReader(tmp_path).keys() == []


def test_writer_refuses(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match="a would be written twice"):
            writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match="c has dtype torch.complex64"):
            writer.add("c", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="max_shard_size"):
        CheckpointWriter(tmp_path, 0)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    with CheckpointWriter(tmp_path, 100) as writer:
        for i in range(4):
            writer.add(f"w{i}", torch.full((20,), float(i)))
        assert len(writer.finish()) == 4
    return tmp_path


def test_sharded_input_is_read_lazily(sharded: Path) -> None:
    with CheckpointReader(sharded) as reader:
        assert reader.files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
        assert "w3" in reader and "w9" not in reader
        assert reader.read("w2")[0] == 2.0
        assert reader.path_of("w2").name == "model-00003-of-00004.safetensors"


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00004.safetensors is missing.*incomplete"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file(sharded: Path, keep: int) -> None:
    file = sharded / "model-00003-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model-00003-of-00004.safetensors is truncated"):
        CheckpointReader(sharded)


def test_index_promises_a_key_that_is_not_there(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="00001-of-00004.safetensors does not hold ghost"):
        CheckpointReader(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}']
)
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "weights.bin"])
def test_index_may_only_name_its_neighbours(tmp_path: Path, file: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="not a safetensors file in the same folder"):
        CheckpointReader(tmp_path)


def test_pickled_weights_are_refused_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"would run code")
    with pytest.raises(ValueError, match="pickled weights only .pytorch_model.bin.*safetensors"):
        CheckpointReader(tmp_path)


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        CheckpointReader(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a model folder with weights"):
        CheckpointReader(tmp_path)
