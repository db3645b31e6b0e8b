"""Checkpoints of a run's state: the one place that talks to orbax-checkpoint.

On disk a step is ``<step>/state/`` (Orbax's), ``<step>/extra.json`` and ``<step>/manifest.json``.
The manifest lists the size and SHA-256 of every file and is written last, so a step without one
was never finished, and a step that disagrees with its own has been damaged since. Orbax alone
restores a flipped byte without a word and takes an empty directory for the latest step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from jaxtune.atomic_files import disk_full_named, write_atomically
from jaxtune.errors import JaxtuneError, closest
from jaxtune.parallel.processes import agree, leads

logger = logging.getLogger(__name__)

STATE, EXTRA, MANIFEST, QUARANTINE = "state", "extra.json", "manifest.json", "quarantine"


class Checkpoints:
    """The checkpoints of one run: saved in the background, verified before they are trusted.

    Every process writes and reads its shards; process 0 alone writes manifests, verifies, sets
    aside and deletes. Use as a context manager: leaving it waits for the save in progress.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        """Opens a directory of checkpoints, which is made when needed.

        Args:
          directory: where the step directories go.
          keep: how many checkpoints the rotation leaves, at least 2: one may turn out damaged.
        """
        if keep < 2:
            raise JaxtuneError(f"checkpoint.keep is at least 2, not {keep}")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.pinned: int | None = None  # a step that the rotation leaves as well
        self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._verified: set[int] = set()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise
            logger.exception("a save failed while the run was stopping")
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()

    def save(self, step: int, tree: Any, extra: Mapping[str, Any]) -> None:
        """Copies a state to the host and goes on to write it in the background.

        When it returns, the arrays of `tree` may be donated. The step counts once its manifest
        is written; `poll` or `wait` tells whether that went well.

        Args:
          step: the number of the step, which names the directory.
          tree: pytree of arrays, any shapes and dtypes.
          extra: what JSON can hold: loader position, scores, counts.

        Raises:
          JaxtuneError: no space left; or this or the previous save failed so.
        """
        self.wait()
        target = self.directory / str(step)
        if leads() and target.exists():
            self._set_aside(step, "a new save of this step replaces it")
        text = json.dumps(dict(extra), indent=2, ensure_ascii=False)
        try:
            with disk_full_named(self.directory):
                if leads():
                    target.mkdir(parents=True)
                self._checkpointer.save(
                    target / STATE, args=ocp.args.StandardSave(_named(tree, nested=True))
                )
        except BaseException:
            self._discard(target)
            raise
        self._pending = self._finisher.submit(self._finish, step, text)

    def poll(self) -> None:
        """Raises what went wrong in the background, if anything did; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is complete and raises what went wrong in it."""
        pending = self._pending
        if pending is not None:
            error = pending.exception()
            self._pending = None
            if error is not None:
                raise error

    def steps(self) -> list[int]:
        """Returns the finished steps in order; whether they are undamaged is not looked at."""
        return [step for step in self._directories() if (self._path(step) / MANIFEST).is_file()]

    def latest_verified(self) -> int | None:
        """Returns the newest step whose files all match its manifest, or None.

        Newer steps that are unfinished or damaged are moved into ``quarantine/`` with a warning.
        """
        self.wait()
        step = agree(self._latest_verified() if leads() else -1)
        if step < 0:
            return None
        self._verified.add(step)
        return step

    def _latest_verified(self) -> int:
        """Returns -1 where there is none."""
        for step in reversed(self._directories()):
            fault = self._fault(step)
            if fault is None:
                return step
            self._set_aside(step, fault)
        return -1

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step back, after checking it against its manifest.

        Args:
          step: a finished step.
          like: pytree of `jax.ShapeDtypeStruct` with shardings, of the structure that was saved.

        Returns:
          The tree in the structure, dtypes and shardings of `like`, and the extra dictionary.

        Raises:
          JaxtuneError: no such step, a damaged one, or one that does not fit `like`.
        """
        self.wait()
        path = self._path(step)
        if (fault := self._fault(step)) is not None:
            raise JaxtuneError(f"{path}: {fault}")
        wanted = _named(like)
        metadata: Any = self._checkpointer.metadata(path / STATE)
        _check_fit(path, _named(metadata.item_metadata.tree), wanted)
        nested = self._checkpointer.restore(
            path / STATE, args=ocp.args.StandardRestore(_named(like, nested=True))
        )
        arrays = _named(nested)
        leaves = [arrays[name] for name in wanted]
        extra = json.loads((path / EXTRA).read_text(encoding="utf-8"))
        return jax.tree.unflatten(jax.tree.structure(like), leaves), extra

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _directories(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if _is_step(entry))

    def _finish(self, step: int, extra: str) -> None:
        """Runs in the background: sees Orbax through, then makes the step count."""
        path = self._path(step)
        try:
            with disk_full_named(self.directory):
                self._checkpointer.wait_until_finished()  # until all processes have
                if not leads():
                    return
                write_atomically(path / EXTRA, extra)
                files = {name: [size, _sha256(path / name)] for name, size in _files(path).items()}
                write_atomically(path / MANIFEST, json.dumps(files, indent=2))
        except BaseException:
            self._discard(path)
            raise
        self._verified.add(step)
        self._rotate()

    def _discard(self, path: Path) -> None:
        """Removes what a failed save left: it was never a checkpoint, and space may be short."""
        with contextlib.suppress(Exception):
            self._checkpointer.wait_until_finished()
        if leads():
            shutil.rmtree(path, ignore_errors=True)

    def _rotate(self) -> None:
        """Deletes what is older than the newest `keep` steps whose files are all there.

        The pinned step stays.
        """
        whole = [step for step in self.steps() if self._fault(step, contents=False) is None]
        for step in whole[: -self.keep]:
            if step == self.pinned:
                continue
            # The manifest goes first: a deletion cut short must not leave a step that counts.
            (self._path(step) / MANIFEST).unlink()
            shutil.rmtree(self._path(step))
            self._verified.discard(step)

    def _fault(self, step: int, contents: bool = True) -> str | None:
        """Says what is wrong with a step, or returns None; `contents` compares hashes too."""
        path = self._path(step)
        if not (path / MANIFEST).is_file():
            return "unfinished: it has no manifest"
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            listed = {str(name): (int(size), str(sha)) for name, (size, sha) in manifest.items()}
        except (ValueError, TypeError, AttributeError):
            return f"{MANIFEST} is damaged"
        present = _files(path)
        for name, (size, sha) in listed.items():
            if name not in present:
                return f"{name} is missing"
            if present[name] != size:
                return f"{name} has {present[name]} bytes instead of {size}"
            if contents and step not in self._verified and _sha256(path / name) != sha:
                return f"{name} has changed: its SHA-256 is not that of the manifest"
        if contents:
            self._verified.add(step)
        return None

    def _set_aside(self, step: int, reason: str) -> None:
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


def _named(tree: Any, nested: bool = False) -> dict[str, Any]:
    """Returns the leaves by path, ``{"opt_state/0/mu": …}``, or as plain nested dicts.

    Plain dicts keep optax's and our own classes out of the files: anyone can read them.
    """
    entries, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in entries}
    if len(named) != len(entries):
        raise ValueError("two leaves of the tree have one name")
    return traverse_util.unflatten_dict(named, sep="/") if nested else named


def _check_fit(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses a checkpoint of other names, shapes or dtypes: Orbax would cast in silence."""
    for name, leaf in wanted.items():
        if name not in stored:
            raise JaxtuneError(f"{path}: holds no {name}{closest(name, stored)}")
        have = (tuple(stored[name].shape), np.dtype(stored[name].dtype))
        want = (tuple(leaf.shape), np.dtype(leaf.dtype))
        if have != want:
            raise JaxtuneError(f"{path}: {name} is {_kind(have)}, but the run needs {_kind(want)}")
    if extra := sorted(set(stored) - set(wanted)):
        raise JaxtuneError(f"{path}: holds {extra[0]}, which the run has no place for")


def _kind(kind: tuple[tuple[int, ...], np.dtype[Any]]) -> str:
    return f"{kind[1]}{list(kind[0])}"


def _files(path: Path) -> dict[str, int]:
    """Returns the size in bytes of every file under a step but the manifest, by relative name."""
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.is_symlink() and file != path / MANIFEST
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
