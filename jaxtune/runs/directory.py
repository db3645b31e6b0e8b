"""A run is a directory: its frozen config, fingerprint, metrics, checkpoints and adapters."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune import config as config_module
from jaxtune.adapters.esft.expert_scores import ExpertScores, read_scores
from jaxtune.atomic_files import disk_full_named, new_directory, recover, write_atomically
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import barrier, leads
from jaxtune.runs.metrics import EVALUATIONS, METRICS

LOCK = "lock"


class RunDirectory:
    """The files of one run, and what may be done to them.

    Anybody may read; one run at a time trains, inside `start`. Of its processes the first writes.
    """

    def __init__(self, path: str | Path):
        """Names a run; touches nothing.

        Args:
          path: the run's directory, which need not exist yet.
        """
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.fingerprint = self.path / "fingerprint.json"
        self.chat = self.path / "chat.json"
        self.metrics = self.path / METRICS
        self.evaluations = self.path / EVALUATIONS
        self.checkpoints = self.path / "checkpoints"
        self.adapter_last = self.path / "adapter" / "last"
        self.adapter_best = self.path / "adapter" / "best"
        self.description = self.path / "description.json"
        self.result = self.path / "result.json"
        self.expert_load = self.path / "expert_load.json"
        self.expert_scores = self.path / "expert_scores.json"

    def exists(self) -> bool:
        """Says whether a run was started here."""
        return self.config.is_file()

    @contextlib.contextmanager
    def start(self, config: config_module.Config = None) -> Iterator[config_module.Config]:
        """Begins a run here or goes on with the one that is here; holds it while the block runs.

        Args:
          config: resolved config of a new run; None, or an equal one, to go on.

        Yields:
          The config to train with, as ``config.json`` holds it.

        Raises:
          JaxtuneError: no config and no run, a run with another config (with the differences),
            or another process trains here.
        """
        if config is None:
            self.read_config()  # before anything is made: there must be a run
        with contextlib.ExitStack() as held:
            if leads():
                held.enter_context(self._prepared(config))
            barrier("the run's directory is ready")
            if not self.exists():
                raise JaxtuneError(
                    f"{self.path}: process 0 has made the run here, and another process does not "
                    "see it; the directory has to be on a file system that all of them share"
                )
            frozen = self.read_config()
            changes = _differences(_flat(frozen), _flat(config or frozen))
            if changes:
                raise JaxtuneError(
                    f"{self.path}: the run that is here has another config: {changes}; go on "
                    "without a config, or take another directory"
                )
            yield frozen

    @contextlib.contextmanager
    def _prepared(self, config: config_module.Config) -> Iterator[None]:
        """Holds the directory, with the config and whole adapters in it."""
        with disk_full_named(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            fresh = config is not None and not self.exists()
            if fresh:
                with disk_full_named(self.path):
                    write_atomically(self.config, config_module.to_json(config))
            for adapter in (self.adapter_last, self.adapter_best):
                recover(adapter)
            try:
                yield
            except BaseException:
                begun = (self.fingerprint, self.metrics, self.checkpoints)
                if fresh and not any(path.exists() for path in begun):
                    self._withdraw()
                raise

    def _withdraw(self) -> None:
        """Removes a run that failed before it began, so that a mended config may take its place."""
        self.config.unlink()
        self.expert_scores.unlink(missing_ok=True)
        self.chat.unlink(missing_ok=True)
        (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):  # something of the user's is in it
            self.path.rmdir()

    def read_config(self) -> config_module.Config:
        """Returns the frozen config of the run that is here.

        Raises:
          JaxtuneError: no run here, or a ``config.json`` that cannot be read.
        """
        if not self.exists():
            raise JaxtuneError(f"{self.path}: no run here (no config.json)")
        try:
            return config_module.from_json(self.config)
        except json.JSONDecodeError as error:
            raise JaxtuneError(f"{self.config}:{error.lineno}: not JSON: {error.msg}") from error

    def steps_done(self) -> int:
        """Returns the update that the newest checkpoint was saved after; 0 if there is none."""
        saved = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return max((int(path.name) for path in saved if path.name.isdecimal()), default=0)

    def adapter(self, which: str = "best") -> Path:
        """Returns the directory of an adapter in PEFT's format.

        Args:
          which: "best" (the last one where nothing was held out) or "last".

        Raises:
          JaxtuneError: nothing has been saved yet, or the run trains every weight.
        """
        wanted = {"best": self.adapter_best, "last": self.adapter_last}
        for path in (wanted[which], self.adapter_last):
            if path.is_dir():
                return path
        if self.read_config().adapter.method == "full":
            raise JaxtuneError(
                f"{self.path}: adapter.method=full trains every weight, so there is no adapter; "
                "export the model as merged"
            )
        raise JaxtuneError(f"{self.path}: the run has not saved an adapter yet")

    def check_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Stores what the run depends on besides its config, or compares it on resume.

        Args:
          fingerprint: hash or version by name: of data, tokenizer, base model …

        Raises:
          JaxtuneError: something has changed since the run began (with the differences).
        """
        fingerprint = dict(fingerprint)
        if leads() and not self.fingerprint.is_file():
            self._write_json(self.fingerprint, fingerprint)
        barrier("the fingerprint is there")
        try:
            stored = json.loads(self.fingerprint.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise JaxtuneError(f"{self.fingerprint}:{error.lineno}: not JSON") from error
        if changes := _differences(stored, fingerprint):
            raise JaxtuneError(
                f"{self.path}: the run cannot go on exactly, for its inputs have changed: {changes}"
            )

    def replace_directory(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Writes a directory aside and swaps it in, so that no reader sees half of it.

        Args:
          target: one of the adapter directories.
          write: fills the empty directory that it is given; in processes other than the first it
            takes part in collecting what is written, and writes nothing.
        """
        if not leads():
            write(target)
            return
        with disk_full_named(self.path), new_directory(target, replace=True) as scratch:
            write(scratch)

    def write_description(self, description: Mapping[str, Any]) -> None:
        """Writes ``description.json``: what the run is going to do, to compare it with others."""
        self._write_json(self.description, description)

    def write_chat(self, content: Mapping[str, Any]) -> None:
        """Writes ``chat.json``: the chat template, the end tokens and the clock of the run."""
        self._write_json(self.chat, content)

    def write_expert_load(self, content: Mapping[str, Any]) -> None:
        """Writes ``expert_load.json``: who was chosen at the last evaluation, expert by expert."""
        self._write_json(self.expert_load, content, indent=None)

    def write_expert_scores(self, scores: ExpertScores) -> None:
        """Writes ``expert_scores.json``: by what the trained experts were chosen."""
        if leads():
            with disk_full_named(self.path):
                write_atomically(self.expert_scores, scores.to_json())
        barrier("the experts are scored")

    def read_expert_scores(self) -> ExpertScores:
        """Returns what the run's experts were chosen by.

        Raises:
          JaxtuneError: they have not been scored.
        """
        return read_scores(self.expert_scores)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``: what came out of the run, for people and programs to read."""
        self._write_json(self.result, result)

    def _write_json(self, path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
        if not leads():
            return
        with disk_full_named(self.path):
            text = json.dumps(dict(content), indent=indent, ensure_ascii=False)
            write_atomically(path, text + "\n")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a directory for this process; the system lets go of it if the process is killed."""
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise JaxtuneError(
                f"{directory}: process {file.read().strip()} is training here; wait for it, or "
                "take another directory"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _flat(config: config_module.Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, entries in config.to_dict().items()
        for name, value in entries.items()
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns ``"key: old → new, …"`` over the keys that differ; empty if none does."""
    return ", ".join(
        f"{key}: {old.get(key, 'absent')} → {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )
