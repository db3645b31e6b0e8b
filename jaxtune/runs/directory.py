"""The directory of a run: frozen config, fingerprint, metrics, checkpoints and adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.adapters.esft.expert_scores import ExpertScores, read_scores
from jaxtune.atomic_files import new_directory, recover, report_full_disk, write_atomically
from jaxtune.config import Config, from_json
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.parallel.processes import barrier, leads
from jaxtune.runs.changes import Changes, find_changes, read_history, resumed_config
from jaxtune.runs.paths import (
    RunFiles,
    check_paths,
    finished_steps,
    with_absolute_paths,
    with_checkpoint,
)
from jaxtune.runs.record import Record
from jaxtune.runs.resuming import (
    check_config_file,
    check_stored,
    checked_config,
    complete_chat,
    find_record,
    restore_config,
    warn_of_lost_checkpoints,
)
from jaxtune.runs.review import CONFIG_FILE, MODEL, Review
from jaxtune.strict_json import entry, parse_json, read_object

logger = logging.getLogger(__name__)

LOCK = "lock"


class RunDirectory(RunFiles):
    """The files of a run, and the operations on them.

    Any process may read. Only one run at a time trains in a directory, inside `start`, and only
    process 0 of that run writes.
    """

    recorded: Record | None = None  # read by `start`

    @contextlib.contextmanager
    def start(self, config: Config | None = None, review: Review | None = None) -> Iterator[Config]:
        """Starts or resumes a run; locks the directory for the duration of the block.

        Args:
          config: resolved config of a new run; None to resume an existing one, or the config to
            resume it with (see `resumed_config`).
          review: the accepted changes; none by default.

        Yields:
          The config of the run, with absolute paths. `record` writes what differs from
          ``config.json``.

        Raises:
          JaxtuneError: there is neither a config nor a run, an option must not change (the message
            lists the differences), a file of the run is missing, damaged or edited, or another
            process is training in the directory.
        """
        review = Review(self.path) if review is None else review
        check_config_file(self, review)
        restores = review.accepts(CONFIG_FILE)
        if config is None and not restores:
            self.read_config()  # raises if there is no run, before anything is created
        if config is not None:
            config = with_absolute_paths(config)
        chosen = None if config is None or restores else self._with_source(config)
        with contextlib.ExitStack() as held:
            if leads():
                held.enter_context(self._hold(chosen, review))
            barrier("the run's directory is ready")
            if not self.exists():
                raise JaxtuneError(
                    f"{self.path}: created by process 0 but not visible to another process; the "
                    "directory must be on a file system that all processes share"
                )
            self.recorded = find_record(self, review)
            check_stored(self, self.recorded, review)
            frozen = self.read_config()
            if config is not None:
                # Only now with the checkpoint, which process 0 has chosen for all.
                config = self._with_source(config)
            recorded = checked_config(self, frozen, self.recorded, config, review)
            frozen = with_absolute_paths(frozen)
            resumed = frozen if config is None else resumed_config(self.path, recorded, config)
            if self.recorded is not None:
                check_paths(resumed, self.config)
            yield resumed

    def _with_source(self, config: Config) -> Config:
        """Returns a config whose ``training.continue_from`` is a checkpoint.

        The checkpoint is chosen once, when the run is created, because the other run may be
        trained further. Afterwards the same run or checkpoint may be given again.
        """
        if not self.exists():
            return with_checkpoint(config)
        if self.path.absolute() == Path(config.training.continue_from).expanduser().absolute():
            raise JaxtuneError(
                f"training.continue_from={config.training.continue_from}: a run cannot continue "
                "from itself; to train it for longer, resume it with a larger length and without "
                "training.continue_from"
            )
        frozen = Path(self.read_config().training.continue_from)
        given = Path(config.training.continue_from).expanduser().absolute()
        if config.training.continue_from and given in (frozen, *frozen.parents):
            return config.replace(training={"continue_from": str(frozen)})
        return config

    @contextlib.contextmanager
    def _hold(self, config: Config | None, review: Review) -> Iterator[None]:
        """Locks the directory, writes the config of a new run, completes interrupted renames."""
        try:
            with report_full_disk(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # below a file, read-only, too long
            raise JaxtuneError(f"{self.path}: {error.strerror}") from error
        with _locked(self.path):
            restore_config(self, review)
            complete_chat(self)
            warn_of_lost_checkpoints(self)
            fresh = config is not None and not self.exists()
            if config is not None and fresh:
                with report_full_disk(self.path):
                    write_atomically(self.config, config.to_json())
            for adapter in (self.adapter_last, self.adapter_best):
                recover(adapter)
            try:
                yield
            except BaseException:
                begun = (self.fingerprint, self.metrics, self.checkpoints)
                if fresh and not any(path.exists() for path in begun):
                    self._remove_unstarted()
                raise

    def _remove_unstarted(self) -> None:
        """Removes a run that failed before training, so that a corrected config can be used."""
        self.config.unlink()
        self.expert_scores.unlink(missing_ok=True)
        self.chat.unlink(missing_ok=True)
        self.next_chat.unlink(missing_ok=True)
        (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):  # the directory contains files of the user
            self.path.rmdir()

    def read_config(self) -> Config:
        """Returns the frozen config of the run.

        Raises:
          JaxtuneError: there is no run, or its ``config.json`` cannot be read.
        """
        if not self.exists():
            raise JaxtuneError(f"{self.path}: not a run directory (no config.json)")
        return from_json(self.config)

    def read_history(self) -> list[dict[str, Any]]:
        """Returns the changes of the config, in order; see `read_history`."""
        return read_history(self.history)

    def changes(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Returns the options in which `config`, from `start`, differs from the recorded one."""
        recorded = None if self.recorded is None else self.recorded.config
        return find_changes(with_absolute_paths(recorded or self.read_config()), config)

    def record(
        self,
        record: Record,
        changes: Changes,
        accepted: Changes,
        chat: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes what a run continues with: record, config, chat settings, changes in the history.

        ``config.json`` is replaced after the record, which holds the config that is replaced until
        then, and ``chat.json`` is written to another file first: a run that is killed in between
        has not been edited.

        Args:
          record: the new record.
          changes: result of `changes`.
          accepted: the accepted changes; see `Review`.
          chat: new content of ``chat.json``; None to keep it.
        """
        if leads():
            if chat is not None:
                self._write_json(self.next_chat, chat)
            assert record.config is not None
            if changes or accepted:
                self._add_history({**accepted, **changes}, sorted(accepted))
            before = self.read_config()
            renewed = (before, before.derived) != (record.config, record.config.derived)
            if renewed:
                self._write_record(dataclasses.replace(record, replaced=before))
                with report_full_disk(self.path):
                    write_atomically(self.config, record.config.to_json())
            self._write_record(record)
            if chat is not None:
                self.next_chat.replace(self.chat)
            for key, (old, new) in sorted({**accepted, **changes}.items()):
                logger.info("%s: %s → %s", key, old, new)
        barrier("the record is written")

    def _write_record(self, record: Record) -> None:
        text = record.to_json()
        if not self.fingerprint.is_file() or self.fingerprint.read_bytes() != text.encode():
            with report_full_disk(self.path):
                write_atomically(self.fingerprint, text)

    def order_changed(self) -> int:
        """Returns the last step at which a change of the data's order was accepted, or −1."""
        kept = {MODEL, CONFIG_FILE}  # changes that leave the order as it is
        lines = [line for line in self.read_history() if {*line.get("accepted", ())} - kept]
        return max((line["step"] for line in lines), default=-1)

    def _add_history(self, changes: Changes, accepted: list[str]) -> None:
        """Adds a line to ``history.jsonl``."""
        lines = self.read_history()
        # Tuples become lists, as in the lines that are read.
        values = {"step": self.steps_done(), "changes": dict(changes)}
        values |= {"accepted": accepted} if accepted else {}
        line = parse_json(json.dumps(values, default=str).encode(), str(self.history))
        # The same line is already there if the process was killed before it wrote the config.
        if line not in lines[-1:]:
            lines.append(line)
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in lines)
        with report_full_disk(self.path):
            write_atomically(self.history, text)

    def steps_done(self) -> int:
        """Returns the step of the newest finished checkpoint, without verifying it, or 0."""
        return max(finished_steps(self.checkpoints), default=0)

    def steps_planned(self) -> int | None:
        """Returns the number of steps of the run; None if it has not been started."""
        if not self.description.is_file():
            return None
        return entry(read_object(self.description), "steps", int, self.description)

    def adapter(self, which: str = "best") -> Path:
        """Returns the directory of an adapter in PEFT's format.

        Args:
          which: "best" (the last one if there are no held-out examples) or "last".

        Raises:
          JaxtuneError: no adapter has been saved yet, or the run trains all weights.
        """
        paths = {"best": self.adapter_best, "last": self.adapter_last}
        for path in (lookup(paths, which, "adapter"), self.adapter_last):
            if path.is_dir():
                return path
        if self.read_config().adapter.method == "full":
            raise JaxtuneError(
                f"{self.path}: adapter.method=full trains all weights and has no adapter; export "
                "the model with --format merged"
            )
        raise JaxtuneError(f"{self.path}: the run has not saved an adapter yet")

    def replace_directory(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Replaces a directory atomically.

        Args:
          target: one of the adapter directories.
          write: function that fills an empty directory. Every process calls it, because gathering
            arrays needs all of them, but only process 0 may write.
        """
        if not leads():
            write(target)
            return
        with report_full_disk(self.path), new_directory(target, replace=True) as scratch:
            write(scratch)

    def write_description(self, description: Mapping[str, Any]) -> None:
        """Writes ``description.json``, a summary of the run for comparison with others."""
        self._write_json(self.description, description)

    def write_chat(self, content: Mapping[str, Any]) -> None:
        """Writes ``chat.json``: chat template, end tokens and clock."""
        self._write_json(self.chat, content)

    def write_expert_load(self, content: Mapping[str, Any]) -> None:
        """Writes ``expert_load.json``: tokens per expert at the last evaluation."""
        self._write_json(self.expert_load, content, indent=None)

    def write_expert_scores(self, scores: ExpertScores) -> None:
        """Writes ``expert_scores.json``: the scores by which the trained experts are selected."""
        if leads():
            with report_full_disk(self.path):
                write_atomically(self.expert_scores, scores.to_json())
        barrier("the expert scores are written")

    def read_expert_scores(self) -> ExpertScores:
        """Returns the expert scores of the run.

        Raises:
          JaxtuneError: the experts have not been scored.
        """
        return read_scores(self.expert_scores)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes ``result.json``: the results of the run."""
        self._write_json(self.result, result)

    def _write_json(self, path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
        if not leads():
            return
        with report_full_disk(self.path):
            text = json.dumps(dict(content), indent=indent, ensure_ascii=False)
            write_atomically(path, text + "\n")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks a directory; the operating system releases the lock if the process is killed."""
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise JaxtuneError(
                f"{directory}: process {file.read().strip()} is training in this directory; wait "
                "for it or use another directory"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
