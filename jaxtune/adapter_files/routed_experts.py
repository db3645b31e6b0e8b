"""The routed experts of a model, as files of adapters name them."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.adapters.targets import linears, module_names
from jaxtune.layers.experts.moe import ExpertLinear
from jaxtune.layers.tree import declaration_of
from jaxtune.models.definition import Definition

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# The experts of a layer, the expert, its projection.
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")


class RoutedExperts(NamedTuple):
    """The routed experts of one layer.

    Attributes:
      count: how many there are.
      shapes: (out, in) of each projection, by its name.
    """

    count: int
    shapes: dict[str, tuple[int, int]]


def experts_of(definition: Definition) -> dict[str, RoutedExperts]:
    """Returns the routed experts of each layer, by names like ``model.layers.1.mlp.experts``."""
    found: dict[str, RoutedExperts] = {}
    for path, linear in linears(definition.module).items():
        if not isinstance(linear, ExpertLinear):
            continue
        count = declaration_of(linear.weight).experts or 0
        for name in module_names(path, linear)[::count]:
            match = EXPERT.fullmatch(name)
            if match is not None:
                layer = found.setdefault(match[1], RoutedExperts(count, {}))
                layer.shapes[match[3]] = (linear.out_features, linear.in_features)
    return found
