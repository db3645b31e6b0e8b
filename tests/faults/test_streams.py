"""Data of unknown length: a run could not be resumed exactly, so it is refused at its start."""

import json
import os

import pytest
from datasets import Dataset

import jaxtune
from jaxtune.errors import JaxtuneError


@pytest.fixture
def rows(chats):
    return [json.loads(line) for line in chats.read_text().splitlines()]


@pytest.mark.parametrize("shuffled", [False, True])
def test_streams_of_datasets_are_refused_before_anything_is_read(
    rows, tiny_chat, tmp_path, shuffled
):
    read = []

    def note(row):
        read.append(row)
        return row

    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=2).map(note)
    stream = stream.shuffle(seed=0, buffer_size=8) if shuffled else stream
    config = {"model": {"path": str(tiny_chat)}, "training": {"steps": 2}}
    for data in ({"train_data": stream}, {"train_data": rows, "eval_data": stream}):
        with pytest.raises(
            JaxtuneError, match=r"a datasets\.Dataset, not IterableDataset"
        ) as error:
            jaxtune.train(config, tmp_path / "run", **data)
        assert "\n" not in str(error.value)
    assert not read and not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", ["a pipe", "/dev/zero"])
def test_pipes_and_devices_are_refused_and_not_opened(server, small_config, tmp_path, data):
    if data == "a pipe":
        data = tmp_path / "rows.jsonl"
        os.mkfifo(data)  # opening it would wait for a writer
    workdir = tmp_path / "run"
    source = f"--config.data.train={data}"
    output = server.run("train", "--config", small_config, source, "--workdir", workdir, code=65)
    *_, last = output.splitlines()
    assert last.startswith(f"jaxtune: error: {data}: not a file but a pipe or a device")
    assert not workdir.exists()
