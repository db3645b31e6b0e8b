"""Reports on a data set: statistics, and examples with highlighted targets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from jaxtune.chats.tokens import IGNORE
from jaxtune.data.encode import Problem
from jaxtune.data.examples import Examples
from jaxtune.data.passes import DataOrder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BARS, _BAR_WIDTH = 10, 40
LEARNED, GIVEN = "bold green", "dim"


def statistics(
    examples: Examples,
    problems: Sequence[Problem] = (),
    order: DataOrder | None = None,
    other_side: int | None = None,
) -> dict[str, Any]:
    """Returns the statistics of a data set, JSON-serializable.

    Rows read = rows + other side + dropped + rejected. Counts of changes that are made before the
    data is split (``dropped`` to ``windowed``, ``merged``, ``turns``) include both sides.

    Args:
      examples: one or more examples.
      problems: rejected rows.
      order: order of the examples, for the size of a pass and the packing efficiency.
      other_side: number of rows of the same source in the other split; None: no split.
    """
    lengths = examples.lengths
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    reasons: dict[str, dict[str, Any]] = {}
    for problem in problems:
        # Messages that differ only in numbers have the same reason.
        entry = reasons.setdefault(
            re.sub(r"\d+", "N", problem.reason), {"rows": 0, "first": problem.message}
        )
        entry["rows"] += 1
    numbers: dict[str, Any] = {
        "sources": [part._asdict() for part in examples.parts],
        "rows_read": examples.rows_read,
        "rows": examples.row_count,
        **({} if other_side is None else {"other_side": other_side}),
        "examples": len(examples),
        "tokens": examples.token_count,
        "targets": examples.target_count,
        "lengths": {
            "shortest": int(lengths.min()),
            "5%": float(low),
            "median": float(middle),
            "95%": float(high),
            "longest": int(lengths.max()),
        },
        "histogram": _histogram(lengths),
        "duplicates": examples.duplicates,
        "dropped": examples.dropped,
        "truncated": examples.truncated,
        "windows": examples.windows,
        "windowed": examples.windowed,
        "merged": examples.merged,
        "turns": dict(examples.turns),
        "unread": list(examples.unread),
        "rejected": reasons,
    }
    if order is not None:
        plan = order.plan(0)
        numbers["pass"] = {
            "rows": int(plan.shown[-1]),
            "steps": plan.steps,
            "tokens": int(plan.tokens[-1]),
        }
        numbers["packing_efficiency"] = order.filled(plan)
    return numbers


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Returns the number of examples in intervals of equal width, from lengths int64[examples]."""
    counts, edges = np.histogram(lengths, bins=_BARS, range=(0, int(lengths.max()) + 1))
    return [
        {"from": int(np.ceil(start)), "below": int(np.ceil(stop)), "examples": int(count)}
        for count, (start, stop) in zip(counts, itertools.pairwise(edges), strict=True)
    ]


def render_statistics(name: str, numbers: Mapping[str, Any]) -> str:
    """Formats the result of `statistics` as text."""
    lines = [f"{name}"]
    for source in numbers["sources"]:
        weight = "" if source["weight"] == 1 else f", weight {source['weight']:g}"
        lines.append(
            f"  {source['name']}: {source['count']:,} examples, format {source['form']}{weight}"
        )
    share = numbers["targets"] / numbers["tokens"]
    lines.append(f"  rows read     {numbers['rows_read']:>12,}")
    lines.append(f"  rows          {numbers['rows']:>12,}")
    both = ""
    if "other_side" in numbers:
        both = "  (of all rows read)"
        lines.append(f"  other side    {numbers['other_side']:>12,}  (data.eval_split)")
    lines.append(f"  examples      {numbers['examples']:>12,}")
    lines.append(f"  tokens        {numbers['tokens']:>12,}")
    lines.append(f"  targets       {numbers['targets']:>12,}  ({share:.1%} of the tokens)")
    if "packing_efficiency" in numbers:
        shown = numbers["pass"]
        lines.append(f"  one pass      {shown['rows']:>12,} in {shown['steps']:,} batches")
        lines.append(f"  batches filled{numbers['packing_efficiency']:>12.1%}")
    if "run" in numbers:
        lines.append(f"  the run       {numbers['run']['text']}")
    lines.append(f"  duplicates    {numbers['duplicates']:>12,}")
    for key in ("dropped", "truncated", "windows", "windowed", "merged"):
        lines.append(f"  {key:<14}{numbers[key]:>12,}{both}")
    lines += [f"  turns: {what} {count:>12,}{both}" for what, count in numbers["turns"].items()]
    if "held_out_too" in numbers:
        lines.append(f"  also held out {numbers['held_out_too']:>12,}")
    if numbers["unread"]:
        lines.append(f"  unused keys: {', '.join(numbers['unread'])}")
    lengths = ", ".join(f"{key} {value:g}" for key, value in numbers["lengths"].items())
    lines.append(f"  lengths: {lengths}")
    highest = max(bar["examples"] for bar in numbers["histogram"])
    for bar in numbers["histogram"]:
        filled = "█" * -(-bar["examples"] * _BAR_WIDTH // highest)
        lines.append(f"  {bar['from']:>8,} – {bar['below'] - 1:<8,} {bar['examples']:>9,} {filled}")
    if numbers["rejected"]:
        lines.append("  rejected rows")
        order = sorted(numbers["rejected"].items(), key=lambda item: -item[1]["rows"])
        lines += [f"  {entry['rows']:>8,}  e.g. {entry['first']}" for _, entry in order]
    return "\n".join(lines)


def show_example(
    examples: Examples, index: int, tokenizer: PreTrainedTokenizerBase | None, *, marks: bool
) -> Text:
    """Returns an example as text with highlighted targets.

    Args:
      examples: a data set.
      index: index of the example.
      tokenizer: decodes the tokens; None: shows their ids.
      marks: whether to enclose targets in ⟦ ⟧, for output without colors.
    """
    tokens, targets = examples.tokens[index], examples.targets[index]
    # targets[t] is the token at t + 1.
    learned = np.concatenate([[False], targets[:-1] != IGNORE])
    count = int(np.count_nonzero(targets != IGNORE))
    text = Text(f"{examples.places[index]}: {len(tokens)} tokens, {count} targets\n")
    start = 0
    for target, run in itertools.groupby(learned):
        stop = start + sum(1 for _ in run)
        piece = _text_of(tokens[start:stop].tolist(), tokenizer)
        text.append(f"⟦{piece}⟧" if marks and target else piece, LEARNED if target else GIVEN)
        start = stop
    return text.append("\n")


def _text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # An escape character would start a control sequence of the terminal.
    return str(text).replace("\x1b", "␛")


def count_overlap(train: Examples, held_out: Examples) -> int:
    """Returns the number of training examples that are also held out."""
    if train.contents is None or held_out.contents is None:
        return 0
    return int(np.isin(train.contents, held_out.contents).sum())
