"""Data sources: files, glob patterns, directories, saved data sets and hub ids, with weights."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.data.file_formats import FILE_FORMATS, Record, file_format, read_file, table_record
from jaxtune.data.in_memory import PREFIX, read_records
from jaxtune.errors import JaxtuneError, closest
from jaxtune.hub import closest_path, datasets_offline, is_reachable, unreachable

logger = logging.getLogger(__name__)

_REGISTRY = "dataset_info.json"
# Words in file names that indicate a split other than train.
_OTHER_SPLIT = re.compile(
    r"(?<![a-z])(test|valid|validation|val|dev|eval|heldout|held-out)(?![a-z])"
)
_WEIGHTED = re.compile(r"(?P<name>.+)@(?P<weight>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Source:
    """An entry of ``data.train``.

    Attributes:
      name: the entry without its weight.
      weight: average number of times that an epoch shows each example.
      records: returns an iterator of the rows, in order.
      digest: returns a hexadecimal hash of the content.
    """

    name: str
    weight: float
    records: Callable[[], Iterator[Record]]
    digest: Callable[[], str]


def find_sources(
    text: str | Path, *, revision: str | None = None, rows: Mapping[str, Any] | None = None
) -> list[Source]:
    """Parses ``data.train`` or ``data.eval`` and finds its sources.

    Args:
      text: entries separated by commas. An entry is a file (.jsonl, .json, .csv, .tsv, .txt or
        .parquet, optionally with .gz or .zst; JSON lines with any other suffix), a glob pattern
        such as ``"part-*.jsonl"``, a directory of files or of `datasets.Dataset.save_to_disk`, or
        a hub id. A data set can have a split as a suffix, ``"owner/name:test"``; the default is
        ``train``. The suffix ``@2`` shows each example twice per epoch, ``@0.5`` half of them.
      revision: commit, tag or branch of hub ids.
      rows: rows in memory by their entry, which begins with ``memory:``.

    Raises:
      JaxtuneError: an entry does not exist; the message names the closest file.
    """
    whole = str(text)
    if not whole.strip():
        raise JaxtuneError("no data: set data.train to a JSONL file or the hub id of a data set")
    return [
        _memory_source(entry, rows or {})
        if entry.startswith(PREFIX)
        else _find_source(entry, revision)
        for entry in _entries(whole)
    ]


def _memory_source(entry: str, rows: Mapping[str, Any]) -> Source:
    if entry not in rows:
        raise JaxtuneError(
            f"{entry}: the run was given rows in memory; pass them to jaxtune.train again "
            "(train_data, eval_data), or name a file instead, for example with --data"
        )
    records = functools.partial(read_records, entry, rows[entry])
    return Source(entry, 1.0, records, lambda: entry)


def absolute_sources(text: str) -> str:
    """Returns sources with absolute paths for files, patterns and directories; see `find_sources`.

    Entries that name nothing on this machine, such as hub ids, are kept, and so is a text that
    would be parsed differently with absolute paths, because a directory has a comma in its name.
    """
    absolute = [_absolute(entry) for entry in _entries(text)]
    joined = ",".join(absolute)
    return joined if _entries(joined) == absolute else text


def missing_sources(text: str) -> list[str]:
    """Returns the entries of a list of sources with an absolute path that matches nothing."""
    missing = []
    for entry in _entries(text):
        name, _ = _split_weight(entry)
        if not name.startswith("/") or path_exists(name):
            continue
        stem, _, _ = name.partition(":")
        found = glob.has_magic(name) and next(glob.iglob(name, recursive=True), None)  # noqa: PTH207
        if not found and not path_exists(stem):
            missing.append(name)
    return missing


def weights_of(text: str) -> list[str]:
    """Returns the weights of a list of sources, such as ``@2``, of the entries that have one."""
    weights = (_split_weight(entry)[1] for entry in _entries(text))
    return [weight for weight in weights if weight]


def _absolute(entry: str) -> str:
    if entry.startswith(PREFIX):
        return entry
    name, weight = _split_weight(entry)
    if path_exists(name):
        return f"{Path(name).expanduser().absolute()}{weight}"
    if glob.has_magic(name):
        if name.startswith(("/", "~")):
            return entry
        return f"{Path(glob.escape(str(Path.cwd())), name)}{weight}"
    stem, colon, split = name.partition(":")
    path = Path(stem).expanduser().absolute()
    if ":" in str(path) or glob.has_magic(str(path)) or not path_exists(stem):
        return entry
    return f"{path}{colon}{split}{weight}"


def _entries(text: str) -> list[str]:
    """Returns the entries of a list of sources; a file whose name has a comma is one entry."""
    entries = [text] if path_exists(text) else text.split(",")
    return [entry.strip() for entry in entries if entry.strip()]


def _split_weight(entry: str) -> tuple[str, str]:
    """Splits an entry into its name and its weight with the ``@``, or an empty string."""
    match = None if path_exists(entry) else _WEIGHTED.fullmatch(entry)
    return (match["name"], f"@{match['weight']}") if match else (entry, "")


def _find_source(entry: str, revision: str | None) -> Source:
    name, suffix = _split_weight(entry)
    weight = float(suffix[1:] or 1)
    if weight <= 0:
        raise JaxtuneError(f"{entry}: a weight must be above 0; remove the entry instead")
    try:
        path = Path(name).expanduser()
        is_file = path.is_file()
        is_stream = path.exists() and not is_file and not path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JaxtuneError(f"{name[:100]}: {reason}") from error
    if is_file:
        return _file_source(name, weight, [path])
    if is_stream:
        raise JaxtuneError(
            f"{name}: not a file but a pipe or a device: its rows can be read once and their "
            "number is unknown, so a run could not be resumed; write them to a file"
        )
    if glob.has_magic(name) and not path.is_dir():
        root = Path(path.anchor or ".")
        pattern = str(path.relative_to(root) if path.is_absolute() else path)
        paths = sorted(found for found in root.glob(pattern) if found.is_file())
        if not paths:
            raise JaxtuneError(f"{name}: no file matches")
        return _file_source(name, weight, paths)
    if path.is_dir() and (paths := _files_in(path)):
        return _file_source(name, weight, paths)
    stem, split = (str(path), "") if path.is_dir() else _split_suffix(name)
    # The hub's ids have at most one slash and no suffix of a data file.
    local = file_format(path) or stem.count("/") > 1 or name.startswith((".", "/", "~"))
    if local and not Path(stem).is_dir():
        raise JaxtuneError(f"{name}: no such file{closest_path(path)}")
    load = functools.cache(lambda: _load_dataset(stem, split or "train", revision))
    # `datasets` derives the fingerprint of a table from its files and the operations on them.
    return Source(
        name, weight, lambda: _table_rows(stem, load()), lambda: f"{stem} {load()._fingerprint}"
    )


def path_exists(name: str) -> bool:
    """Returns whether a file or directory exists; False for an invalid path."""
    try:
        return Path(name).expanduser().exists()
    # Among others: the name is too long or has a zero byte; the user of ~user does not exist.
    except (OSError, ValueError, RuntimeError):
        return False


def _split_suffix(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return str(Path(name).expanduser()), split


def _is_saved_dataset(directory: Path) -> bool:
    """Returns whether a directory was written by `datasets.Dataset.save_to_disk`."""
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _files_in(directory: Path) -> list[Path]:
    """Returns the sorted data files of a directory; empty if `datasets` has to read it.

    Raises:
      JaxtuneError: the files are not a single data set.
    """
    if _is_saved_dataset(directory):
        return []
    paths = sorted(p for p in directory.iterdir() if file_format(p) and not p.name.startswith("."))
    names, kinds = [path.name for path in paths], {file_format(path) for path in paths}
    others = [name for name in names if _OTHER_SPLIT.search(name.lower())]
    if _REGISTRY in names:
        what = f"contains {_REGISTRY}, a list of data sets"
    elif others and len(others) < len(names):
        what = f"{others[0]} seems to be another split"
    elif len(kinds) > 1:
        what = f"contains files of several formats ({', '.join(sorted(kinds))})"
    else:
        return paths
    known = ", ".join([name for name in names if name != _REGISTRY][:5])
    raise JaxtuneError(f"{directory}: {what}; name the files to read (found: {known or 'none'})")


def _file_source(name: str, weight: float, paths: list[Path]) -> Source:
    def records() -> Iterator[Record]:
        for path in paths:
            empty = True
            for record in read_file(path):
                empty = False
                yield record
            if empty:
                logger.warning("%s: the file has no rows", path)

    def digest() -> str:
        total = hashlib.sha256()
        for path in paths:
            try:
                with path.open("rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:  # of a bad disk, without the name of the file
                raise JaxtuneError(f"{path}: cannot read: {error.strerror}") from error
        return total.hexdigest()

    return Source(name, weight, records, digest)


def _load_dataset(name: str, split: str, revision: str | None) -> Any:
    # Imported here because the import takes seconds and JSONL files do not need it.
    import datasets

    try:
        if _is_saved_dataset(Path(name)):
            rows = datasets.load_from_disk(name)
        elif Path(name).is_dir():
            rows = datasets.load_dataset(name, split=split, revision=revision)
        else:
            with datasets_offline(name):
                rows = datasets.load_dataset(name, split=split, revision=revision)
    # The network, the hub and the file parsers can raise anything.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer messages are often generic
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:500]
        what, hint = "no such file", closest_path(name)
        if Path(name).is_dir():
            what, hint = f"no data files ({', '.join(FILE_FORMATS)})", ""
        elif not is_reachable(name):
            reason = f"the hub is out of reach ({unreachable()})"
        raise JaxtuneError(f"{name}: {what} or data set: {reason}{hint}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise JaxtuneError(
                f'{name}: no split "{split}"{closest(split, map(str, rows))} '
                f"(found: {', '.join(map(str, rows))}; select one with {name}:SPLIT)"
            )
        return rows[split]
    if _is_saved_dataset(Path(name)) and split not in ("train", str(rows.split)):
        raise JaxtuneError(f'{name}: no split "{split}": the data set has no splits')
    return rows


def _table_rows(name: str, rows: Any) -> Iterator[Record]:
    try:
        for number, values in enumerate(rows):
            yield table_record(f"{name} row ", number, functools.partial(dict, values))
    except (OSError, ValueError) as error:
        raise JaxtuneError(f"{name}: {' '.join(str(error).split())}") from error
