"""Rows from a JSONL file, a directory that `datasets` saved, or a data set's hub id."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from jaxtune.errors import JaxtuneError, closest

_FILE_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row as it was read: its place (``"train.jsonl:17"``) and its values by key."""

    place: str
    values: dict[str, Any]


def read_rows(source: str | Path, *, revision: str | None = None) -> Iterator[Row]:
    """Yields the rows of `source` in order.

    Args:
      source: a JSONL file; or a directory written by `datasets.Dataset.save_to_disk`; or a hub id.
        A directory or an id takes a split as a suffix, ``"owner/name:test"``; without one it is
        ``train``.
      revision: commit, tag or branch of a hub id.

    Raises:
      JaxtuneError: nothing there, or a line that is no JSON object; the message names the line.
    """
    path = Path(source).expanduser()
    if not str(source):
        raise JaxtuneError("no data: set data.train to a JSONL file or a data set's hub id")
    if path.is_file():
        return _read_jsonl(path)
    name, split = (str(path), "") if path.is_dir() else _split_of(str(source))
    local = path.suffix in _FILE_SUFFIXES or str(source).startswith(("/", "./", "../", "~"))
    if local and not Path(name).is_dir():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise JaxtuneError(f"{source}: no such file{closest(path.name, there)}")
    return _read_dataset(name, split or "train", revision)


def _split_of(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return str(Path(name).expanduser()), split


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise JaxtuneError(f"{path}: {error.strerror}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise JaxtuneError(
                f"{place}: not UTF-8 (byte {error.start + 1} of the line: {error.reason})"
            ) from error
        if text.strip():
            yield Row(place, _parse_line(text, place))


def _parse_line(text: str, place: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise JaxtuneError(f"{place}: broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise JaxtuneError(f"{place}: JSON is nested too deep") from error
    except ValueError as error:
        raise JaxtuneError(f"{place}: broken JSON: {error}") from error
    if not isinstance(values, dict):
        raise JaxtuneError(
            f"{place}: expected one JSON object a line (JSONL), found {type(values).__name__}"
        )
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'key "{next(k for k in keys if keys.count(k) > 1)}" is there twice')
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_dataset(name: str, split: str, revision: str | None) -> Iterator[Row]:
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
    for index, values in enumerate(rows):
        yield Row(f"{name} row {index}", dict(values))
