"""Training from Python: files or rows in memory, callbacks and progress."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from jaxtune.api.run import Run
from jaxtune.config import Config, ConfigLike, load_file, resolve
from jaxtune.data.in_memory import PREFIX, check_rows
from jaxtune.errors import JaxtuneError, check_path, shown
from jaxtune.log_output import logged
from jaxtune.parallel.processes import leads
from jaxtune.progress import bars
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.resuming import last_config
from jaxtune.training import train as training
from jaxtune.training.loop.callbacks import Callback

if TYPE_CHECKING:
    import datasets

Rows: TypeAlias = Union[Sequence[Mapping[str, Any]], "datasets.Dataset"]
"""Rows in memory, in any format that files can have."""


def train(
    config: ConfigLike | str | Path | None = None,
    workdir: str | Path = "",
    *,
    train_data: Rows | None = None,
    eval_data: Rows | Mapping[str, Rows] | None = None,
    callbacks: Sequence[Callback] = (),
    accept_changes: str | Sequence[str] = (),
    progress: bool = True,
) -> Run:
    """Trains a model, or resumes the run in `workdir`.

    Args:
      config: a config from `jaxtune.config.default`, a mapping of sections, or the path of a config
        file; None resumes the run in `workdir`.
      workdir: the run's directory, which receives all files.
      train_data: training rows in place of ``data.train``: a list of dicts or a
        `datasets.Dataset`, in any row format. They are not stored, so a resume needs the same rows
        again. In several processes, each passes all rows.
      eval_data: held-out rows in place of ``data.eval``, or a mapping of named sets.
      callbacks: instances of `jaxtune.Callback`, called in this order.
      accept_changes: keys of changes with which a run is resumed although it does not continue
        exactly: options such as ``optimizer.learning_rate``, ``model`` (the files of the base),
        ``tokenizer``, ``data.train``, ``data.eval``, ``chat``, ``config`` or ``record``. The error
        of a refused resume says which to pass.
      progress: shows what the command line shows: the log, and a progress bar on a terminal or in a
        notebook with ipywidgets, or else a line now and then. A level that the program has set for
        the logger ``jaxtune`` is kept. False: only warnings.

    Returns:
      The run.

    Raises:
      JaxtuneError: an error that the user can fix.
    """
    if isinstance(config, (str, Path)):
        config = load_file(config)
    if str(workdir):
        workdir = check_path("workdir", workdir)
    resolved = None if config is None else resolve(config)
    rows = _rows(train_data, eval_data)
    shown = progress and leads()
    with logged(shown), bars(shown):
        training.train(
            _with_rows(resolved, rows, workdir),
            workdir,
            rows=rows,
            callbacks=callbacks,
            accept_changes=_keys(accept_changes),
        )
    return Run(workdir)


def _keys(accept_changes: str | Sequence[str]) -> list[str]:
    """Returns keys that are given as a list or separated by commas."""
    given = accept_changes.split(",") if isinstance(accept_changes, str) else accept_changes or ()
    if not isinstance(given, Iterable) or not all(isinstance(key, str) for key in given):
        raise JaxtuneError(f"accept_changes is a list of keys, not {shown(accept_changes)}")
    return [key.strip() for key in given if key.strip()]


def _rows(train_data: Any, eval_data: Any) -> dict[str, Any]:
    """Returns rows by their entry in ``data.train`` or ``data.eval``."""
    rows: dict[str, Any] = {}
    if train_data is not None:
        check_rows("train_data", train_data)
        rows[f"{PREFIX}train"] = train_data
    if isinstance(eval_data, Mapping) and not eval_data:
        raise JaxtuneError("eval_data is an empty dict: name at least one set, or pass None")
    sets = eval_data if isinstance(eval_data, Mapping) else {"": eval_data}
    for name, held_out in sets.items() if eval_data is not None else ():
        if name and not re.fullmatch(r"\w+", str(name)):
            raise JaxtuneError(f"eval_data: {name!r} is not a name: use letters, digits and _")
        check_rows(f"eval_data[{name!r}]" if name else "eval_data", held_out)
        rows[f"{PREFIX}eval/{name}" if name else f"{PREFIX}eval"] = held_out
    return rows


def _with_rows(
    config: Config | None, rows: Mapping[str, Any], workdir: str | Path
) -> Config | None:
    """Returns a config whose ``data`` section names the rows in memory.

    Raises:
      JaxtuneError: rows are given twice, or not given again to resume a run that needs them.
    """
    names = {
        "train": ",".join(entry for entry in rows if entry == f"{PREFIX}train"),
        "eval": ",".join(
            entry if entry == f"{PREFIX}eval" else f"{entry.rpartition('/')[2]}={entry}"
            for entry in rows
            if entry != f"{PREFIX}train"
        ),
    }
    run = RunDirectory(workdir)
    stored = last_config(run).data if str(workdir) and run.exists() else None
    for option, name in names.items():
        before = getattr(stored, option) if stored else ""
        if PREFIX in before and not name:
            raise JaxtuneError(
                f"{run.path}: the run was given rows in memory; pass {option}_data again to resume "
                "it"
            )
        if stored and name and before != name:
            raise JaxtuneError(f"{run.path}: {option}_data: the run reads data.{option}={before}")
        given = getattr(config.data, option) if config else ""
        if config and name and given not in ("", name):
            raise JaxtuneError(f"{option}_data and data.{option}={given} are both given")
    if config is None:
        return None
    return config.replace(data={option: name for option, name in names.items() if name})
