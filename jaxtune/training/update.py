"""The update as the loop calls it, compiled at its first call."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.layers.tree import Tree
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState

logger = logging.getLogger(__name__)

GIB = 2**30


class Update:
    """``(state, batch) → (state, metrics as scalars)``, over a base that stays as it is."""

    def __init__(self, setup: Setup, base: Tree, constants: Tree):
        """Compiles nothing yet.

        Args:
          setup: of the run.
          base: frozen tree.
          constants: of the method.
        """
        self._setup, self._base, self._constants = setup, base, constants
        self._compiled: Any = None

    def __call__(
        self, state: TrainState, batch: Mapping[str, Any]
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        """Makes an update from a batch of NumPy arrays int[rows, T]; the state is donated."""
        arguments = (state, self._base, self._constants, self._setup.put_batch(batch))
        if self._compiled is None:
            self._compiled = self._compile(arguments)
        return self._compiled(*arguments)

    def _compile(self, arguments: tuple[Any, ...]) -> Any:
        """Compiles once for all updates, and says what the compiler says of the memory."""
        begin = time.monotonic()
        compiled = self._setup.train_step().lower(*arguments).compile()
        seconds, memory = time.monotonic() - begin, compiled.memory_analysis()
        logger.info(
            "compiled in %.1f s; each device holds %.2f GiB of arrays and %.2f GiB of temporaries",
            seconds,
            memory.argument_size_in_bytes / GIB,
            memory.temp_size_in_bytes / GIB,
        )
        return compiled
