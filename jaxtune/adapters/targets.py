"""Selection of the modules that a method edits, by name, pattern and layer."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import regex

from jaxtune.errors import BAD_PATTERN, JaxtuneError, closest
from jaxtune.layers.linear import Projection
from jaxtune.layers.tree import Path, declaration_of, layer_names

ALL_LINEAR = "all-linear"
# Words that stand for the same modules in every family, as patterns of whole module names. The head
# and the routers are in none of them.
ALIASES = {
    "attention": re.compile(r".*\.self_attn\.[^.]+"),
    # Dense feed-forward layers and shared experts.
    "mlp": re.compile(r".*\.mlp\.(?!gate$|experts\.).+"),
    # Routed experts.
    "experts": re.compile(r".*\.mlp\.experts\..+"),
    "all": re.compile(r"(?!lm_head$)(?!.*\.mlp\.gate$).+"),
}
ALIASES[ALL_LINEAR] = ALIASES["all"]
# Advice for a model whose head is tied to its embedding.
UNTIE = "jaxtune convert --untie writes a checkpoint with a separate head"
TIED_HEAD = f"lm_head is tied to embed_tokens in this model (tie_word_embeddings): {UNTIE}"
_MAX_LAYERS = 10_000  # bounds the memory of a range
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_REGEX = re.compile(r"[*+?\[\](){}|^$\\]")
_SECONDS = 1  # the longest time to match a regular expression of a file; Python's re has no limit
# Suffix of a router's name, in every family that has routers.
ROUTER = ".mlp.gate"


def module_names(path: Path, module: Projection) -> list[str]:
    """Returns the Hugging Face names of a module, one per layer of its block (and per expert)."""
    return layer_names(path, declaration_of(module.weight))


def match_targets(
    targets: Sequence[str], names: Iterable[str], key: str = "adapter.targets"
) -> set[str]:
    """Returns the modules that match `targets`.

    Args:
      targets: each is the end of a module's path (``q_proj``, ``mlp.up_proj``), a word of `ALIASES`
        (``attention``, ``mlp``, ``experts``, and ``all`` or ``all-linear`` for every projection
        except the head and routers), or a regular expression of the whole path, which never
        matches a router.
      names: Hugging Face names of all projections.
      key: name of the setting, for messages.

    Raises:
      JaxtuneError: a target that matches nothing, or an invalid expression; the message lists
        what exists.
    """
    names = list(names)
    matched: set[str] = set()
    for target in targets:
        found = {name for name in names if _matches(target, name, key)}
        if not found:
            if target == "lm_head":
                raise JaxtuneError(f"{key}: {TIED_HEAD}")
            if target == "experts":
                raise JaxtuneError(f'{key}: "experts" matches no module: none has routed experts')
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise JaxtuneError(
                f'{key}: "{target}" matches no module{closest(target, [*known, *ALIASES])} '
                f"(there are: {', '.join(known)}; or for several: {', '.join(ALIASES)})"
            )
        matched |= found
    return matched


def _matches(target: str, name: str, key: str) -> bool:
    if target in ALIASES:
        return ALIASES[target].fullmatch(name) is not None
    if _REGEX.search(target):
        try:
            # Patterns such as ".*mlp.*" are meant for projections; routers have to be named.
            return re.fullmatch(target, name) is not None and not name.endswith(ROUTER)
        except BAD_PATTERN as error:
            raise JaxtuneError(
                f'{key}: "{target}" is not a valid regular expression: {error}'
            ) from None
    return name == target or name.endswith("." + target)


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that contains a module, or None."""
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


def is_target(targets: Sequence[str], layers: Collection[int], name: str) -> bool:
    """Returns whether `targets`, in these layers or in all, match a module's name."""
    inside = not layers or layer_of(name) in layers
    return inside and any(_matches(target, name, "adapter.targets") for target in targets)


def _is_less(text: str, other: str) -> bool:
    """Compares numbers of any number of digits."""
    text, other = text.lstrip("0"), other.lstrip("0")
    return (len(text), text) < (len(other), other)


def parse_layers(text: str) -> tuple[int, ...]:
    """Parses ``adapter.layers``, such as ``0,4-7``; an empty result stands for all layers.

    Raises:
      JaxtuneError: an entry is neither a layer number nor a range.
    """
    layers: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if ends is None or _is_less(ends[2] or ends[1], ends[1]):
            raise JaxtuneError(f'adapter.layers: "{part}" is neither a layer nor a range like 4-7')
        last = ends[2] or ends[1]
        if len(last) > len(str(_MAX_LAYERS)) or int(last) >= _MAX_LAYERS:  # before building it
            raise JaxtuneError(
                f'adapter.layers: "{part[:40]}": no model has {_MAX_LAYERS:,} layers'
            )
        layers |= set(range(int(ends[1]), int(last) + 1))
    return tuple(sorted(layers))


def in_layers(names: Iterable[str], layers: Collection[int]) -> list[str]:
    """Returns the modules in the given layers; all modules if `layers` is empty.

    Raises:
      JaxtuneError: no module is in one of the layers.
    """
    names = list(names)
    if not layers:
        return names
    found = {name: layer for name in names if (layer := layer_of(name)) is not None}
    for layer in layers:
        if layer not in found.values():
            raise JaxtuneError(
                f"adapter.layers: there is no layer {layer} (the last is {max(found.values())})"
            )
    return [name for name, layer in found.items() if layer in layers]


def find_pattern(patterns: Mapping[str, Any], name: str, key: str) -> str | None:
    """Returns the first pattern that matches the end of a module's path, as PEFT does.

    Args:
      patterns: settings by regular expression.
      name: Hugging Face name of the module.
      key: name of the setting, for messages.

    Raises:
      JaxtuneError: an invalid expression.
    """
    matches = (one for one in patterns if match_pattern(rf"(.*\.)?({one})$", name, key))
    return next(matches, None)


def match_pattern(pattern: str, text: str, key: str, *, whole: bool = False) -> Any:
    """Returns the match of an untrusted regular expression with the start of a text, or None.

    Args:
      pattern: the expression.
      text: the text.
      key: name of the setting, for messages.
      whole: the match has to extend to the end of the text.

    Raises:
      JaxtuneError: an invalid expression, or one that takes longer than `_SECONDS` to match.
    """
    try:
        match = regex.fullmatch if whole else regex.match
        return match(pattern, text, timeout=_SECONDS)
    except (regex.error, OverflowError) as error:
        raise JaxtuneError(f"{key} has an invalid regular expression: {error}") from None
    except TimeoutError:
        raise JaxtuneError(
            f"{key} has a regular expression that takes longer than {_SECONDS} s to match {text}"
        ) from None


def parse_patterns(key: str, entries: Iterable[str]) -> dict[str, float]:
    """Parses a setting whose entries are ``pattern=number``.

    Raises:
      JaxtuneError: an entry of another form.
    """
    patterns: dict[str, float] = {}
    for entry in entries:
        pattern, equals, number = entry.rpartition("=")
        try:
            patterns[pattern] = float(number)
            # A nested pattern may compile here and exceed the recursion limit as part of another.
            if not math.isfinite(patterns[pattern]) or pattern.count("(") > 100:
                equals = ""
            re.compile(pattern)
        except (ValueError, *BAD_PATTERN):
            equals = ""
        if not equals:
            raise JaxtuneError(
                f'{key}: "{entry}" is not a pattern and its number, such as up_proj=8'
            )
    return patterns
