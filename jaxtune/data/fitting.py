"""Fits rows to data.max_length: rejects, drops, truncates or splits longer ones."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np

from jaxtune.chats.tokens import IGNORE
from jaxtune.config import OPTIONS
from jaxtune.errors import JaxtuneError

TOO_LONG = tuple(OPTIONS["data.too_long"].choices)


class OverLong(JaxtuneError):
    """Raised for a row of more than max_length tokens if too_long is ``error``."""


def over_long(place: str, count: str, limit: int) -> OverLong:
    """Returns the error of a row whose tokens, described by `count`, exceed the limit."""
    return OverLong(
        f"{place}: {count} tokens exceed data.max_length={limit}; increase it, or set "
        f"data.too_long to {', '.join(TOO_LONG[1:-1])} or {TOO_LONG[-1]}"
    )


class Limits(Protocol):
    """The settings ``data.max_length`` and ``data.too_long``."""

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of an example."""
        ...

    @property
    def too_long(self) -> str:
        """Treatment of longer rows, one of `TOO_LONG`."""
        ...


def fit_to_length(
    tokens: np.ndarray, labels: np.ndarray, limits: Limits, place: str, counts: Counter[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the examples of a row: pairs of tokens and targets, int32[m], m ≤ max_length.

    Targets are the labels shifted by one: ``targets[t]`` is ``labels[t + 1]``, the token that the
    model should predict at t.

    Args:
      tokens: int[n], token ids of the row.
      labels: int[n], the same ids where a token is trained on, otherwise `IGNORE`.
      limits: maximum length and treatment of longer rows.
      place: location of the row, for errors.
      counts: counts of ``drop``, ``truncate``, ``windows`` and ``windowed``, updated in place.

    Raises:
      OverLong: the row is too long, and ``too_long`` is ``error``.
      JaxtuneError: no token of the row is a target.
    """
    limit, too_long = limits.max_length, limits.too_long
    targets = np.full(len(tokens), IGNORE, np.int32)
    targets[:-1] = labels[1:]
    tokens, cut = tokens.astype(np.int32), len(tokens) > limit
    if cut and too_long == "error":
        raise over_long(place, str(len(tokens)), limit)
    pieces = _split(tokens, targets, limit, too_long) if cut else [(tokens, targets)]
    kept = [piece for piece in pieces if (piece[1] != IGNORE).any()]
    if pieces and not kept:
        where = f" within data.max_length={limit} tokens" if cut else ""
        raise JaxtuneError(f"{place}: no target tokens{where}, nothing to train on")
    if cut:
        kind = "truncate" if too_long.startswith("truncate") else too_long
        counts[kind] += len(kept) if kind == "windows" else 1
        counts["windowed"] += kind == "windows"
    return kept


def _split(
    tokens: np.ndarray, targets: np.ndarray, limit: int, too_long: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the pieces to keep of a row that is longer than `limit`, int32[m], m ≤ `limit`."""
    if too_long == "drop":
        return []
    if too_long == "truncate":
        # The target of the last kept token is the first token that is cut off.
        return [(tokens[:limit], np.append(targets[: limit - 1], np.int32(IGNORE)))]
    if too_long == "truncate_start":
        return [(tokens[-limit:], targets[-limit:])]
    # The target of a window's last token is the first token of the next window: none is lost.
    starts = range(0, len(tokens), limit)
    return [(tokens[i : i + limit], targets[i : i + limit]) for i in starts]
