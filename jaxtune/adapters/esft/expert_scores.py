"""Relevance scores of routed experts for a data set, and the selection of experts by score.

Source: Wang et al., 2024 (ESFT), equations 5 to 8. File formats are those of its authors' code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import read_object

# (layer, its chosen experts in ascending order), in the order of layers.
Choice = tuple[tuple[int, tuple[int, ...]], ...]
# Slack on the sum of a layer's scores, since those on disk may be rounded to four digits.
_ROUNDED = 0.99


class ExpertScores(NamedTuple):
    """Scores of every expert, by layer.

    Attributes:
      token: fraction of the router's top-k selections that went to each expert; sums to 1 over
        the experts of a layer.
      gate: routing weight of each expert averaged over tokens, before `routed_scaling_factor`;
        sums to 1 over a layer if the router normalizes its weights, otherwise to less.
    """

    token: dict[int, list[float]]
    gate: dict[int, list[float]]

    def choose(self, kind: str, threshold: float) -> Choice:
        """Returns, for each layer, the smallest set of experts whose scores reach the threshold.

        Args:
          kind: "token" or "gate".
          threshold: between 0 and 1.

        Raises:
          JaxtuneError: the scores of a layer sum to less than the threshold.
        """
        return tuple(
            (layer, _fewest(layer, scores, threshold))
            for layer, scores in sorted(getattr(self, kind).items())
        )

    def to_json(self) -> str:
        """Returns the scores in the format of ESFT's summary.json."""
        tables = {"token_scores": self.token, "gate_scores": self.gate}
        content = {
            name: {str(layer): dict(enumerate(scores)) for layer, scores in table.items()}
            for name, table in tables.items()
        }
        return json.dumps(content) + "\n"


def _fewest(layer: int, scores: list[float], threshold: float) -> tuple[int, ...]:
    if math.fsum(scores) < threshold * _ROUNDED:
        raise JaxtuneError(
            f"adapter.expert_threshold={threshold:g} is out of reach: the scores of layer {layer} "
            f"sum to {math.fsum(scores):.3g}"
        )
    chosen: list[int] = []
    total = 0.0
    for expert in sorted(range(len(scores)), key=lambda e: -scores[e]):
        if total >= threshold:
            break
        chosen.append(expert)
        total += scores[expert]
    return tuple(sorted(chosen))


def read_scores(path: str | Path) -> ExpertScores:
    """Reads scores written by `ExpertScores.to_json` or by ESFT's own program.

    Raises:
      JaxtuneError: the file is missing or has another format.
    """
    content = _read(path)
    try:
        tables = [
            {int(layer): [float(row[str(e)]) for e in range(len(row))] for layer, row in t.items()}
            for t in (content["token_scores"], content["gate_scores"])
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise JaxtuneError(
            f"{path}: holds no scores of experts (token_scores and gate_scores by layer)"
        ) from None
    return ExpertScores(*tables)


def read_choice(path: str | Path, kind: str, threshold: float) -> Choice:
    """Returns the experts selected by a file of scores, or listed in ESFT's expert config.

    Raises:
      JaxtuneError: the file is missing or invalid, or the threshold is out of reach.
    """
    content = _read(path)
    if "experts" in content:
        return parse_choice(content, str(path))
    return read_scores(path).choose(kind, threshold)


def parse_choice(content: Mapping[str, Any], file: str) -> Choice:
    """Returns the experts that ESFT's expert config lists.

    Raises:
      JaxtuneError: another format, or a config that also trains other modules.
    """
    for key in ("shared_experts", "non_expert_modules"):
        if content.get(key):
            raise JaxtuneError(f'{file}: "{key}"={content[key]!r} is not supported')
    try:
        chosen = {
            int(layer): tuple(sorted({int(e) for e in experts}))
            for layer, experts in content["experts"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise JaxtuneError(f'{file}: "experts" is not a list of experts per layer') from None
    return tuple(sorted((layer, experts) for layer, experts in chosen.items() if experts))


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).exists():
        raise JaxtuneError(f"{path}: no such file of expert scores")
    return read_object(path)
