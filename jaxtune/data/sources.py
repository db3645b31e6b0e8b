"""Where rows come from: files by their suffix, globs of them, saved data sets and hub ids, each
with a weight."""

from __future__ import annotations

import csv
import dataclasses
import functools
import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxtune.errors import JaxtuneError, closest

# A line that goes on for longer is no row of text to train on, and must not fill the memory.
MAX_LINE = 64 * 2**20
# Far below Python's own limit, which what renders and hashes a row would meet at other depths.
MAX_DEPTH = 100
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_WEIGHTED = re.compile(r"(?P<name>.+)@(?P<weight>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


class Record(NamedTuple):
    """One row before it is understood.

    Attributes:
      file: what its place begins with, ``"train.jsonl:"``; the number follows.
      number: of the line or row.
      content: a line of JSON as it is in the file, the values by key, or what is wrong with it.
    """

    file: str
    number: int
    content: bytes | dict[str, Any] | JaxtuneError

    @property
    def place(self) -> str:
        """What to call the row in an error."""
        return f"{self.file}{self.number}"


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of ``data.train``.

    Attributes:
      name: as it was written, without its weight.
      weight: how often an epoch shows each of its examples, on average.
      records: starts reading its rows, in order.
      digest: hashes all that its rows depend on, in hexadecimal.
    """

    name: str
    weight: float
    records: Callable[[], Iterator[Record]]
    digest: Callable[[], str]


def find_sources(text: str | Path, *, revision: str | None = None) -> list[Source]:
    """Finds what ``data.train`` or ``data.eval`` names.

    Args:
      text: one entry or several with commas between them. An entry is a file (.jsonl, .json, .csv
        or .parquet, also with .gz or .zst; JSON lines under any other name), a pattern such as
        ``"part-*.jsonl"``, a directory written by `datasets.Dataset.save_to_disk`, or a hub id. A
        directory or an id takes a split as a suffix, ``"owner/name:test"``; without one it is
        ``train``. ``@2`` behind an entry shows each of its examples twice an epoch, ``@0.5`` half
        of them.
      revision: commit, tag or branch of hub ids.

    Raises:
      JaxtuneError: nothing there; the message names the entry and what is closest.
    """
    whole = str(text)
    if not whole.strip():
        raise JaxtuneError("no data: set data.train to a JSONL file or a data set's hub id")
    entries = [whole] if _exists(whole) else whole.split(",")
    return [_find(entry.strip(), revision) for entry in entries if entry.strip()]


def _find(entry: str, revision: str | None) -> Source:
    name, weight = entry, 1.0
    if (match := _WEIGHTED.fullmatch(entry)) and not _exists(entry):
        name, weight = match["name"], float(match["weight"])
        if weight <= 0:
            raise JaxtuneError(f"{entry}: a weight is above 0; leave the entry out instead")
    try:
        path = Path(name).expanduser()
        is_file = path.is_file() or path.is_char_device()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JaxtuneError(f"{name[:100]}: {reason}") from error
    if is_file:
        return _files(name, weight, [path])
    if glob.has_magic(name):
        root = Path(path.anchor or ".")
        pattern = str(path.relative_to(root) if path.is_absolute() else path)
        paths = sorted(found for found in root.glob(pattern) if found.is_file())
        if not paths:
            raise JaxtuneError(f"{name}: no file matches")
        return _files(name, weight, paths)
    stem, split = (str(path), "") if path.is_dir() else _split_of(name)
    local = _format_of(path) or name.startswith(("/", "./", "../", "~"))
    if local and not Path(stem).is_dir():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise JaxtuneError(f"{name}: no such file{closest(path.name, there)}")
    load = functools.cache(lambda: _load_dataset(stem, split or "train", revision))
    # Arrow tables have a fingerprint of the files and the operations that made them.
    return Source(
        name, weight, lambda: _table_rows(stem, load()), lambda: f"{stem} {load()._fingerprint}"
    )


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    # Too long for a name, a zero byte in it, no home directory of that user.
    except (OSError, ValueError, RuntimeError):
        return False


def _split_of(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return str(Path(name).expanduser()), split


def _files(name: str, weight: float, paths: list[Path]) -> Source:
    def records() -> Iterator[Record]:
        for path in paths:
            yield from FILE_FORMATS[_format_of(path) or ".jsonl"](path)

    def digest() -> str:
        total = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    return Source(name, weight, records, digest)


def _format_of(path: Path) -> str:
    """Returns the key in `FILE_FORMATS` of a file's name, or an empty string."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_FORMATS else ""


def _open(path: Path) -> IO[bytes]:
    compression = _COMPRESSION.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 2**20)


def _reading(read: Callable[[Path], Iterator[Record]]) -> Callable[[Path], Iterator[Record]]:
    """Names the file in the errors of the operating system and of the libraries."""

    @functools.wraps(read)
    def checked(path: Path) -> Iterator[Record]:
        try:
            yield from read(path)
        except JaxtuneError:
            raise
        # ArrowInvalid is a ValueError; damaged compressed files give any of these.
        except (OSError, EOFError, ValueError, csv.Error) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise JaxtuneError(f"{path}: {reason}") from error

    return checked


@_reading
def _json_lines(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        number, place = 0, f"{path}:"
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                problem = JaxtuneError(f"{place}{number}: a line of over {MAX_LINE >> 20} MiB")
                yield Record(place, number, problem)
            elif line.strip():
                yield Record(place, number, line.rstrip())


@_reading
def _json(path: Path) -> Iterator[Record]:
    """Reads an array of objects, which is held whole, or lines of objects."""
    with _open(path) as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not start.startswith(b"["):
            yield from _json_lines(path)
            return
    with _open(path) as file:
        values = parse_json(file.read(), str(path))
    for number, value in enumerate(values):
        if isinstance(value, dict):
            yield Record(f"{path} row ", number, value)
        else:
            kind = type(value).__name__
            yield Record(
                f"{path} row ", number, JaxtuneError(f"{path} row {number}: no object but {kind}")
            )


@_reading
def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_LINE)
    with _open(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        rows, place = csv.DictReader(text, strict=True), f"{path}:"
        for values in rows:
            content: dict[str, Any] | JaxtuneError = values
            if None in values:
                fields = len(rows.fieldnames or ())
                content = JaxtuneError(
                    f"{place}{rows.line_num}: more fields than the {fields} named"
                )
            yield Record(place, rows.line_num, content)


@_reading
def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    with _open(path) as file:
        whole = io.BytesIO(file.read()) if path.suffix.lower() in _COMPRESSION else file
        number = 0
        for batch in pyarrow.parquet.ParquetFile(whole).iter_batches(batch_size=256):
            for values in batch.to_pylist():
                yield Record(f"{path} row ", number, _without_nulls(values))
                number += 1


FILE_FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def parse_json(text: bytes, place: str) -> Any:
    """Returns what JSON in UTF-8 says.

    Raises:
      JaxtuneError: it is no JSON, names a key twice, or is nested too deep.
    """
    try:
        value = json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
            _check_depth(value)
        return value
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line"
        raise JaxtuneError(f"{place}: not UTF-8 ({where}: {error.reason})") from error
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise JaxtuneError(f"{place}: broken JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise JaxtuneError(f"{place}: JSON is nested too deep") from error
    except ValueError as error:
        raise JaxtuneError(f"{place}: broken JSON: {error}") from error


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return
    raise RecursionError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(k for k in keys if keys.count(k) > 1)}" is there twice')
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _load_dataset(name: str, split: str, revision: str | None) -> Any:
    # Imported here because it takes seconds, which a JSONL file need not wait for.
    import datasets

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, split=split, revision=revision)
    # The library raises whatever the network, the hub and the file parsers raise.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise JaxtuneError(f"{name}: no such file, and no data set: {reason}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise JaxtuneError(
                f'{name}: no split "{split}"{closest(split, map(str, rows))} '
                f"(there: {', '.join(map(str, rows))}; choose one with {name}:SPLIT)"
            )
        rows = rows[split]
    return rows


def _table_rows(name: str, rows: Any) -> Iterator[Record]:
    for number, values in enumerate(rows):
        yield Record(f"{name} row ", number, _without_nulls(dict(values)))


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Takes out of nested objects what is None: a table gives each the keys of all others."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if inner is not None}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    return {key: strip(value) for key, value in values.items()}
