"""Names and shapes of a model's routed experts, for adapter files."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.adapters.targets import module_names
from jaxtune.models.definition import Definition

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Groups: the experts module of a layer, the number of the expert, its projection.
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")


class ExpertShapes(NamedTuple):
    """The routed experts of one layer.

    Attributes:
      count: number of experts.
      shapes: (out, in) of each projection by name.
    """

    count: int
    shapes: dict[str, tuple[int, int]]


def experts_of(definition: Definition) -> dict[str, ExpertShapes]:
    """Returns the routed experts of each layer, by names like ``model.layers.1.mlp.experts``."""
    found: dict[str, ExpertShapes] = {}
    for path, linear in definition.projections().items():
        if linear.experts is None:
            continue
        for name in module_names(path, linear)[:: linear.experts]:
            match = EXPERT.fullmatch(name)
            if match is not None:
                layer = found.setdefault(match[1], ExpertShapes(linear.experts, {}))
                layer.shapes[match[3]] = (linear.out_features, linear.in_features)
    return found
