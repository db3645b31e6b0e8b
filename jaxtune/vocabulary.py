"""Checks of token ids: JAX clamps an out-of-range index without an error."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jaxtune.errors import JaxtuneError

RESIZE_HINT = "`jaxtune convert --vocab-size N` resizes the model's vocabulary to N tokens"


def check_token_ids(ids: ArrayLike, vocab_size: int, what: str) -> None:
    """Raises if token ids are outside the vocabulary of the model.

    Args:
      ids: integers of any shape.
      vocab_size: number of token ids; valid ones are 0 to `vocab_size` − 1.
      what: origin of the ids, for the message.

    Raises:
      JaxtuneError: an id is not an integer or not in the vocabulary, or rows differ in length.
    """
    try:
        values = np.asarray(ids)
    except ValueError:
        raise JaxtuneError(
            f"{what}: token ids must form an array, but rows differ in length"
        ) from None
    if not values.size:
        return
    if not np.issubdtype(values.dtype, np.integer):
        raise JaxtuneError(f"{what}: token ids must be integers, not {values.dtype}")
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        advice = f"; {RESIZE_HINT}" if outside[0] >= vocab_size else ""
        raise JaxtuneError(
            f"{what}: token id {outside[0]} is outside the model's vocabulary (ids 0 to "
            f"{vocab_size - 1}){advice}"
        )
