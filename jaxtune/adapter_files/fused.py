"""Conversion between LoRA of single experts and of fused experts, PEFT's ``target_parameters``.

transformers stores the experts of DeepSeek-V2 and V3 as two stacked parameters, ``gate_up_proj``
and ``down_proj``, and PEFT (0.19 and later) edits these. For E experts of rank R the layout is

- ``lora_A`` [E · R, in]: expert-major, rows e · R … e · R + R − 1 belong to expert e;
- ``lora_B`` [out, R · E]: rank-major, column r · E + e belongs to rank r of expert e.

In ``gate_up_proj`` both projections share one A, whereas jaxtune has an A for each. The two edits
B_g A_g and B_u A_u are equal to one edit of twice the rank with a block-diagonal B:

    [B_g  0 ]   [A_g]
    [ 0  B_u] · [A_u]

so the conversion is exact in both directions; `split` recognises the blocks of zeros.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.adapter_files.pairs import Pair, kind_of, pairs_of
from jaxtune.adapter_files.routed_experts import EXPERT, PROJECTIONS, ExpertShapes, experts_of
from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.peft_files import PREFIX, target_modules
from jaxtune.adapters.targets import ROUTER, find_pattern
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import Definition

_log = logging.getLogger(__name__)

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Families whose experts transformers fuses. PEFT applies every target named like a projection of an
# expert to the fused parameter, also in dense layers and shared experts; there the target has to be
# the weight as a parameter, "….weight".
_FAMILIES = ("deepseek_v2", "deepseek_v3")
# Suffixes of modules that PEFT edits as parameters there; a router is not a linear layer.
_PARAMETERS = (*PROJECTIONS, ROUTER)
# First version of PEFT in which A is [·, in]; earlier ones exchanged inputs and outputs.
_FIRST_VERSION = (0, 19)
_FACTORS = re.compile(r"(.+\.experts)(\.base_layer)?\.lora_A\.weight")


class Slot(NamedTuple):
    """A module or parameter that PEFT edits as one.

    Attributes:
      rank: rank of the edit.
      alpha: value for adapter_config.json.
    """

    rank: int
    alpha: float


def fuse(stored: StoredAdapter, definition: Definition) -> StoredAdapter:
    """Returns an adapter in the form that PEFT loads over transformers' fused experts.

    Args:
      stored: an adapter in PEFT's format, with keys for each expert.
      definition: definition of the base model.

    Returns:
      The converted adapter. The adapter itself if the model has no fused experts, or, with a
      warning in the log, if PEFT supports the method only for single experts.
    """
    if definition.config.get("model_type") not in _FAMILIES:
        return stored
    if kind_of(stored) != "LoRA":
        if any(".experts." in key for key in stored.tensors):
            _log.warning(
                "PEFT cannot edit fused experts with %s: the file has keys for each expert, which "
                "jaxtune reads and PEFT does not",
                kind_of(stored),
            )
        return stored
    pairs = pairs_of(stored)
    if not any(name.endswith(_PARAMETERS) for name in pairs):
        return stored
    if stored.config.get("lora_dropout"):
        _log.info("lora_dropout is 0 in the exported adapter: PEFT has no dropout on parameters")
    rslora = bool(stored.config.get("use_rslora"))
    tensors = {
        key: value
        for key, value in stored.tensors.items()
        if not EXPERT.match(key.removeprefix(PREFIX))
    }
    modules, parameters = _unfused(pairs, rslora)
    for layer, experts in experts_of(definition).items():
        down = _fused(layer, experts, (DOWN,), pairs)
        found = {GATE_UP: _fused(layer, experts, ("gate_proj", "up_proj"), pairs), DOWN: down}
        for which, edit in found.items():
            if edit is not None:
                # PEFT wraps the experts module once per parameter; with both, down_proj is the
                # outer wrapper and gate_up_proj its base layer.
                inner = ".base_layer" if which == GATE_UP and down is not None else ""
                rank, lora_A, lora_B = edit
                parameters[f"{layer}.{which}"] = Slot(rank, _alpha(1.0, rank, rslora))
                tensors[f"{PREFIX}{layer}{inner}.lora_A.weight"] = lora_A
                tensors[f"{PREFIX}{layer}{inner}.lora_B.weight"] = lora_B
    config = stored.config | {
        "lora_dropout": 0.0,
        "target_modules": target_modules(definition, modules) if modules else [],
        "target_parameters": sorted(parameters),
        "peft_version": "0.19.0",
    }
    return StoredAdapter(config | _patterns(modules | parameters), tensors)


def _unfused(pairs: Mapping[str, Pair], rslora: bool) -> tuple[dict[str, Slot], dict[str, Slot]]:
    """Returns the edits of modules, and those of parameters that are not fused, by name."""
    modules: dict[str, Slot] = {}
    parameters: dict[str, Slot] = {}
    for name, pair in pairs.items():
        rank = len(pair.lora_A)
        slot = Slot(rank, _alpha(pair.scale, rank, rslora))
        if EXPERT.fullmatch(name):
            continue
        if name.endswith(_PARAMETERS):
            parameters[f"{name}.weight"] = slot
        else:
            modules[name] = slot
    return modules, parameters


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return int(alpha) if alpha == int(alpha) else alpha


def _fused(
    layer: str, experts: ExpertShapes, projections: Sequence[str], pairs: Mapping[str, Pair]
) -> tuple[int, np.ndarray, np.ndarray] | None:
    """Returns the rank, A and scaled B of one fused parameter; None if nothing edits it.

    A is filled as [E, R, in] and B as [out, R, E], which are PEFT's layouts before the two leading
    (trailing) axes are merged.

    Args:
      layer: name of the experts module.
      experts: shapes of the layer's experts.
      projections: projections in the parameter, in the order of its rows.
      pairs: factors by module name.
    """
    edits = [
        [pairs.get(f"{layer}.{e}.{projection}") for projection in projections]
        for e in range(experts.count)
    ]
    ranks = [max((len(p.lora_A) for p in row if p), default=0) for row in zip(*edits, strict=True)]
    if not any(ranks):
        return None
    # One A is enough if projections share it, or if only one of them is edited. Otherwise each has
    # a block of the same width, so that `split` can find the boundary.
    shared = len(set(ranks)) == 1 and all(_share(row) for row in edits)
    width = max(ranks)
    rank = width if shared or 0 in ranks else width * len(ranks)
    outs = [experts.shapes[projection][0] for projection in projections]
    lora_A = np.zeros((experts.count, rank, experts.shapes[projections[0]][1]), np.float32)
    lora_B = np.zeros((sum(outs), rank, experts.count), np.float32)
    for e, row in enumerate(edits):
        for i, pair in enumerate(row):
            if pair is None:
                continue
            first = 0 if rank == width else width * i
            inside = slice(first, first + len(pair.lora_A))
            lora_A[e, inside] = pair.lora_A
            rows = slice(sum(outs[:i]), sum(outs[: i + 1]))
            lora_B[rows, inside, e] = np.float32(pair.scale) * pair.lora_B
    return rank, lora_A.reshape(-1, lora_A.shape[-1]), lora_B.reshape(len(lora_B), -1)


def _share(row: Sequence[Pair | None]) -> bool:
    """Returns whether all projections of an expert share one A, or none of them has one."""
    pairs = [pair for pair in row if pair is not None]
    same = all(np.array_equal(pair.lora_A, pairs[0].lora_A) for pair in pairs)
    return not pairs or (same and len(pairs) == len(row))


def _patterns(slots: Mapping[str, Slot]) -> dict[str, Any]:
    common = Counter(slots.values()).most_common(1)[0][0]
    return {
        "r": common.rank,
        "lora_alpha": common.alpha,
        "rank_pattern": {n: s.rank for n, s in slots.items() if s.rank != common.rank},
        "alpha_pattern": {n: s.alpha for n, s in slots.items() if s.alpha != common.alpha},
    }


def split(stored: StoredAdapter) -> StoredAdapter:
    """Returns an adapter whose ``target_parameters`` are split into factors for each expert.

    Raises:
      JaxtuneError: the adapter was written by PEFT before 0.19, or its factors do not fit its rank.
    """
    config = stored.config
    if not config.get("target_parameters"):
        return stored
    _check_version(config)
    targets: list[str] = config["target_parameters"]
    tensors = dict(stored.tensors)
    # alpha_pattern of the result. Names of experts are patterns, as all experts of a layer agree.
    alphas: dict[str, float] = {}
    for key in stored.tensors:
        match = _FACTORS.fullmatch(key)
        if match is not None:
            layer = match[1].removeprefix(PREFIX)
            which = _which(layer, bool(match[2]), targets, stored)
            lora_A = tensors.pop(key)
            lora_B = tensors.pop(key.replace("lora_A", "lora_B"), None)
            edits, alpha = _edits(f"{layer}.{which}", lora_A, lora_B, config)
            for projection, stacks in edits.items():
                for e, (each_A, each_B) in enumerate(stacks):
                    name = f"{PREFIX}{layer}.{e}.{projection}"
                    tensors[f"{name}.lora_A.weight"] = each_A
                    tensors[f"{name}.lora_B.weight"] = each_B
                alphas[rf"{re.escape(layer)}\.\d+\.{projection}"] = alpha
        elif key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            if any(_ends(f"{name}.weight", target) for target in targets):
                alphas[re.escape(name)] = _setting(config, "alpha", f"{name}.weight")
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors if ".lora_" in key}
    return stored._replace(
        config=config
        | {
            "target_parameters": None,
            "target_modules": sorted(names),
            "alpha_pattern": alphas | dict(config.get("alpha_pattern") or {}),
        },
        tensors=tensors,
    )


def _check_version(config: Mapping[str, Any]) -> None:
    version = re.match(r"(\d{1,9})\.(\d{1,9})", str(config.get("peft_version")))
    if version is None or (int(version[1]), int(version[2])) < _FIRST_VERSION:
        raise JaxtuneError(
            'adapter_config.json: "target_parameters" with peft_version='
            f"{config.get('peft_version')!r} have another layout than since 0.19: train the "
            "adapter with a newer PEFT, or merge it there"
        )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _which(layer: str, inner: bool, targets: Sequence[str], stored: StoredAdapter) -> str:
    """Returns the parameter, gate_up_proj or down_proj, that factors of a layer's experts edit."""
    both = f"{PREFIX}{layer}.base_layer.lora_A.weight" in stored.tensors
    found = [p for p in (GATE_UP, DOWN) if any(_ends(f"{layer}.{p}", t) for t in targets)]
    if both and found == [GATE_UP, DOWN]:
        return GATE_UP if inner else DOWN
    if not both and len(found) == 1:
        return found[0]
    raise JaxtuneError(
        f"adapter_model.safetensors: the factors of {layer} do not match "
        f'"target_parameters"={list(targets)!r}'
    )


def _setting(config: Mapping[str, Any], which: str, name: str) -> float:
    """Returns the rank or the alpha of a parameter."""
    patterns = config.get(f"{which}_pattern") or {}
    pattern = find_pattern(patterns, name, f'adapter_config.json: "{which}_pattern"')
    default = config.get("r" if which == "rank" else "lora_alpha", 8)
    value = default if pattern is None else patterns[pattern]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise JaxtuneError(f"adapter_config.json: the {which} of {name} is {value!r}")
    return value


def _edits(
    name: str, lora_A: np.ndarray, lora_B: np.ndarray | None, config: Mapping[str, Any]
) -> tuple[dict[str, list[tuple[np.ndarray, np.ndarray]]], float]:
    """Returns the factors (A, B) of every expert by projection, and their alpha.

    PEFT's A [E · R, in] and B [out, R · E] become stacks [E, R, in] and [E, out, R].
    """
    rank, alpha = int(_setting(config, "rank", name)), _setting(config, "alpha", name)
    if lora_B is None or lora_A.ndim != 2 or lora_B.ndim != 2 or not lora_A.size * lora_B.size:
        raise JaxtuneError(f'adapter_model.safetensors: "{name}" lacks a factor')
    if len(lora_A) % rank or lora_B.shape[1] != len(lora_A):
        raise JaxtuneError(
            f"adapter_model.safetensors: the factors of {name} have {len(lora_A)} rows and "
            f"{lora_B.shape[1]} columns, which do not divide into experts of rank {rank}"
        )
    stack_A = lora_A.reshape(-1, rank, lora_A.shape[1])
    stack_B = np.moveaxis(lora_B.reshape(len(lora_B), rank, -1), -1, 0)
    if name.endswith(DOWN):
        return {DOWN: list(zip(stack_A, stack_B, strict=True))}, alpha
    # If B is block diagonal, each projection takes its half of the ranks; otherwise both keep all
    # of the shared A.
    half, out = rank // 2, len(lora_B) // 2
    gate, up = stack_B[:, :out], stack_B[:, out:]
    blocks = (
        rank % 2 == 0 and stack_B.any() and not (gate[..., half:].any() or up[..., :half].any())
    )
    if not blocks:
        return {
            "gate_proj": list(zip(stack_A, gate, strict=True)),
            "up_proj": list(zip(stack_A, up, strict=True)),
        }, alpha
    # The scale is alpha / rank (or / √rank), so half the rank takes alpha / 2 (or / √2).
    return {
        "gate_proj": list(zip(stack_A[:, :half], gate[..., :half], strict=True)),
        "up_proj": list(zip(stack_A[:, half:], up[..., half:], strict=True)),
    }, alpha / (math.sqrt(2) if config.get("use_rslora") else 2)
