"""Rows of data files, parsed into values by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtune.data.file_formats import Record
from jaxtune.data.sources import find_sources
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import parse_json


@dataclasses.dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
      place: location, ``"train.jsonl:17"``.
      values: values by key.
    """

    place: str
    values: dict[str, Any]


def read_rows(source: str | Path, *, revision: str | None = None) -> Iterator[Row]:
    """Yields the rows of a data set in order.

    Args:
      source: entries in the syntax of `find_sources`; weights are ignored.
      revision: commit, tag or branch of hub ids.

    Raises:
      JaxtuneError: a source does not exist, or a line is not a JSON object.
    """
    sources = find_sources(source, revision=revision)
    return (parse_row(record) for source in sources for record in source.records())


def parse_row(record: Record) -> Row:
    """Parses a record.

    Raises:
      JaxtuneError: the record is not a valid row; the message gives its location.
    """
    content, place = record.content, record.place
    if isinstance(content, JaxtuneError):
        raise content
    values = parse_json(content, place) if isinstance(content, bytes) else content
    if not isinstance(values, dict):
        raise JaxtuneError(
            f"{place}: expected one JSON object per line (JSONL), found {type(values).__name__}"
            f"{'; a file with a single array needs the suffix .json' * isinstance(values, list)}"
        )
    return Row(place, values)
