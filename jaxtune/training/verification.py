"""Compares the inputs of a run with its record: before they are read, and while they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.adapter_files.peft import files_read
from jaxtune.checkpoints.blocks import BLOCK, hash_file
from jaxtune.checkpoints.huggingface import resolve_path
from jaxtune.checkpoints.open_model import OpenModel, open_model
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.data import Examples
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import gather
from jaxtune.runs.base import recorded_revision
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.inventory import BaseRecord, Inventory, chat_files, file_differences, listed
from jaxtune.runs.record import Record, hash_json, hash_value, read_record
from jaxtune.runs.review import MODEL, Review, short
from jaxtune.training.continue_from import source_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_START, _START_CONFIG = "adapter.init_from", "adapter.init_from.config"
# Methods with constants that are read from the initial adapter at each start.
_CONSTANT_START = ("vera",)


class Verification:
    """The checks of one start of a run; a context manager.

    Sizes, headers and small files of the base are compared when it is opened. Within the block,
    every block of its files that is read is hashed by another thread; `finish` compares them.

    Attributes:
      model: the opened base model.
    """

    def __init__(self, run: RunDirectory, config: Config, review: Review):
        """Opens the base of a run, by the commit that the run has recorded.

        Args:
          run: directory of the run, started.
          config: config of the run.
          review: the accepted changes.

        Raises:
          JaxtuneError: the base cannot be opened, or has changed.
        """
        self._run, self._config, self._review = run, config, review
        self._seconds = 0.0
        self._open = contextlib.ExitStack()
        self._inputs: dict[str, str] = {}
        self._accepted: list[str] = []
        path, revision = config.model.path, recorded_revision(run.recorded, config.model)
        directory = resolve_path(path, revision)
        with self._timed():
            self._expected, self._place = self._expectation()
            if self._expected is not None:
                self._compare(file_differences(directory, self._expected))
        self.model: OpenModel = open_model(path, revision)
        with self._timed():
            block = BLOCK if self._expected is None else self._expected.block
            self._inventory = Inventory(self.model, block)
            self._check_arrays()
            if self._expected is not None:
                self._compare(self._inventory.differences(self._expected))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin

    def _expectation(self) -> tuple[BaseRecord | None, str]:
        """Returns the record that the base must match, and what cannot be done otherwise."""
        if self._run.recorded is not None:
            return self._run.recorded.base, "cannot resume exactly"
        if not self._config.training.continue_from or self._run.has_checkpoints():
            return None, ""
        source = source_run(self._config).run
        record = read_record(source.fingerprint)
        if record is None or record.base is None:
            logger.warning(
                "%s: holds no hashes of the base model, so whether this run has the same base is "
                "not checked",
                source.fingerprint,
            )
            return None, ""
        return record.base, f"training.continue_from={source.path}"

    def _compare(self, differences: list[str]) -> None:
        """Raises if the base differs and that is not accepted; collects accepted differences."""
        differences = [line for line in differences if line not in self._accepted]
        if not differences or self._expected is None:
            return
        path, expected = self._config.model.path, self._expected
        self._review.check_text(
            MODEL,
            f"{self._place}: the base model {path} has changed: {listed(differences)}",
            (expected.digest()[:12], ", ".join([*self._accepted, *differences])),
        )
        for line in differences:
            logger.warning("accepted: the base model %s has changed: %s", path, line)
        self._accepted += differences

    def _check_arrays(self) -> None:
        """Raises if the model has other arrays than that of the run, which cannot be accepted.

        Tensors that it does not use may differ.
        """
        if self._expected is not None and self._inventory.arrays != self._expected.arrays:
            raise JaxtuneError(
                f"{self._run.path}: {self._place}: the base model {self._config.model.path} "
                "has arrays of other names or shapes than that of the run, so its checkpoints "
                "would not fit"
            )

    def __enter__(self) -> Verification:
        self._hashes = self._open.enter_context(self._inventory.hashing())
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def check_inputs(self, inputs: Mapping[str, str], chat: Mapping[str, Any]) -> None:
        """Compares hashes of the inputs with the record, and between the processes.

        Args:
          inputs: result of `fingerprint`.
          chat: content of the chat.json with which the run continues.

        Raises:
          JaxtuneError: an input has changed since the run started, or a key of the accepted changes
            is not needed.
        """
        with self._timed():
            own = {"chat": hash_value(chat)} | self._own_hashes()
            _check_processes({**inputs, **own})
            self._inputs = {**inputs, **{name: value for name, value in own.items() if value}}
        recorded = self._run.recorded
        if recorded is not None:
            names = [*inputs]
            if recorded.base is not None:
                names.remove(MODEL)  # compared file by file
                names += [_START, _START_CONFIG]
            old = {name: recorded.inputs[name] for name in names if name in recorded.inputs}
            new = {name: self._inputs[name] for name in names if name in self._inputs}
            changes = short(old, new)
            if pair := changes.pop(_START_CONFIG, None):
                changes.setdefault(_START, pair)
            self._review.check(
                changes,
                "cannot resume exactly: the inputs of the run have changed",
                f"a new run with training.continue_from={self._run.path} trains on other data"
                if "data.train" in changes
                else "restore them",
            )
        self._review.finish(later=[MODEL])

    def _own_hashes(self) -> dict[str, str]:
        """Returns hashes of files of the run and of the initial adapter.

        The names follow from the config, so that all processes compare the same ones; the hash of
        a file that a process does not see is empty.
        """
        scores = self._run.expert_scores
        hashes = {"expert_scores": hash_json(scores) if scores.is_file() else ""}
        if start := self._config.adapter.init_from:
            config, weights = files_read(Path(start))
            hashes[_START_CONFIG] = hash_json(config)
            hashes[_START] = self._kept_start() or hash_value(
                {path.name: hash_file(path) for path in [*weights, *chat_files(Path(start))]}
            )
        return hashes

    def _kept_start(self) -> str:
        """Returns the recorded hash of the initial adapter if its arrays are not used any more.

        Those of the checkpoint replace them, so the run that wrote the adapter may be trained
        further.
        """
        recorded = self._run.recorded
        if recorded is None or not self._run.steps_done():
            return ""
        constant = self._config.adapter.method in _CONSTANT_START
        return "" if constant else recorded.inputs.get(_START, "")

    def finish(self, config: Config) -> Record:
        """Compares all blocks of the base with the record, after the weights have been read.

        Args:
          config: config of the run, with the values that were derived from the devices.

        Returns:
          The record with which the run continues.

        Raises:
          JaxtuneError: a block has changed, or a key of the accepted changes is not needed.
        """
        with self._timed():
            hashes = self._hashes.complete()
            if self._expected is not None:
                self._compare(self._inventory.changed_blocks(self._expected, hashes))
            self._review.finish()
            section = config.model
            base = self._inventory.record(section.path, section.revision, hashes)
        logger.debug(
            "checks of the inputs took %.3f s; hashing took %.3f s of another thread",
            self._seconds,
            self._hashes.seconds,
        )
        return Record(self._inputs, config, base)


def _check_processes(inputs: Mapping[str, str]) -> None:
    """Raises unless the inputs of all processes are the same."""
    own = np.array([list(hashlib.sha256(inputs[name].encode()).digest()) for name in inputs])
    others = gather(own.astype(np.uint8))
    for process, other in enumerate(others):
        rows = zip(inputs, own, other, strict=True)
        if different := [name for name, one, two in rows if not np.array_equal(one, two)]:
            raise JaxtuneError(
                f"the inputs of this process and process {process} differ: {', '.join(different)}"
            )


def fingerprint(
    source: TensorSource,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Examples,
    held_out: Examples | None,
) -> dict[str, str]:
    """Returns hashes of the inputs of a run other than its config and the bytes of its base."""
    shapes = {name: source.shape(name) for name in source.names()}
    model = json.dumps([source.config, shapes], sort_keys=True, default=str)
    text = "" if tokenizer is None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(text.encode()).hexdigest(),
        "data.train": examples.fingerprint(),
        "data.eval": held_out.fingerprint() if held_out else "",
    }
