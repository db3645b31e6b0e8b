"""Checks of a run's directory before it is resumed: the record, config.json and chat.json."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path

from jaxtune.atomic_files import report_full_disk, write_atomically
from jaxtune.config import Config, from_json
from jaxtune.errors import JaxtuneError
from jaxtune.runs.changes import find_changes, needs_acceptance
from jaxtune.runs.paths import CONFIG, RunFiles, finished_steps, with_absolute_paths
from jaxtune.runs.record import DamagedRecord, Record, hash_value, read_record
from jaxtune.runs.review import (
    CHAT,
    CONFIG_FILE,
    FLAG,
    MODEL,
    RECORD,
    Review,
    edited,
)
from jaxtune.strict_json import read_object

logger = logging.getLogger(__name__)

_FROM_RECORD = "writes it again from the record of the run"


def check_config_file(run: RunFiles, review: Review) -> None:
    """Raises if config.json of a run that has been trained is missing or damaged.

    Raises:
      JaxtuneError: it is, and writing it again from the record is not accepted.
    """
    if run.fingerprint.is_file() or run.has_checkpoints():
        found, problem = _readable(run.config)
        if found is None and not review.accepts(CONFIG_FILE):
            review.pass_damage(CONFIG_FILE, problem, _FROM_RECORD)


def last_config(run: RunFiles, accepted: Collection[str] = ()) -> Config:
    """Returns the config of a run: that of the record if config.json cannot be read.

    Args:
      run: files of the run.
      accepted: keys of accepted changes; with that of config.json, the record takes precedence.

    Raises:
      JaxtuneError: there is no run, or neither can be read.
    """
    if not run.exists() and not run.fingerprint.is_file():
        raise JaxtuneError(f"{run.path}: not a run directory (no {CONFIG})")
    found, problem = _readable(run.config)
    if found is None or CONFIG_FILE in accepted:
        with contextlib.suppress(DamagedRecord):
            record = read_record(run.fingerprint)
            found = found if record is None else record.config or found
    if found is None:
        raise JaxtuneError(problem)
    return found


def restore_config(run: RunFiles, review: Review) -> None:
    """Writes config.json from the record: where that was interrupted, or if it is accepted.

    Called by process 0 alone.

    Raises:
      JaxtuneError: config.json is damaged and is not to be replaced, or there is no record.
    """
    try:
        record = read_record(run.fingerprint)
    except DamagedRecord:
        return  # reported by `find_record`
    if record is None or record.config is None:
        if review.accepts(CONFIG_FILE):
            raise JaxtuneError(
                f"{FLAG} {CONFIG_FILE}: {run.fingerprint} holds no config to write again; restore "
                f"{run.config} from a copy, or copy it from a new run with the same config, and "
                f"pass {FLAG} {RECORD}"
            )
        return
    found, problem = _readable(run.config)
    if found is None:
        review.pass_damage(CONFIG_FILE, problem, _FROM_RECORD)
    elif record.replaced is None or edited(record.replaced, found):
        if not review.accepts(CONFIG_FILE) or not edited(record.config, found):
            return
        review.pass_damage(CONFIG_FILE, "edited", _FROM_RECORD)
    with report_full_disk(run.path):
        write_atomically(run.config, record.config.to_json())


def complete_chat(run: RunFiles) -> None:
    """Replaces chat.json where that was interrupted after the record was written.

    Called by process 0 alone.
    """
    if not run.next_chat.is_file():
        return
    with contextlib.suppress(JaxtuneError):
        record = read_record(run.fingerprint)
        written = hash_value(read_object(run.next_chat))
        if record is not None and record.inputs.get("chat") == written:
            run.next_chat.replace(run.chat)
    run.next_chat.unlink(missing_ok=True)


def _readable(path: Path) -> tuple[Config | None, str]:
    """Returns the config in a file, or None and what is wrong with it."""
    if not path.is_file():
        return None, f"{path}: missing, although the run has been trained"
    try:
        return from_json(path), ""
    except JaxtuneError as error:
        return None, str(error)


def find_record(run: RunFiles, review: Review) -> Record | None:
    """Returns the record of a run; None for a new run.

    Raises:
      JaxtuneError: it is missing, damaged or of an earlier version, and that is not accepted.
    """
    consequence = "everything is recorded as it is now, whatever has changed since the run started"
    try:
        record = read_record(run.fingerprint)
    except DamagedRecord as error:
        review.pass_damage(RECORD, str(error), consequence)
        return None
    if record is None:
        if run.has_checkpoints():
            problem = f"{run.fingerprint}: missing, although the run has checkpoints"
            review.pass_damage(RECORD, problem, consequence)
        return None
    if record.config is None:
        if not review.accepts(MODEL):
            raise JaxtuneError(
                f"{run.fingerprint}: written by an earlier version of jaxtune, without hashes of "
                f"the base model: if the base is still the same, pass {FLAG} {MODEL} to record it"
            )
        review.accept(MODEL, "not recorded", "")
    return record


def warn_of_lost_checkpoints(run: RunFiles) -> None:
    """Logs that a run which has trained some steps has no checkpoint to continue from."""
    if not finished_steps(run.checkpoints) and run.metrics.is_file() and run.metrics.stat().st_size:
        logger.warning(
            "%s: has no finished checkpoint, so training starts at the first step again and "
            "replaces the metrics and adapters of the run",
            run.path,
        )


def check_stored(run: RunFiles, record: Record | None, review: Review) -> None:
    """Compares chat.json and expert_scores.json of a run with its record.

    Raises:
      JaxtuneError: one is missing, damaged or changed, and that is not accepted.
    """
    stored = {} if record is None else record.inputs
    if "chat" in stored:
        found, problem = _hash(run.chat, ("chat_template", "eos_token_id", "clock"))
        if problem:
            review.pass_damage(CHAT, problem, "writes it anew, with the present time as its clock")
        elif found != stored["chat"]:
            pair = stored["chat"][:12], found[:12]
            what = f"cannot resume exactly: {run.chat.name} has been changed"
            review.check({CHAT: pair}, what, "restore it")
    if "expert_scores" in stored:
        found, problem = _hash(run.expert_scores)
        if problem or found != stored["expert_scores"]:
            raise JaxtuneError(
                f"{problem or f'{run.expert_scores}: has been changed'}; restore it from a copy of "
                "the run, because the trained experts were selected by it"
            )


def _hash(path: Path, keys: Collection[str] = ()) -> tuple[str, str]:
    """Returns the hash of a JSON object in a file, and what is wrong with it, if anything.

    Args:
      path: the file.
      keys: keys that it must have.
    """
    if not path.is_file():
        return "", f"{path}: missing, although the run has been trained"
    try:
        content = read_object(path)
        lacks = [key for key in keys if key not in content]
        return hash_value(content), f'{path}: damaged: it lacks "{lacks[0]}"' if lacks else ""
    except JaxtuneError as error:
        return "", str(error)


def checked_config(
    run: RunFiles, frozen: Config, record: Record | None, given: Config | None, review: Review
) -> Config:
    """Returns the config with which a run was last started, after checking all changes of it.

    Args:
      run: files of the run.
      frozen: content of ``config.json``.
      record: record of the run, if it has one.
      given: config to resume it with; None for that of ``config.json``.
      review: the accepted changes.

    Raises:
      JaxtuneError: config.json was edited, or an option must not change.
    """
    recorded = frozen if record is None or record.config is None else record.config
    if by_hand := edited(recorded, frozen):
        review.check(
            by_hand,
            f"{run.config.name} was changed by something other than jaxtune",
            f"undo this (or pass {FLAG} {CONFIG_FILE}) and set options on the command line",
        )
    recorded = with_absolute_paths(recorded)
    changes = {} if given is None else find_changes(recorded, given)
    other = {key: pair for key, pair in changes.items() if needs_acceptance(key, *pair)}
    other = {key: pair for key, pair in other.items() if key not in by_hand}
    review.check(
        other,
        "contains a run with another config",
        "resume it without a config or use another directory",
    )
    return recorded
