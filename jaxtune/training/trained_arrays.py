"""The trained arrays of a run, opened from its checkpoints."""

from __future__ import annotations

from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import Tree
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory


def trained_arrays(run: RunDirectory, like: Tree, which: str = "last") -> Tree:
    """Opens the trainables of an undamaged checkpoint of a run; nothing is read yet.

    Args:
      run: directory of the run.
      like: abstract tree of the trainables.
      which: "last", or "best" for the best evaluation (the last step if there was none).

    Returns:
      The tree of trainables, with a `StoredArray` for each array.

    Raises:
      JaxtuneError: the run has no checkpoint yet.
    """
    with Checkpoints(run.checkpoints, run.read_config().checkpoint.keep) as checkpoints:
        step = checkpoints.latest_verified(quarantine=False)
        if step is None:
            raise JaxtuneError(f"{run.path}: the run has no checkpoint yet")
        step = checkpoints.best_step(step) if which == "best" else step
        return checkpoints.open_part(step, "trainable", like)
