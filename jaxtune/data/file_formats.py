"""Data file formats: one reader per format, and their common rules.

In every format, keys and column names are unique, every row has all columns, text is UTF-8 (with or
without a byte-order mark) without NUL bytes, and NaN is invalid within objects and lists. An error
in a row is returned as that row's `Record`; an error in the file is raised.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import decode, is_object, parse_json

# Longer lines are not training data; the limit bounds the memory.
MAX_LINE = 64 * 2**20
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """A row before it is parsed.

    Attributes:
      file: file part of the location, ``"train.jsonl:"``.
      number: line or row number.
      content: a line of JSON, the values by key, or the error of the row.
    """

    file: str
    number: int
    content: bytes | dict[str, Any] | JaxtuneError

    @property
    def place(self) -> str:
        """Location of the row, for errors."""
        return f"{self.file}{self.number}"


def file_format(path: Path) -> str:
    """Returns the key of `FILE_FORMATS` that matches a file name, or an empty string."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSION:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_FORMATS else ""


def read_file(path: Path) -> Iterator[Record]:
    """Yields the rows of a file; a file with an unknown suffix is read as JSON lines.

    Raises:
      JaxtuneError: the file cannot be read in its format.
    """
    return FILE_FORMATS.get(file_format(path), _json_lines_of_unknown)(path)


def _open(path: Path) -> IO[bytes]:
    compression = _COMPRESSION.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 2**20)


def _name_file_in_errors(
    read: Callable[[Path], Iterator[Record]],
) -> Callable[[Path], Iterator[Record]]:
    """Decorates a reader so that errors of the operating system and of libraries name the file."""

    @functools.wraps(read)
    def checked(path: Path) -> Iterator[Record]:
        if path.exists() and not (path.is_file() or path.is_dir()):  # may keep its reader waiting
            raise JaxtuneError(f"{path}: not a regular file")
        try:
            yield from read(path)
        except JaxtuneError:
            raise
        # ArrowInvalid is a ValueError; damaged compressed files raise any of these.
        except (OSError, EOFError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise JaxtuneError(f"{path}: {reason}") from error

    return checked


def _lines(path: Path) -> Iterator[tuple[int, bytes | JaxtuneError]]:
    """Yields number and content of each non-blank line, without line end and byte-order mark.

    A line longer than `MAX_LINE` is skipped in pieces and yields an error instead of its content.
    """
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                limit = f"{MAX_LINE >> 20} MiB"
                yield number, JaxtuneError(f"{path}:{number}: line is longer than {limit}")
            elif (line := line.removeprefix(_BOM)).strip():
                yield number, line.removesuffix(b"\n").removesuffix(b"\r")


@_name_file_in_errors
def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        yield Record(f"{path}:", number, line if isinstance(line, JaxtuneError) else line.rstrip())


@_name_file_in_errors
def _json_lines_of_unknown(path: Path) -> Iterator[Record]:
    """Reads JSON lines from a file with an unknown suffix."""
    for index, record in enumerate(_json_lines(path)):
        content = record.content
        if index == 0 and isinstance(content, bytes) and not content.lstrip().startswith(b"{"):
            known = ", ".join(FILE_FORMATS)
            raise JaxtuneError(
                f"{path}: unknown file format: the suffix is none of {known} (optionally with "
                f"{' or '.join(_COMPRESSION)}) and the content is not JSON lines"
            )
        yield record


@_name_file_in_errors
def _text_lines(path: Path) -> Iterator[Record]:
    """Reads every non-blank line as a text, like `datasets`."""
    place = f"{path}:"
    for index, (number, line) in enumerate(_lines(path)):
        content: dict[str, Any] | JaxtuneError
        if isinstance(line, JaxtuneError):
            content = line
        elif index == 0 and line.startswith(b"{") and is_object(line):
            raise JaxtuneError(f"{path}: contains JSON lines, not text; rename it to .jsonl")
        else:
            try:
                text = decode(line, f"{place}{number}")
                if not text.strip():  # such as an ideographic space
                    continue
                content = _check_fields({"text": text}, f"{place}{number}")
            except JaxtuneError as error:
                content = error
        yield Record(place, number, content)


@_name_file_in_errors
def _json_file(path: Path) -> Iterator[Record]:
    """Reads an array of objects or a single object, in memory, or lines of objects."""
    with _open(path) as file:
        start = file.read(4096).lstrip(_BOM + b" \t\r\n")[:1]
    values = []
    if start == b"[" or (start == b"{" and _spans_lines(path)):
        with _open(path) as file:
            values = parse_json(file.read(), str(path), "file")
    else:
        yield from _json_lines(path)
    values = [values] if isinstance(values, dict) else values
    place = f"{path} row "
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            kind = type(value).__name__
            value = JaxtuneError(f"{place}{number}: expected an object, found {kind}")
        yield Record(place, number, value)


def _spans_lines(path: Path) -> bool:
    """Returns whether a file is a single object that spans several lines."""
    _, first = next(_lines(path))
    if isinstance(first, JaxtuneError) or is_object(first):
        return False
    with _open(path) as file:
        return is_object(file.read())


def _delimited(path: Path, delimiter: str) -> Iterator[Record]:
    """Reads a text table with a header line."""
    csv.field_size_limit(MAX_LINE)
    place = f"{path}:"
    with _open(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            columns = next(filter(None, rows), [])
            _check_columns(columns, str(path))
            if len(columns) == 1 and (others := set(",;\t|") - {delimiter}) & set(columns[0]):
                found = next(other for other in columns[0] if other in others)
                raise JaxtuneError(
                    f"{path}: a single column, {_quote(columns[0])}: the delimiter seems to be "
                    f"{found!r}, not {delimiter!r}"
                )
            for values in rows:
                number = rows.line_num
                if not "".join(values).strip() and len(values) < max(len(columns), 2):
                    continue  # a blank line
                content: dict[str, Any] | JaxtuneError
                if len(values) != len(columns):
                    few = "fewer" if len(values) < len(columns) else "more"
                    content = JaxtuneError(
                        f"{place}{number}: {few} fields than the header ({len(columns)})"
                    )
                else:
                    content = _check_fields(
                        dict(zip(columns, values, strict=True)), f"{place}{number}"
                    )
                yield Record(place, number, content)
        except csv.Error as error:
            raise JaxtuneError(f"{place}{rows.line_num}: {error}") from error


@_name_file_in_errors
def _csv(path: Path) -> Iterator[Record]:
    return _delimited(path, ",")


@_name_file_in_errors
def _tsv(path: Path) -> Iterator[Record]:
    return _delimited(path, "\t")


@_name_file_in_errors
def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    with _open(path) as file:
        whole = io.BytesIO(file.read()) if path.suffix.lower() in _COMPRESSION else file
        table = pyarrow.parquet.ParquetFile(whole)
        _check_columns(table.schema_arrow.names, str(path))
        number = 0
        for batch in table.iter_batches(batch_size=256):
            for read in _row_readers(batch):
                yield table_record(f"{path} row ", number, read)
                number += 1


def _row_readers(batch: Any) -> list[Callable[[], dict[str, Any]]]:
    """Returns a function for each row of a record batch that reads its values.

    The batch is converted at once, which is fast. If a value is invalid, such as text that is not
    UTF-8, each function converts its own row, so that only the bad rows raise.
    """
    try:
        return [functools.partial(dict, row) for row in batch.to_pylist()]
    except ValueError:
        return [functools.partial(_read_row, batch, index) for index in range(batch.num_rows)]


def _read_row(batch: Any, index: int) -> dict[str, Any]:
    return batch.slice(index, 1).to_pylist()[0]


FILE_FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text_lines,
    ".parquet": _parquet,
}


def table_record(place: str, number: int, read: Callable[[], dict[str, Any]]) -> Record:
    """Returns the record of a table row.

    Args:
      place: file part of the location.
      number: row number.
      read: returns the values by column, or raises ValueError.
    """
    try:
        values = {key: _without_nulls(value) for key, value in read().items()}
    except UnicodeDecodeError as error:
        return Record(place, number, JaxtuneError(f"{place}{number}: not UTF-8 ({error.reason})"))
    except ValueError as error:
        return Record(place, number, JaxtuneError(f"{place}{number}: {error}"))
    return Record(place, number, values)


def _without_nulls(value: Any) -> Any:
    """Removes None from nested objects, because in a table every object has the keys of all.

    Raises:
      ValueError: an object or a list contains NaN or infinity, which are not valid JSON.
    """
    if isinstance(value, dict):
        inside = {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    elif isinstance(value, list):
        inside = [_without_nulls(inner) for inner in value]
    else:
        return value
    for inner in inside.values() if isinstance(inside, dict) else inside:
        if isinstance(inner, float) and not math.isfinite(inner):
            raise ValueError(f"contains {inner}, which is not valid JSON")
    return inside


def _check_columns(names: Sequence[str], place: str) -> None:
    """Raises if two columns have the same name or a name is not text; names may be empty."""
    for index, name in enumerate(names):
        if not _is_text(name):
            raise JaxtuneError(f"{place}: the column names are not UTF-8 text")
        if name and name in names[:index]:
            raise JaxtuneError(f"{place}: duplicate column {_quote(name)}")


def _quote(name: str) -> str:
    """Returns a name in double quotes, escaped to a single line."""
    return json.dumps(name, ensure_ascii=False)


def _is_text(value: str) -> bool:
    """Returns whether a string is valid UTF-8 without NUL."""
    return "\0" not in value and _fits_utf8(value)


def _check_fields(values: dict[str, str], place: str) -> dict[str, Any] | JaxtuneError:
    """Returns the fields of a text row, or the error of one of them."""
    for name, value in values.items():
        if "\0" in value:
            return JaxtuneError(
                f"{place}: {name} contains a NUL byte; is the file UTF-16 or binary?"
            )
        if not _fits_utf8(value):
            return JaxtuneError(f"{place}: {name} is not UTF-8")
    return values


def _fits_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # an invalid byte, which the reader has decoded as a surrogate
        return False
    return True
