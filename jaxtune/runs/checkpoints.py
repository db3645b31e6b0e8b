"""Checkpoints of a run's state; the only module that uses orbax-checkpoint.

A step consists of ``<step>/state/`` (written by Orbax), ``<step>/extra.json`` and
``<step>/manifest.json``. The manifest lists the size and SHA-256 of every file and is written last:
a step without a manifest is unfinished, and a step that does not match its manifest is damaged.
Orbax alone would restore a flipped byte without an error and treat an empty directory as the latest
step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from jaxtune.atomic_files import report_full_disk, write_atomically
from jaxtune.errors import JaxtuneError, closest
from jaxtune.parallel.processes import agree, leads, on_leader
from jaxtune.parallel.time_limits import TimeLimit
from jaxtune.runs.manifest import STATE, find_damage, write_manifest
from jaxtune.runs.paths import EXTRA, MANIFEST
from jaxtune.runs.quiet_saves import quiet_saves
from jaxtune.runs.stored_arrays import open_arrays, read_metadata
from jaxtune.strict_json import entry, read_object

logger = logging.getLogger(__name__)

LARGE = 2**24  # bytes of an array from which on its layers are stored separately
_NO_LIMIT = 7 * 24 * 3600  # seconds, for Orbax, which needs a number
QUARANTINE = "quarantine"
_NONE, _DAMAGED = -1, -2  # instead of the number of a step


class Checkpoints:
    """The checkpoints of a run: saved in the background, verified before they are restored.

    Every process writes and reads its own shards; only process 0 writes manifests, verifies,
    quarantines and deletes. Use it as a context manager: leaving it waits for the save in progress.

    A save passes through two threads. Orbax copies the arrays to the host before `save` returns, so
    the next step may donate them, and writes the files in its own thread. A finisher thread waits
    for Orbax, hashes the files, writes the manifest and deletes old steps. Steps whose hashes were
    compared or computed by this process are in `_verified` and are not hashed again.

    Attributes:
      directory: parent of the step directories.
      keep: number of checkpoints to keep.
      pinned: a step that is kept in addition, if any.
      timeout_minutes: longest time of a save, without the time of hashing; 0: no limit.
    """

    def __init__(self, directory: str | Path, keep: int = 2, timeout_minutes: float = 0):
        """Opens a directory of checkpoints, which the first save creates.

        Args:
          directory: parent of the step directories.
          keep: number of checkpoints to keep, at least 2 because one may turn out damaged.
          timeout_minutes: time after which a save ends the process with exit code 75; 0: none.

        Raises:
          JaxtuneError: `keep` is below 2.
        """
        if keep < 2:
            raise JaxtuneError(f"checkpoint.keep must be at least 2, not {keep}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.pinned: int | None = None
        self.timeout_minutes = timeout_minutes
        # Orbax's own limit, ten minutes by default, would turn a slow save into an error.
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.StandardCheckpointHandler(), timeout_secs=_NO_LIMIT
        )
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._verified: set[int] = set()
        self._quiet = contextlib.ExitStack()

    def __enter__(self) -> Checkpoints:
        self._quiet.enter_context(quiet_saves())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            self.wait()
        except Exception as failure:
            if kind is None:
                raise
            known = isinstance(failure, JaxtuneError)
            message = "saving a checkpoint failed while the run was stopping: %s"
            logger.error(message, failure, exc_info=None if known else failure)
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()
            self._quiet.close()

    def save(
        self,
        step: int,
        tree: Any,
        extra: Mapping[str, Any],
        export: Callable[[], Any] = lambda: None,
    ) -> None:
        """Copies a state to the host and writes it in the background.

        The arrays of `tree` may be donated after the call. The checkpoint is complete once its
        manifest is written; `poll` and `wait` raise if writing failed.

        Args:
          step: step number, the name of the directory.
          tree: pytree of arrays of any shapes and dtypes.
          extra: JSON-serializable values: position in the data, counters of the run.
          export: writes other files of the step meanwhile, within the same time limit.

        Raises:
          JaxtuneError: no space is left for this or the previous save.
        """
        self.wait()
        on_leader(self.wait)  # it hashes after the others are done, which is not limited
        target = self.directory / str(step)
        if leads() and target.exists():
            self._quarantine(step, "replaced by a new save of this step")
        text = json.dumps(dict(extra), indent=2, ensure_ascii=False)
        limit = TimeLimit(self.timeout_minutes, self._timeout_message(step))
        try:
            with report_full_disk(self.directory):
                if leads():
                    target.mkdir(parents=True)
                nested = _leaves_by_path(tree, nested=True)
                chunks = jax.tree.map(_chunks, nested)
                self._checkpointer.save(target / STATE, args=ocp.args.StandardSave(nested, chunks))
        except BaseException:
            self._discard(target)
            limit.end()
            raise
        self._pending = self._finisher.submit(self._finish, step, text, limit)
        try:
            export()
        finally:
            self._pending.add_done_callback(lambda _: limit.end())

    def _timeout_message(self, step: int) -> str:
        """Returns the reason for the exit when saving a step takes too long."""
        return (
            f"saving step {step} in {self.directory} takes more than {self.timeout_minutes:g} "
            "minutes (checkpoint.timeout_minutes): is the file system stalled? The stack of every "
            "thread is above"
        )

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._pending is not None and not self._pending.done()

    def poll(self) -> None:
        """Raises the error of a failed background save, if any; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress and raises its error, if any."""
        pending = self._pending
        if pending is not None:
            error = pending.exception()
            self._pending = None
            if error is not None:
                raise error

    def steps(self) -> list[int]:
        """Returns the finished steps in order, without verifying them."""
        return [step for step in self._directories() if (self._path(step) / MANIFEST).is_file()]

    def latest_verified(self, *, quarantine: bool = True) -> int | None:
        """Returns the newest step whose files all match its manifest, or None.

        Args:
          quarantine: whether newer steps that are unfinished or damaged are moved into
            ``quarantine/`` with a warning. Readers skip them instead, because another process may
            be writing them.

        Raises:
          JaxtuneError: there are finished steps, and all of them are damaged. Nothing is moved.
        """
        self.wait()
        step, faults = self._latest_verified() if leads() else (_NONE, {})
        step = agree(step)
        if step == _DAMAGED:
            listed = "; ".join(f"{step}: {fault}" for step, fault in list(faults.items())[:5])
            raise JaxtuneError(
                f"{self.directory}: no checkpoint is undamaged ({listed or 'see process 0'}); "
                f"restore one from a copy, or move {self.directory} away to train from the start"
            )
        if quarantine:
            for newer, fault in faults.items():
                self._quarantine(newer, fault)
        if step == _NONE:
            return None
        self._verified.add(step)
        return step

    def _latest_verified(self) -> tuple[int, dict[int, str]]:
        """Returns the newest undamaged step, and what is wrong with newer ones; for process 0.

        Without such a step, the first value is `_DAMAGED` if any step is finished, or else `_NONE`.
        """
        faults: dict[int, str] = {}
        for step in reversed(self._directories()):
            fault = self._find_damage(step)
            if fault is None:
                return step, faults
            faults[step] = fault
        return _DAMAGED if self.steps() else _NONE, faults

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Restores a step, after verifying it against its manifest.

        Args:
          step: a finished step.
          like: pytree of `jax.ShapeDtypeStruct` with shardings, with the structure of the saved
            tree.

        Returns:
          The tree with the structure, dtypes and shardings of `like`, and the extra dictionary.

        Raises:
          JaxtuneError: the step does not exist, is damaged or does not match `like`.
        """
        self.wait()
        path = self._path(step)
        if (fault := self._find_damage(step)) is not None:
            raise JaxtuneError(f"{path}: {fault}")
        wanted = _leaves_by_path(like)
        stored = read_metadata(self._checkpointer, path / STATE)
        _check_fit(path, _leaves_by_path(stored), wanted)
        nested = self._checkpointer.restore(
            path / STATE, args=ocp.args.StandardRestore(_leaves_by_path(like, nested=True))
        )
        arrays = _leaves_by_path(nested)
        leaves = [arrays[name] for name in wanted]
        extra = read_object(path / EXTRA)
        return jax.tree.unflatten(jax.tree.structure(like), leaves), extra

    def best_step(self, step: int) -> int:
        """Returns the step with the best evaluation up to a finished step, or else that step."""
        path = self._path(step) / EXTRA
        tally = entry(read_object(path), "tally", dict, path)
        if tally.get("best_step") is None:
            return step
        return entry(tally, "best_step", int, path)

    def open_part(self, step: int, name: str, like: Any) -> Any:
        """Opens a part of the tree of a step, after process 0 has verified the step.

        Args:
          step: a finished step.
          name: key of the part in the saved tree.
          like: pytree of arrays or abstract arrays, with the structure of the part.

        Returns:
          The part, with a `StoredArray` for each array: indexing it reads from the disk.

        Raises:
          JaxtuneError: the step does not exist, is damaged or does not match `like`.
        """
        self.wait()
        path = self._path(step)
        fault = self._find_damage(step) if leads() else None
        if agree(int(fault is not None)):
            raise JaxtuneError(f"{path}: {fault or 'process 0 has found it damaged'}")
        named = {f"{name}/{key}".replace("/", "."): a for key, a in _leaves_by_path(like).items()}
        opened = open_arrays(path / STATE, named)
        return jax.tree.unflatten(jax.tree.structure(like), list(opened.values()))

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _directories(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if _is_step(entry))

    def _finish(self, step: int, extra: str, limit: TimeLimit) -> None:
        """Runs in the finisher thread: waits for Orbax, writes the manifest, deletes old steps."""
        path = self._path(step)
        try:
            with report_full_disk(self.directory):
                self._checkpointer.wait_until_finished()  # in all processes
                if not leads():
                    return
                write_atomically(path / EXTRA, extra)
                # Terabytes are hashed for an hour, so only a stall of it is limited.
                limit.restart()
                write_manifest(path, limit.restart)
        except BaseException:
            self._discard(path)
            raise
        self._verified.add(step)
        self._rotate()

    def _discard(self, path: Path) -> None:
        """Removes the files of a failed save, to free space."""
        with contextlib.suppress(Exception):
            self._checkpointer.wait_until_finished()
        if leads():
            shutil.rmtree(path, ignore_errors=True)

    def _rotate(self) -> None:
        """Deletes all but the newest `keep` complete steps and the pinned one."""
        whole = [step for step in self.steps() if self._find_damage(step, contents=False) is None]
        for step in whole[: -self.keep]:
            if step == self.pinned:
                continue
            # The manifest goes first, so that a step whose deletion is interrupted is unfinished.
            (self._path(step) / MANIFEST).unlink()
            self._verified.discard(step)
        # An unfinished step that is older than a complete one is a deletion to be completed.
        done = self.steps()
        for step in set(self._directories()) - set(done):
            if step < done[-1]:
                shutil.rmtree(self._path(step))

    def _find_damage(self, step: int, contents: bool = True) -> str | None:
        """Returns `find_damage` of a step that has a directory, whose hashes are compared once."""
        fault = find_damage(self._path(step), contents and step not in self._verified)
        if contents and fault is None:
            self._verified.add(step)
        return fault

    def _quarantine(self, step: int, reason: str) -> None:
        """Moves a step into ``quarantine/``, under a new name if that is taken, and warns."""
        quarantine = self.directory / QUARANTINE
        quarantine.mkdir(parents=True, exist_ok=True)
        target = quarantine / str(step)
        copies = 1
        while target.exists():
            copies += 1
            target = quarantine / f"{step}-{copies}"
        self._path(step).rename(target)
        self._verified.discard(step)
        logger.warning("checkpoint %s: %s; moved to %s", self._path(step), reason, target)


def _is_step(entry: Path) -> bool:
    return entry.name.isascii() and entry.name.isdigit() and entry.is_dir()


def _chunks(array: Any) -> ocp.SaveArgs:
    """Returns how an array is stored: a large stack by layer (and expert), to be read by layer."""
    lead = tuple(range(array.ndim - 2))
    return ocp.SaveArgs(shard_axes=lead if array.nbytes > LARGE else ())


def _leaves_by_path(tree: Any, nested: bool = False) -> dict[str, Any]:
    """Returns the leaves by path, ``{"opt_state/0/mu": …}``, or as plain nested dicts.

    Plain dicts keep classes of optax and jaxtune out of the files, so that any program can read
    them.
    """
    entries, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in entries}
    if len(named) != len(entries):
        raise ValueError("two leaves of the tree have the same name")
    return traverse_util.unflatten_dict(named, sep="/") if nested else named


def _check_fit(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises if names, shapes or dtypes differ; Orbax would cast dtypes without an error."""
    for name, leaf in wanted.items():
        if name not in stored:
            raise JaxtuneError(f"{path}: missing {name}{closest(name, stored)}")
        found, expected = _dtype_and_shape(stored[name]), _dtype_and_shape(leaf)
        if found != expected:
            raise JaxtuneError(f"{path}: {name} is {found}, but the run needs {expected}")
    if extra := sorted(set(stored) - set(wanted)):
        raise JaxtuneError(f"{path}: unexpected {extra[0]}, which the run does not have")


def _dtype_and_shape(array: Any) -> str:
    """Returns the type of an array as text, such as ``"float32[2, 3]"``."""
    return f"{np.dtype(array.dtype)}{[*array.shape]}"
