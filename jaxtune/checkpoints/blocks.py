"""Hashes of files in fixed blocks, computed in a thread while the files are read.

A resume must notice a single changed bit anywhere in a checkpoint, without a second pass over it.
Reading a part of a file therefore reports the range (`BlockHashes.touched`), and every block that
a process reads is hashed once, whole, while its pages are in memory. One of several processes may
read few rows of each tensor: it hashes a block only after reading half of it, so that no process
reads much more than it loads. The remaining blocks are divided among the processes at the end.

XXH3 (128 bits) is as fast as memory, so another core hashes without slowing the reading. It is not
a cryptographic hash: it detects damage and confusion. Whoever forges a checkpoint on purpose can
also change the record that it is compared with.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from jaxtune.checkpoints.source import check_length
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import gather, process_count, process_index

BLOCK = 2**24  # bytes
DIGEST = 16  # bytes
_GATHERED = 4096  # blocks that are exchanged at a time


class BlockHashes:
    """The hashes of the blocks of some files; a context manager.

    Attributes:
      seconds: time that the thread has spent hashing.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        block: int = BLOCK,
        maps: Mapping[str, mmap.mmap] | None = None,
    ):
        """Opens the files; nothing is hashed yet.

        Args:
          paths: files by name.
          block: size of a block in bytes; the last block of a file may be smaller.
          maps: memory maps of files that are open already, by name, so that the hashed bytes are
            the ones that are loaded even if a file has been replaced.
        """
        self.seconds = 0.0
        self._alone = process_count() == 1
        self._paths, self._block = dict(paths), block
        self._open = contextlib.ExitStack()
        self._maps = dict(maps or {})
        self._views: dict[str, memoryview] = {}
        self._first: dict[str, int] = {}  # number of the first block of each file
        count = 0
        for name, path in self._paths.items():
            self._views[name] = self._view(name, path)
            self._first[name] = count
            count += -(-len(self._views[name]) // block)
        self._started = np.zeros(count, np.uint8)
        self._read = np.zeros(count, np.int64)  # bytes of each block, once per read
        self._digests = np.zeros((count, DIGEST), np.uint8)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._running: list[Future[None]] = []

    def _view(self, name: str, path: Path) -> memoryview:
        if name not in self._maps:
            try:
                with path.open("rb") as file:
                    if not path.stat().st_size:
                        return memoryview(b"")
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise JaxtuneError(f"{path}: cannot read: {error.strerror}") from error
            self._open.callback(self._maps[name].close)
        view = memoryview(self._maps[name])
        self._open.callback(view.release)
        return view

    def __enter__(self) -> BlockHashes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._open.close()

    def touched(self, name: str, start: int, stop: int) -> None:
        """Hashes, in the background, the blocks that a range belongs to, if not hashed yet.

        With several processes, this waits until half of a block has been read.

        Args:
          name: name of the file.
          start: first byte of the range.
          stop: last byte + 1.
        """
        first, block = self._first[name], self._block
        size = len(self._views[name])
        for number in range(start // block, -(-stop // block)):
            begin, end = number * block, min((number + 1) * block, size)
            self._read[first + number] += min(stop, end) - max(start, begin)
            if self._alone or 2 * self._read[first + number] >= end - begin:
                self._submit(name, number)

    def _submit(self, name: str, number: int) -> None:
        flat = self._first[name] + number
        if not self._started[flat]:
            self._started[flat] = 1
            self._running.append(self._thread.submit(self._hash, name, number))

    def _hash(self, name: str, number: int) -> None:
        begin = time.perf_counter()
        start = number * self._block
        check_length(self._paths[name], self._maps[name])
        with self._views[name][start : start + self._block] as content:
            digest = _digest(content)
        self._digests[self._first[name] + number] = np.frombuffer(digest, np.uint8)
        self.seconds += time.perf_counter() - begin

    def complete(self) -> dict[str, list[str]]:
        """Returns the hashes of all blocks, hexadecimal and in order, by name of the file.

        Every process calls it, with the same files. Blocks that none has hashed yet are hashed
        now, each by one process.

        Raises:
          JaxtuneError: the processes have files of other names or sizes, or have read different
            bytes, or a file has become shorter.
        """
        self._check_files()
        done = self._merged()
        missing = np.flatnonzero(done == 0)
        for flat in missing[process_index() :: process_count()]:
            name = self._file_of(int(flat))
            self._submit(name, int(flat) - self._first[name])
        self._merged()
        return {name: self._hashes_of(name) for name in self._paths}

    def _check_files(self) -> None:
        """Raises unless the files of all processes have the same names and sizes."""
        listed = repr([(name, len(view)) for name, view in self._views.items()])
        own = np.frombuffer(xxhash.xxh3_128_digest(listed.encode()), np.uint8)
        for process, other in enumerate(gather(own)):
            if not np.array_equal(other, own):
                raise JaxtuneError(
                    f"the files of the base model differ between process {process_index()} and "
                    f"process {process}"
                )

    def _merged(self) -> np.ndarray:
        """Waits for the thread and takes over the hashes of the other processes.

        Returns:
          uint8 [blocks], nonzero where any process has hashed the block.
        """
        self._finish_running()
        for start in range(0, len(self._started), _GATHERED):
            part = slice(start, start + _GATHERED)
            packed = np.concatenate([self._started[part, None], self._digests[part]], axis=1)
            everyone = gather(packed)
            try:
                merged = merge(everyone[..., 0], everyone[..., 1:])
            except ValueError as error:
                name = self._file_of(start + int(error.args[0]))
                raise JaxtuneError(
                    f"{self._paths[name]}: two processes have read different bytes of it"
                ) from error
            self._started[part], self._digests[part] = everyone[..., 0].max(axis=0), merged
        return self._started

    def _finish_running(self) -> None:
        """Waits for the thread; raises its error, and in the other processes that there is one."""
        errors = [error for hashed in self._running if (error := hashed.exception())]
        self._running.clear()
        failed = gather(np.array([len(errors)], np.int32))
        if errors:
            raise errors[0]
        if failed.any():
            raise JaxtuneError(
                f"process {int(failed[:, 0].argmax())} cannot read the base model; see its message"
            )

    def _file_of(self, flat: int) -> str:
        return next(name for name in reversed(self._first) if self._first[name] <= flat)

    def _hashes_of(self, name: str) -> list[str]:
        count = -(-len(self._views[name]) // self._block)
        first = self._first[name]
        return [bytes(self._digests[first + number]).hex() for number in range(count)]


def merge(done: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Returns the digest of each block from the processes that have hashed it.

    Args:
      done: uint8 [processes, blocks], nonzero where a process has hashed a block.
      digests: uint8 [processes, blocks, 16].

    Returns:
      uint8 [blocks, 16], zero for blocks that none has hashed.

    Raises:
      ValueError: two processes disagree; the argument is the index of the block.
    """
    first = done.argmax(axis=0)  # a process that has the block, if any has
    merged = digests[first, np.arange(done.shape[1])]
    differs = (done != 0) & np.not_equal(digests, merged).any(axis=2)
    blocks = np.flatnonzero(differs.any(axis=0))
    if len(blocks):
        raise ValueError(int(blocks[0]))
    return np.where(done.max(axis=0)[:, None] > 0, merged, 0).astype(np.uint8)


def hash_file(path: Path, block: int = BLOCK) -> list[str]:
    """Returns the hashes of the blocks of a file, read by this process alone."""
    hashes = []
    with path.open("rb") as file:
        while content := file.read(block):
            hashes.append(_digest(content).hex())
    return hashes


def _digest(content: bytes | memoryview) -> bytes:
    """Returns XXH3 of some bytes; other threads run meanwhile.

    The function for one call, ``xxh3_128_digest``, holds the interpreter lock in xxhash 3.5.
    """
    state = xxhash.xxh3_128()
    state.update(content)
    return state.digest()


def first_difference(
    old: Sequence[str], new: Sequence[str], size: int, block: int
) -> tuple[int, int] | None:
    """Returns the bytes (first, last) of the first block whose hashes differ, or None."""
    for number, (one, other) in enumerate(zip(old, new, strict=True)):
        if one != other:
            return number * block, min((number + 1) * block, size) - 1
    return None
