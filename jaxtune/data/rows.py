"""Rows as values by key, each with its place."""

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
    """One row as it was read: its place (``"train.jsonl:17"``) and its values by key."""

    place: str
    values: dict[str, Any]


def read_rows(source: str | Path, *, revision: str | None = None) -> Iterator[Row]:
    """Yields the rows of `source` in order.

    Args:
      source: what `find_sources` takes; weights count for nothing here.
      revision: commit, tag or branch of hub ids.

    Raises:
      JaxtuneError: nothing there, or a line that is no JSON object; the message names the line.
    """
    sources = find_sources(source, revision=revision)
    return (parse_row(record) for source in sources for record in source.records())


def parse_row(record: Record) -> Row:
    """Returns the row that a record holds.

    Raises:
      JaxtuneError: it holds none; the message names its place.
    """
    content, place = record.content, record.place
    if isinstance(content, JaxtuneError):
        raise content
    values = parse_json(content, place) if isinstance(content, bytes) else content
    if not isinstance(values, dict):
        raise JaxtuneError(
            f"{place}: expected one JSON object a line (JSONL), found {type(values).__name__}"
            f"{'; name a file that is one array .json' * isinstance(values, list)}"
        )
    return Row(place, values)
