"""Token ids have to be rows of the embedding: JAX would take the nearest row in silence."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jaxtune.errors import JaxtuneError

ROOM = "`jaxtune convert --vocab-size N` writes the model with room for N tokens"


def check_token_ids(ids: ArrayLike, vocab_size: int, what: str) -> None:
    """Refuses token ids that the model does not have.

    Args:
      ids: of any shape.
      vocab_size: ids are from 0 to one less.
      what: has the ids, for the message.

    Raises:
      JaxtuneError: values that are not integers or not in the vocabulary; the message says how to
        enlarge it. Rows of different lengths.
    """
    try:
        values = np.asarray(ids)
    except ValueError:
        raise JaxtuneError(
            f"{what}: token ids are an array, and these rows differ in length"
        ) from None
    if not values.size:
        return
    if not np.issubdtype(values.dtype, np.integer):
        raise JaxtuneError(f"{what}: token ids are integers, not {values.dtype}")
    outside = values[(values < 0) | (values >= vocab_size)]
    if outside.size:
        advice = f"; {ROOM}" if outside[0] >= vocab_size else ""
        raise JaxtuneError(
            f"{what}: token id {outside[0]} is not in the vocabulary of the model, which has ids 0 "
            f"to {vocab_size - 1}{advice}"
        )
