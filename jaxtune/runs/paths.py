"""Paths of a config as absolute paths, so that a run can be used from any directory."""

from __future__ import annotations

from pathlib import Path

from jaxtune.chats.builtin import built_in_templates
from jaxtune.config import Config
from jaxtune.data.sources import absolute_sources, missing_sources, path_exists
from jaxtune.data.splits import parse_eval_sets
from jaxtune.errors import JaxtuneError

CONFIG, CHECKPOINTS, MANIFEST = "config.json", "checkpoints", "manifest.json"
METRICS, EVALUATIONS, EXTRA = "metrics.jsonl", "evaluations.jsonl", "extra.json"
_PATHS = (
    "model.path",
    "data.prompt_templates",
    "data.chat_template",
    "adapter.init_from",
    "adapter.expert_scores",
)
"""Options that name one file or directory, or something that is not a path, such as a hub id."""
_COPIED = ("data.chat_template",)
"""Options that name a file of which a run stores a copy."""
_DATA = ("data.train", "data.eval")


class RunFiles:
    """The paths of the files of a run."""

    def __init__(self, path: str | Path):
        """Sets the paths; no file is read or written.

        Args:
          path: directory of the run, which may not exist yet.
        """
        self.path = Path(path)
        self.config = self.path / CONFIG
        self.fingerprint = self.path / "fingerprint.json"
        self.chat = self.path / "chat.json"
        self.next_chat = self.path / "chat.next.json"  # until the record of it is written
        self.history = self.path / "history.jsonl"
        self.metrics = self.path / METRICS
        self.evaluations = self.path / EVALUATIONS
        self.checkpoints = self.path / CHECKPOINTS
        self.adapter_last = self.path / "adapter" / "last"
        self.adapter_best = self.path / "adapter" / "best"
        self.description = self.path / "description.json"
        self.result = self.path / "result.json"
        self.expert_load = self.path / "expert_load.json"
        self.expert_scores = self.path / "expert_scores.json"

    def exists(self) -> bool:
        """Returns whether the directory contains a run."""
        return self.config.is_file()

    def has_checkpoints(self) -> bool:
        """Returns whether there is any checkpoint, finished or not, damaged or not."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())


def with_absolute_paths(config: Config) -> Config:
    """Returns a config with absolute paths for all files and directories that exist.

    Everything else, such as a hub id or the name of a built-in template, is kept.

    Raises:
      JaxtuneError: ``data.eval`` is malformed.
    """
    changed: dict[str, str] = {}
    for key in _PATHS:
        value = str(config.flat()[key])
        built_in = key == "data.chat_template" and value in built_in_templates()
        if value and not built_in and path_exists(value):
            changed[key] = str(Path(value).expanduser().absolute())
    changed |= {
        "data.train": absolute_sources(config.data.train),
        "data.eval": _absolute_eval_sets(config.data.eval),
    }
    if config.data.cache:
        changed["data.cache"] = str(Path(config.data.cache).expanduser().absolute())
    return config.replace_flat(changed)


def _absolute_eval_sets(text: str) -> str:
    """Returns ``data.eval`` with absolute paths, unless it would be parsed differently."""
    sets = {name: absolute_sources(path) for name, path in parse_eval_sets(text).items()}
    if any("," in path for name, path in sets.items() if name):
        return text
    return ",".join(f"{name}={path}" if name else path for name, path in sets.items())


def finished_steps(checkpoints: Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a directory, ascending and unverified."""
    found = (manifest.parent.name for manifest in checkpoints.glob(f"*/{MANIFEST}"))
    return sorted(int(name) for name in found if name.isdecimal())


def with_checkpoint(config: Config) -> Config:
    """Returns a config whose ``training.continue_from`` names a checkpoint instead of a run.

    Raises:
      JaxtuneError: it is neither a run with a checkpoint nor a checkpoint of a run.
    """
    given = config.training.continue_from
    if not given:
        return config
    path = Path(given).expanduser().absolute()
    if (path / CONFIG).is_file():
        steps = finished_steps(path / CHECKPOINTS)
        if not steps:
            raise JaxtuneError(f"training.continue_from={given}: the run has no checkpoint yet")
        path = path / CHECKPOINTS / str(steps[-1])
    elif path.parent.name != CHECKPOINTS or not (path.parents[1] / CONFIG).is_file():
        raise JaxtuneError(
            f"training.continue_from={given}: neither a run (no {CONFIG}) nor a checkpoint of a "
            f"run, RUN/{CHECKPOINTS}/N"
        )
    elif not (path / MANIFEST).is_file():
        steps = finished_steps(path.parent)
        known = ", ".join(map(str, steps)) or "none"
        raise JaxtuneError(f"training.continue_from={given}: no such checkpoint (found: {known})")
    return config.replace(training={"continue_from": str(path)})


def check_paths(config: Config, place: Path) -> None:
    """Raises if an absolute path of the config of a run no longer exists.

    Args:
      config: config of a run.
      place: its ``config.json``, for the message.

    Raises:
      JaxtuneError: a file or directory is missing; the message names the key.
    """
    values = config.flat()
    missing = [
        (key, str(values[key]))
        for key in (key for key in _PATHS if key not in _COPIED)
        if str(values[key]).startswith("/") and not path_exists(str(values[key]))
    ]
    missing += [("data.train", name) for name in missing_sources(config.data.train)]
    for text in parse_eval_sets(config.data.eval).values():
        missing += [("data.eval", name) for name in missing_sources(text)]
    for key, name in missing:
        raise JaxtuneError(
            f"{place}: {key}={name}: no such file or directory; if it has moved, pass its new path "
            f"with --config.{key}=NEW (its content must be the same)"
        )
