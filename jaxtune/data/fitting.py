"""Rows that are longer than data.max_length: what of them becomes examples."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np

from jaxtune.chats.tokens import IGNORE
from jaxtune.errors import JaxtuneError

TOO_LONG = ("error", "drop", "truncate", "truncate_start", "windows")


class OverLong(JaxtuneError):
    """A row of more than max_length tokens where that is an error."""


class Limits(Protocol):
    """The settings that are read here: ``data.max_length`` and ``data.too_long``."""

    @property
    def max_length(self) -> int:
        """The most tokens of an example."""
        ...

    @property
    def too_long(self) -> str:
        """What becomes of a longer row: one of `TOO_LONG`."""
        ...


def fit_to_length(
    tokens: np.ndarray, labels: np.ndarray, limits: Limits, place: str, counts: Counter[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the examples that a row makes: tokens and targets, int32[n], n ≤ max_length.

    Args:
      tokens: int[n].
      labels: int[n], aligned with the tokens.
      limits: how long an example may be.
      place: of the row, for messages.
      counts: takes what is done to the row: ``drop``, ``truncate``, ``windows``, ``windowed``.

    Raises:
      OverLong: the row is too long, and that is an error.
      JaxtuneError: no token of the row is a target.
    """
    limit, too_long = limits.max_length, limits.too_long
    targets = np.full(len(tokens), IGNORE, np.int32)
    targets[:-1] = labels[1:]
    tokens, cut = tokens.astype(np.int32), len(tokens) > limit
    if cut and too_long == "error":
        raise OverLong(
            f"{place}: {len(tokens)} tokens, and data.max_length is {limit}: raise it, or set "
            f"data.too_long to {', '.join(TOO_LONG[1:-1])} or {TOO_LONG[-1]}"
        )
    pieces = _split(tokens, targets, limit, too_long) if cut else [(tokens, targets)]
    kept = [piece for piece in pieces if (piece[1] != IGNORE).any()]
    if pieces and not kept:
        where = f" within data.max_length={limit} tokens" if cut else ", so nothing to learn"
        raise JaxtuneError(f"{place}: no target{where}")
    if cut:
        kind = "truncate" if too_long.startswith("truncate") else too_long
        counts[kind] += len(kept) if kind == "windows" else 1
        counts["windowed"] += kind == "windows"
    return kept


def _split(
    tokens: np.ndarray, targets: np.ndarray, limit: int, too_long: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns what of a longer row is left: pieces of at most `limit` tokens, int32[n] each."""
    if too_long == "drop":
        return []
    if too_long == "truncate":
        # What the last token would predict is cut off.
        return [(tokens[:limit], np.append(targets[: limit - 1], np.int32(IGNORE)))]
    if too_long == "truncate_start":
        return [(tokens[-limit:], targets[-limit:])]
    # The last token of a window predicts the first of the next: every target is in one of them.
    starts = range(0, len(tokens), limit)
    return [(tokens[i : i + limit], targets[i : i + limit]) for i in starts]
