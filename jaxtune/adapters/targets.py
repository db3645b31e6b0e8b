"""Which modules a method attaches to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flax import nnx

from jaxtune.errors import JaxtuneError, closest
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import Linear
from jaxtune.layers.moe import ExpertLinear
from jaxtune.layers.tree import Path, declaration_of, layer_names

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[*+?\[\](){}|^$\\]")


Projection = Linear | ExpertLinear


def linears(model: CausalLM) -> dict[Path, Projection]:
    """Returns every projection of a model by path; a run of stacked layers counts once."""
    return {
        tuple(str(part) for part in path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (Linear, ExpertLinear))
    }


def module_names(path: Path, module: Projection) -> list[str]:
    """Returns the Hugging Face module name in each layer of the run, and of each expert."""
    return layer_names(path, declaration_of(module.weight))


def match_targets(
    targets: Sequence[str], names: Iterable[str], key: str = "adapter.targets"
) -> set[str]:
    """Returns the modules that `targets` name.

    Args:
      targets: each is the end of a module's path (``q_proj``, ``mlp.up_proj``), ``all-linear``
        (every projection but the head), or a regular expression of the whole path.
      names: the Hugging Face names of all projections.
      key: the setting that the targets are from, for messages.

    Raises:
      JaxtuneError: a target that matches nothing, or an invalid expression; the message lists
        what exists.
    """
    names = list(names)
    matched: set[str] = set()
    for target in targets:
        found = {name for name in names if _matches(target, name, key)}
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise JaxtuneError(
                f'{key}: "{target}" matches no module{closest(target, known)} '
                f"(there are: {', '.join(known)})"
            )
        matched |= found
    return matched


def _matches(target: str, name: str, key: str) -> bool:
    if target == ALL_LINEAR:
        return name != "lm_head"
    if _REGEX.search(target):
        try:
            return re.fullmatch(target, name) is not None
        except re.error as error:
            raise JaxtuneError(f'{key}: "{target}" is no valid expression: {error}') from None
    return name == target or name.endswith("." + target)
