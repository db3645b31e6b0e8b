"""One set of rows, from every kind of file, gives the same examples; what is wrong is named."""

from __future__ import annotations

import base64
import csv
import gzip
import json

import pytest
from loading import load_examples

from jaxtune.config import resolve
from jaxtune.data import read_rows
from jaxtune.data.sources import absolute_sources, find_sources
from jaxtune.data.splits import parse_eval_sets
from jaxtune.errors import JaxtuneError
from jaxtune.runs.paths import with_absolute_paths

ROWS = [
    {"prompt": "a", "completion": " b"},
    {"prompt": "你好 🎉", "completion": ' "שלום",\nline two'},
    {"prompt": "", "completion": "x, y"},
]


def write(directory, kind):
    """Writes `ROWS` as a file of a kind and returns its path."""
    import pyarrow
    import pyarrow.parquet

    base, _, compression = kind.partition("+")
    path = directory / f"rows.{base}"
    if base == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif base == "json":
        path.write_text("\n " + json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    elif base == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    if not compression:
        return path
    packed = path.with_name(f"{path.name}.{compression}")
    if compression == "gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        content = pyarrow.compress(path.read_bytes(), codec="zstd", asbytes=True)
        packed.write_bytes(content)
    return packed


KINDS = [
    f"{base}{more}" for base in ("jsonl", "json", "csv", "parquet") for more in ("", "+gz", "+zst")
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = write(tmp_path, kind)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert all(row.place.startswith(str(path)) for row in rows)
    assert len({row.place for row in rows}) == 3


def test_zstandard_files_of_its_own_program_are_read(tmp_path):
    """Two frames, as appending makes them, written by the program zstd 1.5.4 with --quiet."""
    frames = "KLUv/QRYgQAAeyJ0ZXh0IjogIm9uZSJ9CtpHCh0otS/9BFiBAAB7InRleHQiOiAidHdvIn0KRWrEHw=="
    path = tmp_path / "both.jsonl.zst"
    path.write_bytes(base64.b64decode(frames))
    assert [row.values for row in read_rows(path)] == [{"text": "one"}, {"text": "two"}]


def test_patterns_and_lists_are_read_in_order(tmp_path):
    for name in ("part-1", "part-0", "other"):
        row = {"text": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    texts = [row.values["text"] for row in read_rows(tmp_path / "part-*.jsonl")]
    assert texts == ["part-0", "part-1"]
    listed = f"{tmp_path}/other.jsonl@2, {tmp_path}/part-[0-9].jsonl@.5"
    assert [row.values["text"] for row in read_rows(listed)] == ["other", "part-0", "part-1"]
    assert [source.weight for source in find_sources(listed)] == [2.0, 0.5]
    with pytest.raises(JaxtuneError, match=r"none-\*\.jsonl: no file matches"):
        read_rows(tmp_path / "none-*.jsonl")


def test_names_with_commas_and_at_signs_are_files_where_they_exist(tmp_path):
    for name in ("a,b.jsonl", "rows@2"):
        (tmp_path / name).write_text('{"text": "x"}\n')
        (source,) = find_sources(tmp_path / name)
        assert source.weight == 1.0
        assert len(list(source.records())) == 1


@pytest.mark.parametrize("directory", ["plain", "a,b", "[v1]", "a,[v1]", "a:b", "x@2", "c=d"])
@pytest.mark.parametrize(
    "text",
    [
        "x.jsonl",
        "x.jsonl@2",
        "x-*.jsonl",
        "x.jsonl,x-1.jsonl",
        "data",
        "data:test",
        "x[-]1.jsonl@2",
    ],
)
def test_absolute_paths_are_parsed_as_relative_ones(directory, text, tmp_path, monkeypatch):
    place = tmp_path / directory
    (place / "data").mkdir(parents=True)
    monkeypatch.chdir(place)
    for name in ("x.jsonl", "x-1.jsonl", "data/test.jsonl"):
        row = {"text": name}
        (place / name).write_text(json.dumps(row) + "\n")

    def read(text):
        if text.endswith(":test"):  # read by `datasets`, which takes seconds
            return [source.name.rpartition("/")[2] for source in find_sources(text)]
        return [(source.weight, source.digest()) for source in find_sources(text)]

    absolute = absolute_sources(text)
    assert read(absolute) == read(text)
    assert directory != "plain" or all(part.startswith("/") for part in absolute.split(","))
    data = {"eval": f"law={text},code=x.jsonl"} if "," not in text else {"eval": text}
    config = resolve({"data": data})
    ours, theirs = (parse_eval_sets(c.data.eval) for c in (with_absolute_paths(config), config))
    assert list(ours) == list(theirs)
    assert all(read(ours[name]) == read(theirs[name]) for name in ours)


def test_a_long_list_and_names_that_no_file_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"part-{index:04d}.jsonl" for index in range(400)]
    for name in names:
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert len(list(read_rows(",".join(names)))) == 400
    for name in ("x" * 300, "a\0b", "~nobody-of-that-name/x.jsonl"):
        with pytest.raises(JaxtuneError, match=f"{name[0]}.*: "):
            list(read_rows(name))


def test_a_weight_of_nothing_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(JaxtuneError, match="a weight must be above 0"):
        find_sources(f"{tmp_path}/a.jsonl@0")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl.gz", b"\x1f\x8b\x08\x00 damaged", "x.jsonl.gz: "),
        ("x.jsonl.zst", b"no zstandard", "x.jsonl.zst: "),
        ("x.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 5000)[:-60], "x.jsonl.gz"),
        ("x.parquet", b"PAR1 no table PAR1", "x.parquet: "),
        ("x.parquet", b"", "x.parquet: "),
        ("x.json", b'[{"text": "a"}, ', "x.json:1: invalid JSON: .* at column"),
        ("x.json", b'[\n{"text": "a"},\n7]', "x.json row 1: expected an object, found int"),
        ("x.csv", b"text\na,b\n", "x.csv:2: more fields than the header \(1\)"),
        ("x.csv", b'text\n"abc\n', "x.csv:2: unexpected end of data"),
        ("x.csv", b'text\n"a"b\n', "x.csv:2: "),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JaxtuneError, match=reason) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_invalid_bytes_in_a_csv_file_are_named(tmp_path, deepseek):
    (tmp_path / "x.csv").write_bytes(b"prompt,completion\na,b\nc,\xff\n")
    with pytest.raises(JaxtuneError, match=r"x\.csv:3: completion is not UTF-8"):
        load_examples(tmp_path / "x.csv", tokenizer=deepseek, max_length=8)


def test_a_table_gives_nested_objects_only_what_they_had(tmp_path):
    datasets = pytest.importorskip("datasets")
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    turns = [{"role": "assistant", "tool_calls": [{"function": call}]} for call in calls]
    datasets.Dataset.from_list([{"messages": turns}]).save_to_disk(str(tmp_path / "saved"))
    (row,) = read_rows(tmp_path / "saved")
    assert row.values["messages"] == turns


def test_a_revision_reaches_the_hub(monkeypatch, tmp_path):
    """The one part that needs a network: what would be asked of it."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = read_rows("owner/name:test", revision="v2")
    assert row.values == {"text": "x"}
    assert asked == [("owner/name", {"split": "test", "revision": "v2"})]
