"""Changes since a run was last started: which may pass, and which need ``--accept-changes``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import OPTIONS, Config
from jaxtune.errors import JaxtuneError, closest
from jaxtune.parallel.processes import agree
from jaxtune.runs.changes import Changes, describe

FLAG = "--accept-changes"
MODEL, CHAT, RECORD, CONFIG_FILE = "model", "chat", "record", "config"
INPUTS = {
    MODEL: "files of the base model",
    "tokenizer": "vocabulary",
    "data.train": "training examples",
    "data.eval": "held-out examples",
    "adapter.init_from": "the initial adapter",
    CHAT: "chat.json of the run",
    CONFIG_FILE: "config.json of the run is written again from the record",
    RECORD: "fingerprint.json of the run is written anew",
}
"""Keys of accepted changes other than options."""


class Review:
    """The changes of one resume, and the keys that were given to accept some of them.

    Attributes:
      accepted: the accepted changes as (old, new), by key.
    """

    def __init__(self, run: Path, keys: Collection[str] = ()):
        """Checks the keys.

        Args:
          run: directory of the run, for messages.
          keys: options by ``section.name``, and keys of `INPUTS`.

        Raises:
          JaxtuneError: an unknown key.
        """
        self._run, self._keys = run, set(keys)
        self.accepted: dict[str, tuple[Any, Any]] = {}
        for key in sorted(self._keys - OPTIONS.keys() - INPUTS.keys()):
            raise JaxtuneError(
                f'{FLAG}: unknown key "{key}"{closest(key, [*INPUTS, *OPTIONS])} (known: '
                f"{', '.join(INPUTS)}, and options such as optimizer.learning_rate)"
            )

    def accepts(self, key: str) -> bool:
        """Returns whether a change was given as accepted."""
        return key in self._keys

    def check(self, changes: Changes, what: str, advice: str) -> None:
        """Accepts changes whose keys were given and with which the checkpoints fit.

        Args:
          changes: (old, new) by key.
          what: what has changed, followed in the message by the changes.
          advice: a way out other than accepting them.

        Raises:
          JaxtuneError: a change is not accepted; the message lists these and how to accept them.
        """
        unfit = sorted(key for key, pair in changes.items() if _unfit(key, *pair))
        refused = {k: pair for k, pair in changes.items() if k not in self._keys or k in unfit}
        if unfit:
            way = (
                f"{advice}: its checkpoints do not fit another {', '.join(unfit)}, so this cannot "
                "be accepted"
            )
        else:
            keys = ",".join(sorted({*refused, *self._keys}))
            way = f"{advice}, or accept with {FLAG} {keys}"
        if refused:
            raise JaxtuneError(f"{self._run}: {what}: {describe(refused)}; {way}")
        self.accepted.update(changes)

    def check_text(self, key: str, problem: str, change: tuple[Any, Any]) -> None:
        """Accepts one change, described by a text, if its key was given.

        Raises:
          JaxtuneError: it was not.
        """
        if key not in self._keys:
            keys = ",".join(sorted({key, *self._keys}))
            raise JaxtuneError(f"{self._run}: {problem}; restore it, or accept with {FLAG} {keys}")
        self.accepted[key] = change

    def accept(self, key: str, old: Any, new: Any) -> None:
        """Records a change whose key was given, as `accepts` has told."""
        self.accepted[key] = (old, new)

    def pass_damage(self, key: str, problem: str, consequence: str) -> None:
        """Accepts that a file of the run is missing or damaged, if its key was given.

        Raises:
          JaxtuneError: it was not; the message has the problem and what accepting it does.
        """
        if key not in self._keys:
            raise JaxtuneError(
                f"{problem}; restore it from a copy of {self._run}, or pass {FLAG} {key}: "
                f"{consequence}"
            )
        self.accepted[key] = (problem, "")

    def renews_chat(self) -> bool:
        """Returns whether the chat settings of the run are to be made anew."""
        lost = self.accepted.get(CHAT, ("", "x"))[1] == ""
        return lost or any(key.startswith("data.chat_template") for key in self.accepted)

    def finish(self, later: Collection[str] = ()) -> None:
        """Checks that every key was needed.

        Args:
          later: keys whose changes are not known yet.

        Raises:
          JaxtuneError: a key names something that has not changed.
        """
        # Process 0 restores config.json alone, so it decides for all.
        unused = sorted(self._keys - self.accepted.keys() - set(later))
        if agree(len(unused)):
            raise JaxtuneError(
                f"{FLAG} {','.join(unused) or '(see process 0)'}: nothing to accept, because it "
                f"has not changed since {self._run} was last started; leave it out"
            )


def _unfit(key: str, old: Any, new: Any) -> bool:
    """Returns whether the saved state would not fit a changed option."""
    if key in ("optimizer.clip_norm", "optimizer.group_rates", "adapter.init_from"):
        return bool(old) != bool(new)  # a part of the optimizer's state; the adapter's settings
    if key.startswith("adapter."):
        return key not in ("adapter.dropout", "adapter.expert_scores")
    if key == "optimizer.lora_plus_ratio":
        return (old == 1) != (new == 1)
    if key == "training.dtype":
        return "float16" in (old, new)  # the loss scale
    return key in ("optimizer.name", "optimizer.moment_dtype", "training.continue_from")


def edited(recorded: Config, found: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the options in which config.json differs from the record.

    Values that were derived from the devices have the key of the file itself.
    """
    before, after = recorded.requested().flat(), found.requested().flat()
    changes: dict[str, tuple[Any, Any]] = {
        key: (before[key], after[key]) for key in before if before[key] != after[key]
    }
    if not changes and (recorded.derived, recorded) != (found.derived, found):
        before, after = (
            dict(config.flat(), derived=config.derived) for config in (recorded, found)
        )
        pairs = [(before[key], after[key]) for key in before if before[key] != after[key]]
        changes[CONFIG_FILE] = pairs[0]
    return changes


def short(hashes: Mapping[str, str], others: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Returns the entries that differ, as (old, new) with the start of each hash."""
    return {
        key: (hashes.get(key, "absent")[:12], others.get(key, "absent")[:12])
        for key in sorted(hashes.keys() | others.keys())
        if hashes.get(key) != others.get(key)
    }
