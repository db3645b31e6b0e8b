"""Block hashes: every byte of a checkpoint is covered, each block is hashed once and whole."""

import os
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import xxhash

from jaxtune.checkpoints.blocks import BlockHashes, first_difference, hash_file, merge
from jaxtune.checkpoints.open_model import open_model
from jaxtune.errors import JaxtuneError
from jaxtune.parallel import processes
from jaxtune.runs.inventory import Inventory, file_differences

BLOCK = 1000


def expected(path, block=BLOCK):
    content = path.read_bytes()
    starts = range(0, len(content), block)
    return [xxhash.xxh3_128(content[at : at + block]).hexdigest() for at in starts]


@pytest.fixture(scope="module")
def bases(tiny, tmp_path_factory, smollm2_gguf):
    """The same weights as safetensors and as PyTorch's file, and a GGUF file."""
    place = tmp_path_factory.mktemp("bases")
    directory = tiny("llama")
    (place / "torch").mkdir()
    shutil.copy(directory / "config.json", place / "torch")
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), place / "torch/pytorch_model.bin")
    return {"safetensors": directory, "torch": place / "torch", "gguf": smollm2_gguf}


@pytest.mark.parametrize("form", ["safetensors", "torch", "gguf"])
def test_every_byte_that_is_read_belongs_to_a_reported_range(bases, form):
    """The ranges of all rows of a tensor are its bytes; other formats may read more."""
    source = open_model(bases[form]).source
    ranges = []
    (file,) = source.files()
    file.on_read = lambda start, stop: ranges.append((start, stop))
    size = file.path.stat().st_size
    for name in source.names()[:12]:
        shape = source.shape(name)
        ranges.clear()
        whole = source.read(name)
        (start, stop) = ranges.pop()
        assert 0 <= start < stop <= size
        if form != "gguf":  # the bytes in the range are the values
            content = file.path.read_bytes()[start:stop]
            assert content == np.ascontiguousarray(whole).tobytes(), name
        for rows in (slice(0, 1), slice(shape[0] // 2, shape[0]), slice(1, 1)):
            source.read(name, rows)
            first, last = ranges.pop()
            assert start <= first <= last <= stop
            if form != "gguf":
                content = file.path.read_bytes()[first:last]
                assert content == np.ascontiguousarray(whole[rows]).tobytes(), name


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("reads", ["all", "some", "none"])
def test_the_hashes_are_those_of_the_files_whatever_is_read(bases, form, reads):
    model = open_model(bases[form])
    inventory = Inventory(model, BLOCK)
    names = model.source.names()
    with inventory.hashing() as hashes:
        for name in {"all": names, "some": names[1:3], "none": []}[reads]:
            model.source.read(name)
        found = hashes.complete()
    assert len(found) >= 2
    assert found == {name: expected(bases[form] / name) for name in found}
    assert all(file.on_read is None for file in model.source.files())
    record = inventory.record("x", "", found)
    assert not file_differences(bases[form], record) and not inventory.differences(record)


def test_a_file_without_bytes_and_one_of_whole_blocks(tmp_path):
    paths = {"empty": tmp_path / "empty", "whole": tmp_path / "whole"}
    paths["empty"].touch()
    paths["whole"].write_bytes(bytes(range(256)) * 10)
    with BlockHashes(paths, 256) as hashes:
        hashes.touched("whole", 255, 257)
        found = hashes.complete()
    assert found == {"empty": [], "whole": expected(paths["whole"], 256)}
    assert hash_file(paths["whole"], 256) == found["whole"]
    assert first_difference(found["whole"], [*found["whole"][:9], "x"], 2560, 256) == (2304, 2559)


def test_a_file_that_becomes_shorter_is_an_error(bases, tmp_path):
    """Its missing pages cannot be read: the operating system would end the process."""
    shutil.copytree(bases["safetensors"], tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    inventory = Inventory(open_model(tmp_path / "base"), 4096)
    with inventory.hashing() as hashes:
        os.truncate(weights, 4096)
        with pytest.raises(JaxtuneError, match=r"model\.safetensors: has become shorter"):
            hashes.complete()


def test_a_replaced_file_is_hashed_as_it_is_loaded(bases, tmp_path):
    shutil.copytree(bases["safetensors"], tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    model = open_model(tmp_path / "base")
    inventory, before = Inventory(model, BLOCK), expected(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (tmp_path / "new").write_bytes(content)
    (tmp_path / "new").rename(weights)
    with inventory.hashing() as hashes:
        assert hashes.complete()["model.safetensors"] == before
    model.source.read(model.source.names()[0])  # its map is still open


def test_the_digests_of_several_processes_are_merged():
    draw = np.random.default_rng(0)
    digests = draw.integers(1, 256, (5, 16), np.uint8)
    done = np.array([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]], np.uint8)
    held = done[..., None] * digests
    np.testing.assert_array_equal(merge(done, held), digests * [[1], [0], [1], [1], [0]])
    held[1, 2, 7] ^= 4
    with pytest.raises(ValueError, match="2"):
        merge(done, held)


class Together:
    """Threads that stand for the processes of a run, each with an index of its own."""

    def __init__(self, count, monkeypatch):
        self.count, self.own = count, threading.local()
        self.barrier, self.values = threading.Barrier(count), [None] * count
        for name in ("gather", "process_index", "process_count"):
            monkeypatch.setattr(f"jaxtune.checkpoints.blocks.{name}", getattr(self, name))

    def process_index(self):
        return self.own.index

    def process_count(self):
        return self.count

    def gather(self, value):
        self.values[self.own.index] = np.array(value)
        self.barrier.wait(30)
        result = np.stack(self.values)
        self.barrier.wait(30)
        return result

    def run(self, function):
        results, errors = [None] * self.count, [None] * self.count

        def call(index):
            self.own.index = index
            try:
                results[index] = function(index)
            except JaxtuneError as error:
                errors[index] = str(error)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results, errors


def test_processes_share_what_none_of_them_reads(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).bytes(25_500))
    together = Together(3, monkeypatch)

    def check(index):
        with BlockHashes({"file": path}, BLOCK) as hashes:
            hashed = []
            original = hashes._hash
            hashes._hash = lambda name, number: (hashed.append(number), original(name, number))
            hashes.touched("file", 2000 * index, 2000 * index + 3000)
            return hashes.complete()["file"], hashed

    results, errors = together.run(check)
    assert errors == [None] * 3
    assert all(found == expected(path) for found, _ in results)
    hashed = [number for _, numbers in results for number in numbers]
    assert set(hashed) == set(range(26)) and len(hashed) == 26 + 2  # two at borders, twice
    assert max(len(numbers) for _, numbers in results) <= 10


def test_processes_that_read_rows_hash_little_more_than_they_read(tmp_path, monkeypatch):
    """Tensors of 14 kB in blocks of 16 kB, each split by rows over 8 processes."""
    count, tensor, block = 8, 14_000, 16_000
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(2).bytes(64 * tensor))
    together = Together(count, monkeypatch)

    def check(index):
        with BlockHashes({"file": path}, block) as hashes:
            hashed = []
            original = hashes._hash
            hashes._hash = lambda name, number: (hashed.append(number), original(name, number))
            for start in range(0, 64 * tensor, tensor):
                rows = tensor // count
                hashes.touched("file", start + index * rows, start + (index + 1) * rows)
            return hashes.complete()["file"], len(hashed) * block

    results, errors = together.run(check)
    assert errors == [None] * count
    assert all(found == expected(path, block) for found, _ in results)
    share = 64 * tensor // count
    assert max(hashed for _, hashed in results) <= share + block


def test_processes_with_other_files_are_told_so(tmp_path, monkeypatch):
    for index, size in enumerate((5000, 5000, 5001)):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "file").write_bytes(b"x" * size)
    together = Together(3, monkeypatch)

    def check(index):
        with BlockHashes({"file": tmp_path / str(index) / "file"}, BLOCK) as hashes:
            hashes.touched("file", 0, 3000)
            return hashes.complete()

    _, errors = together.run(check)
    assert all("files of the base model differ between process" in error for error in errors)
    (tmp_path / "2" / "file").write_bytes(b"x" * 2500 + b"y" * 2500)
    _, errors = together.run(check)
    assert all("file: two processes have read different bytes of it" in error for error in errors)


def test_all_processes_learn_that_one_of_them_cannot_read_a_file(tmp_path, monkeypatch):
    for index in range(3):
        (tmp_path / str(index)).write_bytes(b"x" * 9000)
    together = Together(3, monkeypatch)

    def check(index):
        with BlockHashes({"file": tmp_path / str(index)}, BLOCK) as hashes:
            if index == 1:
                os.truncate(tmp_path / "1", 100)
            return hashes.complete()

    _, errors = together.run(check)
    assert "1: has become shorter" in errors[1]
    assert [errors[0], errors[2]] == ["process 1 cannot read the base model; see its message"] * 2


def test_gather_of_one_process():
    assert processes.gather(np.arange(3)).tolist() == [[0, 1, 2]] and jax.process_count() == 1


def test_a_renamed_gguf_file_is_the_same_base(smollm2_gguf, tmp_path):
    link = tmp_path / "renamed.gguf"
    link.symlink_to(smollm2_gguf)
    model = open_model(link)
    inventory = Inventory(model)
    assert list(inventory.sizes) == ["model.gguf"]
    with inventory.hashing() as hashes:
        model.source.read("model.norm.weight")
        record = inventory.record("x", "", hashes.complete())
    assert list(record.files["model.gguf"].hashes) == hash_file(Path(smollm2_gguf))
    assert file_differences(smollm2_gguf, record) == []
