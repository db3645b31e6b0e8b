"""JSON files of any content are read, or are errors of one line that name the file."""

import collections
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from jaxtune import strict_json
from jaxtune.adapters import method_from_config
from jaxtune.adapters.define import define
from jaxtune.adapters.esft.expert_scores import read_choice, read_scores
from jaxtune.checkpoints.huggingface import open_source, read_config
from jaxtune.checkpoints.requantize import read_report
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.runs.changes import read_history
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import read_lines
from jaxtune.runs.record import read_record
from jaxtune.runs.stored_arrays import open_arrays
from jaxtune.strict_json import (
    entry,
    expect,
    parse_json,
    read_json,
    read_object,
    read_objects,
    read_text,
)
from jaxtune.training.durations import Timeline
from jaxtune.training.loop.early_stopping import Tally, read_counters

# By name: the content, and the error after the name of the file.
DAMAGED = {
    "empty": (b"", ":1: invalid JSON: Expecting value at column 1"),
    "truncated": (b'{"a":\n [1, ', ":2: invalid JSON: Expecting value at column 6"),
    "not UTF-8": (b'{"a": "\xff"}', ": not UTF-8 (byte 8 of the file: invalid start byte)"),
    "binary": (bytes(range(256)) * 4, ": not UTF-8 (byte 129 of the file: "),
    "deep": (b"[" * 100_000, ": JSON is nested too deeply"),
    "101 levels": (b'{"a":' * 101 + b"1" + b"}" * 101, ": JSON is nested too deeply"),
    "NaN": (b'{"a": NaN}', ": invalid JSON: NaN is not allowed"),
    "infinity": (b'{"a": -Infinity}', ": invalid JSON: -Infinity is not allowed"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', ': invalid JSON: duplicate key "a"'),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", ": invalid JSON: an integer of more than 4300"),
    "surrogate": (b'{"a": "\\uD800"}', ": a string has an unpaired surrogate"),
    "trailing": (b"{} {}", ":1: invalid JSON: Extra data at column 4"),
}
COUNTERS = {"tokens": 1, "skipped": {}, "bad_in_a_row": 0, "stale": 0, "stopped": False}
WRONG_TYPE = (b"[]", b"3", b'"x"', b"null", b'{"steps": "x"}', b'{"step": 1.5}', b"true")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_line_and_column(name, tmp_path):
    path = tmp_path / "x.json"
    content, message = DAMAGED[name]
    path.write_bytes(content)
    with pytest.raises(JaxtuneError, match=f"^{re.escape(f'{path}{message}')}"):
        read_json(path)


def test_a_file_that_would_keep_its_reader_waiting_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("fifo", "not a regular file"), ("", "not a regular file")):
        with pytest.raises(JaxtuneError, match=reason):
            read_json(tmp_path / name)
    with pytest.raises(JaxtuneError, match="not a regular file"):
        read_json("/dev/zero")
    with pytest.raises(JaxtuneError, match="no such file"):
        read_json(tmp_path / "absent")
    for name in ("a\0b", "\ud800", "x" * 5000):
        with pytest.raises(JaxtuneError) as error:
            read_json(name)
        str(error.value).encode()


def test_a_large_file_is_not_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(JaxtuneError, match=r"x\.json: larger than 32 MiB"):
        read_text(path)
    with pytest.raises(JaxtuneError, match=r"x\.json:1: longer than 32 MiB"):
        list(read_objects(path))
    monkeypatch.setattr(strict_json, "MAX_BYTES", 16)
    path.write_text('{"a": 1}\n' * 100)  # the limit is on a line
    assert len(list(read_objects(path))) == 100


def test_values_are_checked_by_type():
    content = {"n": 3, "x": 2, "huge": 10**4000, "yes": True, "text": "a" * 100, "none": None}
    assert entry(content, "n", int, "f.json") == 3
    assert type(entry(content, "x", float, "f.json")) is float
    for key, kind, message in (
        ("absent", int, 'f.json: has no "absent"'),
        ("yes", int, 'f.json: "yes": True is not an integer'),
        ("n", bool, 'f.json: "n": 3 is not true or false'),
        ("huge", float, 'f.json: "huge": an integer of 13288 bits is not a finite number'),
        ("text", list, 'f.json: "text": \'aaaa'),
        ("none", dict, 'f.json: "none": None is not an object'),
    ):
        with pytest.raises(JaxtuneError) as error:
            entry(content, key, kind, "f.json")
        assert str(error.value).startswith(message)
        assert len(str(error.value)) < 120
    with pytest.raises(JaxtuneError):
        expect(float("inf"), float, "x")


def test_numbers_may_be_converted_otherwise():
    assert parse_json(b'{"a": [1.10, 2]}', "x", parse_float=str) == {"a": ["1.10", 2]}


def _manifest(path):
    Checkpoints(path.parent.parent).latest_verified()


READERS = {
    "config.json": lambda path: RunDirectory(path.parent).read_config(),
    "description.json": lambda path: RunDirectory(path.parent).steps_planned(),
    "fingerprint.json": read_record,
    "history.jsonl": read_history,
    "metrics.jsonl": read_lines,
    "expert_scores.json": read_scores,
    "expert_cfg.json": lambda path: read_choice(path, "token", 0.5),
    "merge_report.json": lambda path: read_report(path.parent),
    "_METADATA": lambda path: open_arrays(path.parent, {"a": None}),
    "model/config.json": lambda path: read_config(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_a_damaged_file_names_it(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for content in (*(content for content, _ in DAMAGED.values()), *WRONG_TYPE):
        path.write_bytes(content + b"\n")
        try:
            READERS[name](path)
        except JaxtuneError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            readable = ("merge_report.json", "model/config.json", "metrics.jsonl")
            assert name in readable or content.startswith(b'{"steps'), content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tally": []}, '"tally": [] is not an object'),
        ({"tally": {}}, 'has no "tokens"'),
        ({"tally": COUNTERS | {"tokens": "x"}}, "\"tokens\": 'x' is not an integer"),
        ({"tally": COUNTERS | {"best": "x"}}, "\"best\": 'x' is not a finite number"),
        ({"tally": COUNTERS | {"skipped": {"nan": "x"}}}, "\"skipped\": 'x' is not an integer"),
        ({"tally": COUNTERS | {"x": 1}}, '"tally" has the unknown key "x"'),
        ({"stopping": []}, '"stopping": [] is not an object'),
        ({"stopping": {"metric": "loss"}}, 'has no "patience"'),
    ],
)
def test_counters_of_a_checkpoint_are_checked(change, message):
    place = Path("extra.json")
    assert read_counters({"tally": COUNTERS}, place) == (Tally(**COUNTERS), None)
    with pytest.raises(JaxtuneError) as error:
        read_counters({"tally": COUNTERS} | change, place)
    assert message in str(error.value) and str(error.value).startswith("extra.json: ")


@pytest.mark.parametrize(
    "override",
    [
        *("adapter.targets=a{99999999999}", "adapter.rank_pattern=a{99999999999}=3"),
        *("adapter.rank_pattern=q_proj=1e400", "adapter.rank_pattern=q_proj=nan"),
        f"adapter.rank_pattern={'(' * 400}{')' * 400}=3",
        *("adapter.layers=0-99999999999", f"adapter.layers={'9' * 5000}"),
    ],
    ids=lambda text: text[:40],
)
def test_patterns_that_cannot_be_compiled_are_named(override):
    config = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    with pytest.raises(JaxtuneError) as error:
        define(config, "float32", method_from_config(resolve({}, [override]).adapter))
    assert str(error.value).startswith(f"{override.partition('=')[0]}: ")


def test_a_length_of_very_many_passes_is_refused_soon():
    class Order:
        rows_per_pass = 1

        def plan(self, number, advance=None):
            return Planned(1, np.array([0, 1]))

    Planned = collections.namedtuple("Planned", "steps tokens")
    for name in ("epochs", "tokens"):
        training = resolve({"training": {name: 10**6}}).training
        with pytest.raises(JaxtuneError, match=f"training.{name}=1000000.*: more than 10000"):
            Timeline(Order()).total_steps(training)  # type: ignore[arg-type]


def test_an_index_may_be_larger_than_other_files(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {f"layers.{i}": "a.safetensors" for i in range(99)}})
    )
    monkeypatch.setattr(strict_json, "MAX_BYTES", 1000)
    with pytest.raises(JaxtuneError, match=r"index\.json: larger than"):
        read_object(index)
    assert len(read_object(index, strict_json.MAX_INDEX_BYTES)["weight_map"]) == 99
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JaxtuneError, match=r"a\.safetensors: no such file"):  # it has been read
        open_source(tmp_path)
    with pytest.raises(JaxtuneError, match="larger than 0 MiB"):
        read_object(index, 100)


def test_a_damaged_manifest_falls_back_to_the_step_before(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, {"a": np.ones(2)}, {})
        checkpoints.wait()
    for step, (content, _) in enumerate(DAMAGED.values(), start=2):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "manifest.json").write_bytes(content)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_verified() == 1
