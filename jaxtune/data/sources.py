"""Where rows come from: files by their suffix, globs of them, saved data sets and hub ids, each
with a weight."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtune.data.file_formats import FILE_FORMATS, Record, file_format, read_file, table_record
from jaxtune.errors import JaxtuneError, closest

logger = logging.getLogger(__name__)

_REGISTRY = "dataset_info.json"
# In the name of a file: not what is trained on.
_OTHER_SPLIT = re.compile(
    r"(?<![a-z])(test|valid|validation|val|dev|eval|heldout|held-out)(?![a-z])"
)
_WEIGHTED = re.compile(r"(?P<name>.+)@(?P<weight>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


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
      text: one entry or several with commas between them. An entry is a file (.jsonl, .json, .csv,
        .tsv, .txt or .parquet, also with .gz or .zst; JSON lines under any other name), a pattern
        such as ``"part-*.jsonl"``, a directory of files or one that
        `datasets.Dataset.save_to_disk` wrote, or a hub id. A data set takes a split as a suffix,
        ``"owner/name:test"``; without one it is ``train``. ``@2`` behind an entry shows each of its
        examples twice an epoch, ``@0.5`` half of them.
      revision: commit, tag or branch of hub ids.

    Raises:
      JaxtuneError: nothing there; the message names the entry and what is closest.
    """
    whole = str(text)
    if not whole.strip():
        raise JaxtuneError("no data: set data.train to a JSONL file or a data set's hub id")
    entries = [whole] if path_exists(whole) else whole.split(",")
    return [_find_source(entry.strip(), revision) for entry in entries if entry.strip()]


def _find_source(entry: str, revision: str | None) -> Source:
    name, weight = entry, 1.0
    if (match := _WEIGHTED.fullmatch(entry)) and not path_exists(entry):
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
        return _file_source(name, weight, [path])
    if glob.has_magic(name):
        root = Path(path.anchor or ".")
        pattern = str(path.relative_to(root) if path.is_absolute() else path)
        paths = sorted(found for found in root.glob(pattern) if found.is_file())
        if not paths:
            raise JaxtuneError(f"{name}: no file matches")
        return _file_source(name, weight, paths)
    if path.is_dir() and (paths := _files_in(path)):
        return _file_source(name, weight, paths)
    stem, split = (str(path), "") if path.is_dir() else _split_suffix(name)
    local = file_format(path) or name.startswith(("/", "./", "../", "~"))
    if local and not Path(stem).is_dir():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise JaxtuneError(f"{name}: no such file{closest(path.name, there)}")
    load = functools.cache(lambda: _load_dataset(stem, split or "train", revision))
    # Arrow tables have a fingerprint of the files and the operations that made them.
    return Source(
        name, weight, lambda: _table_rows(stem, load()), lambda: f"{stem} {load()._fingerprint}"
    )


def path_exists(name: str) -> bool:
    """Returns whether a file or directory has this name, whatever characters are in it."""
    try:
        return Path(name).expanduser().exists()
    # Too long for a name, a zero byte in it, no home directory of that user.
    except (OSError, ValueError, RuntimeError):
        return False


def _split_suffix(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return str(Path(name).expanduser()), split


def _is_saved_dataset(directory: Path) -> bool:
    """Returns whether `datasets` wrote a directory with save_to_disk."""
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_in(directory: Path) -> list[Path]:
    """Returns the files of rows in a directory by name, or none where `datasets` is to read it.

    Raises:
      JaxtuneError: they are not one data set.
    """
    if _is_saved_dataset(directory):
        return []
    paths = sorted(p for p in directory.iterdir() if file_format(p) and not p.name.startswith("."))
    names, kinds = [path.name for path in paths], {file_format(path) for path in paths}
    others = [name for name in names if _OTHER_SPLIT.search(name.lower())]
    if _REGISTRY in names:
        what = f"its {_REGISTRY} describes data sets"
    elif others and len(others) < len(names):
        what = f"{others[0]} has the name of another split"
    elif len(kinds) > 1:
        what = f"its files are of several kinds ({', '.join(sorted(kinds))})"
    else:
        return paths
    known = ", ".join([name for name in names if name != _REGISTRY][:5])
    raise JaxtuneError(f"{directory}: {what}: name the files to read (there: {known or 'none'})")


def _file_source(name: str, weight: float, paths: list[Path]) -> Source:
    def records() -> Iterator[Record]:
        for path in paths:
            empty = True
            for record in read_file(path):
                empty = False
                yield record
            if empty:
                logger.warning("%s: no rows", path)

    def digest() -> str:
        total = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    return Source(name, weight, records, digest)


def _load_dataset(name: str, split: str, revision: str | None) -> Any:
    # Imported here because it takes seconds, which a JSONL file need not wait for.
    import datasets

    try:
        if _is_saved_dataset(Path(name)):
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, split=split, revision=revision)
    # The library raises whatever the network, the hub and the file parsers raise.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # such as "an error occurred" with the reason behind it
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:500]
        there = Path(name).is_dir()
        what = f"no files of rows ({', '.join(FILE_FORMATS)})" if there else "no such file"
        raise JaxtuneError(f"{name}: {what}, and no data set: {reason}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise JaxtuneError(
                f'{name}: no split "{split}"{closest(split, map(str, rows))} '
                f"(there: {', '.join(map(str, rows))}; choose one with {name}:SPLIT)"
            )
        return rows[split]
    if _is_saved_dataset(Path(name)) and split not in ("train", str(rows.split)):
        raise JaxtuneError(f'{name}: has no splits, so no "{split}"')
    return rows


def _table_rows(name: str, rows: Any) -> Iterator[Record]:
    try:
        for number, values in enumerate(rows):
            yield table_record(f"{name} row ", number, functools.partial(dict, values))
    except (OSError, ValueError) as error:
        raise JaxtuneError(f"{name}: {' '.join(str(error).split())}") from error
