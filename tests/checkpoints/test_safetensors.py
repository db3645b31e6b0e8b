"""Safetensors files: those of other tools are read bit for bit, damaged ones are rejected."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from jaxtune.checkpoints.formats.safetensors import (
    Pending,
    SafetensorsFile,
    read_all,
    write_file,
    write_sharded,
)
from jaxtune.errors import JaxtuneError


def bits(array):
    return array.shape, str(array.dtype), array.tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_reads_what_torch_wrote_bit_for_bit(tmp_path, dtype):
    values = torch.randn(3, 5, generator=torch.manual_seed(0)).to(dtype)
    # An odd-sized tensor first: the one that is read then lies at an odd place.
    safetensors.torch.save_file(
        {"a": torch.ones(3, dtype=torch.uint8), "b": values}, tmp_path / "f"
    )
    read = SafetensorsFile(tmp_path / "f").read("b")
    assert read.shape == (3, 5)
    assert read.tobytes() == values.contiguous().view(torch.uint8).numpy().tobytes()
    assert str(read.dtype) == str(dtype).removeprefix("torch.")


def test_a_read_tensor_is_a_view_that_cannot_be_written(tmp_path):
    write_file(tmp_path / "f", {"a": np.ones((4, 4), np.float32)})
    value = SafetensorsFile(tmp_path / "f").read("a")
    assert not value.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 2


def test_torch_reads_what_was_written(tmp_path):
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((6, 4)).astype(np.float32)
    written = {"a": floats.T, "b": floats.astype(ml_dtypes.bfloat16), "c": np.float32([])}
    write_file(tmp_path / "f", written)
    theirs = safetensors.torch.load_file(tmp_path / "f")
    assert set(theirs) == set(written)
    assert torch.equal(theirs["a"], torch.from_numpy(floats.T.copy()))
    assert torch.equal(theirs["b"], torch.from_numpy(floats).to(torch.bfloat16))
    with safetensors.safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def pending(tensors):
    return [(name, Pending(v.shape, v.dtype, lambda v=v: v)) for name, v in tensors]


def header_of(**entries):
    return json.dumps(entries).encode()


def tensor(start, stop, *, shape=None, dtype="F32"):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = header_of(a=tensor(0, 64))
BROKEN = {
    "zero length": b"",
    "three bytes": b"abc",
    "cut in the data": struct.pack("<Q", len(GOOD)) + GOOD + bytes(63),
    "cut in the header": struct.pack("<Q", len(GOOD)) + GOOD[:-8],
    "data after the end": struct.pack("<Q", len(GOOD)) + GOOD + bytes(65),
    "header is no text": b"\xff\xfe{",
    "header is no JSON": b'{"a":\n\nnothing}',
    "header is a list": b"[1]",
    "header nests deeply": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "header longer than the file": struct.pack("<Q", 2**20) + b"{}",
    "header of 200 MB": struct.pack("<Q", 200_000_000) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "tensors overlap": header_of(a=tensor(0, 40), b=tensor(24, 64)),
    "a hole between tensors": header_of(a=tensor(0, 16), b=tensor(48, 64)),
    "offsets backwards": header_of(a=tensor(64, 0, shape=[16])),
    "a negative offset": header_of(a=tensor(-64, 64, shape=[32])),
    "an unknown dtype": header_of(a=tensor(0, 64, dtype="F99")),
    "the shape is another": header_of(a=tensor(0, 64, shape=[15])),
    "a negative shape": header_of(a=tensor(0, 64, shape=[-4, -4])),
    "a shape that overflows": header_of(a=tensor(0, 64, shape=[2**33, 2**33])),
    "a key twice": b'{"a":%b,"a":%b}'
    % tuple(json.dumps(tensor(*span)).encode() for span in ((0, 32), (32, 64))),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, fault):
    content, path = BROKEN[fault], tmp_path / "model.safetensors"
    whole = fault.startswith(("zero", "three", "cut", "data", "header longer", "header of"))
    path.write_bytes(content if whole else struct.pack("<Q", len(content)) + content + bytes(64))
    with pytest.raises(JaxtuneError) as raised:
        SafetensorsFile(path)
    assert str(raised.value).startswith(f"{path}: not a valid safetensors file: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["missing.safetensors", "."])
def test_a_missing_file(tmp_path, path):
    with pytest.raises(JaxtuneError, match="no such file"):
        SafetensorsFile(tmp_path / path)


def test_a_dtype_that_is_not_read_names_the_tensor(tmp_path):
    header = header_of(packed=tensor(0, 64, dtype="F4", shape=[128]))
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(JaxtuneError, match='f: tensor "packed" has the unsupported dtype F4'):
        read_all(path)


def test_a_tensor_name_is_never_a_path(tmp_path):
    """safetensors accepts such a name; nothing here makes a file of it."""
    (tmp_path / "in").mkdir()
    write_file(tmp_path / "in" / "f", {"../../evil": np.ones(2, np.float32)})
    tensors = read_all(tmp_path / "in" / "f")
    (tmp_path / "out").mkdir()
    write_sharded(tmp_path / "out", pending(tensors.items()), 2**20)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["f", "model.safetensors"]


class TestShards:
    @staticmethod
    def tensors():
        return [(f"t{i}", np.full((i + 1, 8), i, np.float32)) for i in range(5)]

    def test_one_file_has_no_index(self, tmp_path):
        assert write_sharded(tmp_path, pending(self.tensors()), 2**20) == ["model.safetensors"]
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]

    def test_torch_reads_tensors_of_every_width_whatever_their_order(self, tmp_path):
        values = {
            "bytes": np.arange(3, dtype=np.uint8),
            "scalar": np.zeros((), np.uint8),
            "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "halves": np.arange(5).astype(ml_dtypes.bfloat16),
            "none": np.zeros((0, 4), np.float32),
            "long": np.arange(2),
        }
        assert write_sharded(tmp_path, pending(values.items()), 2**20) == ["model.safetensors"]
        theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert set(theirs) == set(values)
        for name, value in values.items():
            assert theirs[name].shape == value.shape
            assert np.array_equal(theirs[name].float().numpy(), value.astype(np.float32))

    def test_no_shard_exceeds_the_limit_unless_one_tensor_does(self, tmp_path):
        names = write_sharded(
            tmp_path, pending(self.tensors()), 100
        )  # of 32, 64, 96, 128, 160 bytes
        sizes = [sum(t.nbytes for t in read_all(tmp_path / name).values()) for name in names]
        assert sizes == [96, 96, 128, 160]
        assert names[0] == "model-00001-of-00004.safetensors"

    def test_the_index_says_where_every_tensor_is(self, tmp_path):
        names = write_sharded(tmp_path, pending(self.tensors()), 100)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for _, value in self.tensors())
        for name, value in self.tensors():
            held = read_all(tmp_path / index["weight_map"][name])[name]
            assert bits(held) == bits(value)
        files = {path.name for path in Path(tmp_path).iterdir()}
        assert files == {*names, "model.safetensors.index.json"}


def test_more_dimensions_than_arrays_have_are_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1] * 72, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(JaxtuneError, match=r"x.safetensors: tensor 'x' has 72 dimensions"):
        SafetensorsFile(path)
