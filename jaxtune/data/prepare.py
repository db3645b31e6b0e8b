"""Prepares data sets: tokenizes rows into examples on disk, optionally cached for later runs."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.chats.clock import printed_values
from jaxtune.data.encode import Chunk, Encoder, Problem
from jaxtune.data.examples import META, Examples, ExamplesWriter, open_examples
from jaxtune.data.file_formats import Record
from jaxtune.data.in_memory import PREFIX
from jaxtune.data.settings import DataSettings
from jaxtune.data.sources import Source, absolute_sources, find_sources
from jaxtune.errors import JaxtuneError
from jaxtune.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Increment whenever the same rows give other examples, so that older caches are not used.
CACHE_VERSION = 2
_CHUNK_ROWS, _CHUNK_BYTES = 128, 2**20  # upper bounds of a chunk, the unit of work of a process
_Chunks = Iterator[tuple[list[Record], str, str]]  # arguments of `Encoder.__call__`


def load_examples(
    source: str | Path,
    settings: DataSettings,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    revision: str | None = None,
    progress: bool = True,
    cache: str | Path | None = None,
    keep: bool = False,
    workers: int = 1,
    problems: list[Problem] | None = None,
    rows: Mapping[str, Any] | None = None,
) -> Examples:
    """Reads, renders and tokenizes a data set.

    Args:
      source: entries in the syntax of `find_sources`.
      settings: settings that the tokens and targets depend on.
      tokenizer: a fast tokenizer; None if all rows have input_ids and labels.
      revision: commit, tag or branch of hub ids.
      progress: whether to show a progress bar on a terminal.
      cache: directory of prepared data sets; one with the same content, tokenizer and settings is
        used if it exists. None: no cache.
      keep: whether to write the data set to the cache.
      workers: number of processes that tokenize; 1: this process only.
      problems: list to which rejected rows are appended instead of raising an error.
      rows: rows in memory, which are never cached; see `find_sources`.

    Raises:
      JaxtuneError: a row cannot be read or rendered, has no targets, is too long or contains ids
        outside the vocabulary, and the message names the row; or there are no examples.
    """
    sources = find_sources(source, revision=revision, rows=rows)
    encoder = Encoder(settings, tokenizer)
    weights = [entry.weight for entry in sources]
    place = None
    if cache and not any(entry.name.startswith(PREFIX) for entry in sources):
        place = Path(cache).expanduser() / cache_key(sources, settings, tokenizer)
    if place is not None and (place / META).is_file():
        logger.info("%s: using the tokenized data in %s", source, place)
        try:
            return open_examples(place, weights)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise JaxtuneError(f"{place}: damaged cache, remove it: {error}") from error
    build = _DatasetBuilder(str(source), sources, encoder, progress, problems)
    if place is None or not keep:
        # Memory-mapped files stay readable after they are deleted.
        with tempfile.TemporaryDirectory(prefix="jaxtune-") as temporary:
            build.run(Path(temporary), workers)
            return open_examples(Path(temporary), weights)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    try:
        build.run(temporary, workers)
        shutil.rmtree(place, ignore_errors=True)  # an existing directory is incomplete
        with contextlib.suppress(OSError):  # another process has just written the same data
            temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_examples(place, weights)


def default_cache() -> Path:
    """Returns the default of ``data.cache``, the directory of prepared data sets."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jaxtune" / "data"


def cache_key(
    sources: Sequence[Source], settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None
) -> str:
    """Returns a hash of everything that the tokens and targets of a data set depend on."""
    reading = settings.reading(tokenizer)
    described: dict[str, Any] = dataclasses.asdict(settings) | {
        "version": CACHE_VERSION,
        "sources": [(absolute_sources(source.name), source.digest()) for source in sources],
        "wordings": reading.wordings,
    }
    # Templates and wordings are identified by content, the clock by the values that are printed.
    for name in ("chat_template", "template_text", "prompt_templates", "clock"):
        del described[name]
    if tokenizer is not None and reading.template is not None:
        backend: Any = tokenizer.backend_tokenizer
        template = reading.template.source or tokenizer.chat_template
        described |= {
            "tokenizer": backend.to_str(),
            "special": tokenizer.special_tokens_map,
            "template": template,
            # Not the clock itself, or a cache would be valid for a single second.
            "clock": printed_values(str(template), clock) if (clock := settings.clock) else {},
        }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _DatasetBuilder:
    """Builds a data set and counts the changes to its rows.

    Rows are read here and tokenized in chunks by a pool; chunks come back in order and are appended
    to the files, so the memory needed does not depend on the size of the data.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        encoder: Encoder,
        progress: bool,
        problems: list[Problem] | None,
    ):
        self._name, self._sources, self._encoder = name, sources, encoder
        self._progress, self._problems = progress, problems
        self._rejected: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        self._turns: collections.Counter[str] = collections.Counter()
        self._ends: collections.Counter[int] = collections.Counter()
        self._unread: set[str] = set()
        self._merged_place = ""
        self._files: dict[str, int] = {}

    def run(self, directory: Path, workers: int) -> None:
        """Writes the examples of all sources to a directory."""
        writer, parts, read = ExamplesWriter(directory), [], 0
        with _encoder_pool(self._encoder, workers) as encode:
            for source in self._sources:
                chunks, found = _split_into_chunks(
                    self._with_progress(source.records(), source.name), self._encoder
                )
                count = 0
                for chunk in encode(chunks):
                    count += self._add(chunk, writer, read)
                    read += chunk.read
                form = found[0][0] if found else ""
                parts.append((source.name, form, count))
                if count:
                    logger.info("%s: row format %s", source.name, form)
        if not sum(count for _, _, count in parts):
            self._raise_empty()
        tokenizer = self._encoder.tokenizer
        special = [] if tokenizer is None else sorted(tokenizer.added_tokens_decoder)
        writer.finish(
            {
                "files": list(self._files),
                "parts": parts,
                "dropped": self._counts["drop"],
                "truncated": self._counts["truncate"],
                "windows": self._counts["windows"],
                "windowed": self._counts["windowed"],
                "rows_read": read,
                "merged": self._counts["merged"],
                "merged_place": self._merged_place,
                "unread": sorted(self._unread),
                "turns": self._turns,
                "rejected": self._rejected,
                "special": special,
                "ends": sorted(self._ends.items()),
            }
        )

    def _add(self, chunk: Chunk, writer: ExamplesWriter, read: int) -> int:
        """Writes the examples of a chunk and returns their number; `read` rows came before it."""
        for problem in chunk.problems:
            self._handle_problem(problem)
        self._counts.update(chunk.counts)
        self._counts["merged"] += len(chunk.merged)
        self._merged_place = self._merged_place or next(iter(chunk.merged), "")
        self._turns.update(chunk.turns)
        self._ends.update(chunk.ends)
        self._unread |= chunk.unread
        ids = [self._files.setdefault(file, len(self._files)) for file in chunk.files]
        writer.add(
            chunk.tokens,
            chunk.targets,
            lengths=np.array(chunk.lengths, np.int64),
            contents=np.array(chunk.contents, np.uint64),
            file_ids=np.array(ids, np.int32),
            numbers=np.array(chunk.numbers, np.int64),
            rows=np.array(chunk.rows, np.int64) + read,
        )
        return len(chunk.lengths)

    def _handle_problem(self, problem: Problem) -> None:
        """Collects, logs or raises a rejected row, as the settings require."""
        settings = self._encoder.settings
        self._rejected[problem.reason] += 1
        if self._problems is not None:
            self._problems.append(problem)
            return
        if settings.bad_rows == "error" or problem.long:
            raise JaxtuneError(problem.message)
        if self._rejected.total() > settings.bad_rows_limit:
            raise JaxtuneError(
                f"{problem.message} (more than data.bad_rows_limit={settings.bad_rows_limit} rows "
                "are bad)"
            )
        logger.warning("skipped row: %s", problem.message)

    def _raise_empty(self) -> None:
        settings, dropped, rejected = self._encoder.settings, self._counts["drop"], self._rejected
        why = ""
        if dropped:
            limit = settings.max_length
            why = f": all {dropped} rows exceed data.max_length={limit} and were dropped"
        elif rejected:
            why = f": all {rejected.total()} rows are bad, e.g.: {next(iter(rejected))}"
        raise JaxtuneError(f"{self._name}: no examples{why}")

    def _with_progress(self, records: Iterator[Record], name: str) -> Iterator[Record]:
        """Yields the records unchanged and counts them with a progress bar."""
        with track(None, f"reading {name}", self._progress) as advance:
            for record in records:
                advance()
                yield record


def _split_into_chunks(
    records: Iterator[Record], encoder: Encoder
) -> tuple[_Chunks, list[tuple[str, str]]]:
    """Splits the rows of a source into chunks of bounded size.

    The format of a source is that of its first row with a format. It becomes known while chunks are
    produced, so it is also appended to a list.

    Returns:
      An iterator of chunks, each with the format and the location of the first row that has it; and
      the list, which is empty until the format is known and then holds the same pair.
    """
    found: list[tuple[str, str]] = []

    def chunk(rows: list[Record]) -> tuple[list[Record], str, str]:
        return (rows, *found[0]) if found else (rows, "", "")

    def cut() -> _Chunks:
        rows: list[Record] = []
        size = 0
        for record in records:
            if not found and (form := encoder.detect_format(record)):
                found.append((form, record.place))
            rows.append(record)
            size += len(record.content) if isinstance(record.content, bytes) else 4096
            if len(rows) == _CHUNK_ROWS or size > _CHUNK_BYTES:
                yield chunk(rows)
                rows, size = [], 0
        if rows:
            yield chunk(rows)

    return cut(), found


_encoder: Encoder | None = None  # set in worker processes only


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    # Ctrl-C and a launcher's SIGTERM reach all processes of a group; the parent ends this one.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The worker processes already use all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    """Ends this process when its parent is killed; it would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(*arguments: Any) -> Chunk:
    assert _encoder is not None
    return _encoder(*arguments)


@contextlib.contextmanager
def _encoder_pool(encoder: Encoder, workers: int) -> Iterator[Callable[[_Chunks], Iterator[Chunk]]]:
    """Yields a function that tokenizes chunks in order, in threads or in worker processes.

    The function keeps up to `in_flight` chunks submitted and returns the oldest result first.
    """
    pool: concurrent.futures.Executor
    work: Callable[..., Chunk]
    if workers <= 1:
        # The tokenizer releases the GIL: one thread renders while the other one tokenizes.
        pool, work, in_flight = concurrent.futures.ThreadPoolExecutor(2), encoder, 2
    else:
        pool = concurrent.futures.ProcessPoolExecutor(
            workers,
            # A forked process would inherit locks that threads of this process hold.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(encoder,),
        )
        work, in_flight = _encode_in_worker, 2 * workers

    def encode(chunks: _Chunks) -> Iterator[Chunk]:
        waiting: collections.deque[concurrent.futures.Future[Chunk]] = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(work, *chunk))
            # The queue is bounded so that memory does not grow with the size of the files.
            if len(waiting) > in_flight:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield encode
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
