"""Opens the base model of a run for commands that only read, and compares it with the record."""

from __future__ import annotations

import logging

from jaxtune.checkpoints.huggingface import resolve_path
from jaxtune.checkpoints.open_model import OpenModel, open_model
from jaxtune.config import Config, ModelConfig
from jaxtune.runs.inventory import Inventory, file_differences, listed
from jaxtune.runs.paths import RunFiles
from jaxtune.runs.record import DamagedRecord, Record, read_record

logger = logging.getLogger(__name__)


def recorded_revision(record: Record | None, model: ModelConfig) -> str:
    """Returns the revision of the base to open: the commit that the run has resolved.

    Args:
      record: record of the run, if it has one.
      model: the ``model`` section, which may name another base or revision than the record.
    """
    base = None if record is None else record.base
    if base is None or (base.path, base.revision) != (model.path, model.revision):
        return model.revision
    return base.commit or model.revision


def base_revision(run: RunFiles, config: Config) -> str:
    """Returns `recorded_revision`; warns if the record is damaged."""
    return recorded_revision(_record(run), config.model)


def open_base(run: RunFiles, config: Config) -> OpenModel:
    """Opens the base model of a run, by the commit that the run has recorded.

    Sizes, headers and the content of small files are compared with the record. A difference is a
    warning: reading damages nothing, and the weights may be the same in other files.

    Raises:
      JaxtuneError: the base cannot be opened.
    """
    record = _record(run)
    revision = recorded_revision(record, config.model)
    base = None if record is None else record.base
    differences: list[str] = []
    if base is not None:
        differences = file_differences(resolve_path(config.model.path, revision), base)
    model = open_model(config.model.path, revision)
    if base is not None:
        differences = differences or Inventory(model).differences(base)
    if differences:
        logger.warning(
            "%s: the base model %s is not the one that the run has trained on: %s",
            *(run.path, config.model.path, listed(differences)),
        )
    return model


def _record(run: RunFiles) -> Record | None:
    try:
        return read_record(run.fingerprint)
    except DamagedRecord as error:
        logger.warning("%s, so the base model is not compared with it", error)
        return None
