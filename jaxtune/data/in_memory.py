"""Rows in memory as a data source, next to files and data sets."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtune.config import DataConfig
from jaxtune.data.file_formats import Record, table_record
from jaxtune.errors import JaxtuneError, shown

PREFIX = "memory:"
"""Start of the names of rows in memory, in ``data.train`` and ``data.eval``."""


def in_memory(data: DataConfig) -> bool:
    """Returns whether a ``data`` section names rows in memory, which cannot be read again."""
    return PREFIX in data.train or PREFIX in data.eval


def check_rows(name: str, rows: Any) -> None:
    """Raises if rows cannot be read repeatedly, in order.

    Args:
      name: name of the argument, for messages.
      rows: a list of dicts or a `datasets.Dataset`.

    Raises:
      JaxtuneError: `rows` is something else.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # iterates over names of columns
        raise JaxtuneError(f'{name} is a DataFrame: pass its rows, .to_dict("records")')
    if isinstance(rows, Mapping):  # a DatasetDict is one
        known = ", ".join(map(str, rows))
        raise JaxtuneError(f'{name} is one data set, such as {name}["train"] (found: {known})')
    if (
        isinstance(rows, (str, bytes))
        or not hasattr(rows, "__len__")
        or not hasattr(rows, "__iter__")
    ):
        raise JaxtuneError(
            f"{name} is a list of dicts or a datasets.Dataset, not {type(rows).__name__}"
        )


def read_records(name: str, rows: Any) -> Iterator[Record]:
    """Yields the rows of a list of dicts or a `datasets.Dataset` as records.

    Args:
      name: name of the rows, for locations such as ``"memory:train row 3"``.
      rows: the rows.
    """
    place = f"{name} row "
    table = hasattr(rows, "with_format")
    for number, values in enumerate(rows.with_format(None) if table else rows):
        if not isinstance(values, Mapping):
            kind = type(values).__name__
            error = JaxtuneError(f"{place}{number}: expected a dict, found {kind}")
            yield Record(place, number, error)
        elif other := [key for key in values if not isinstance(key, str)]:
            error = JaxtuneError(f"{place}{number}: keys are texts, not {shown(other[0])}")
            yield Record(place, number, error)
        elif table:
            # Every row of a table has the keys of all, some with None.
            yield table_record(place, number, functools.partial(dict, values))
        else:
            yield Record(place, number, dict(values))
