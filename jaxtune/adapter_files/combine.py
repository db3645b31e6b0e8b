"""Combining LoRA adapters of one base into one, in the ways that PEFT knows, by its names.

``cat`` and ``svd`` are the weighted sum of the edits: exactly, and as the best of its rank.
``linear`` sums factors and not their products, so that edits meet in cross terms. The others
prune first: ``ties`` keeps the largest values, and of those the ones whose sign prevails;
``dare_linear`` drops values at random and scales the rest up. With ``_svd`` they see the edits
[out, in] themselves, at the cost of forming them, and not the factors.

Sources: Ilharco et al., 2023 (task arithmetic); Yadav et al., 2023 (TIES); Yu et al., 2024 (DARE);
sums of factors: PEFT, `LoraModel.add_weighted_adapter`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.adapter_files.pairs import Pair, kind_of, pairs_of, plain_config
from jaxtune.adapters.method import BASE_COPY, StoredAdapter
from jaxtune.adapters.projections.modules_to_save import whole_weights
from jaxtune.adapters.projections.peft_files import PREFIX
from jaxtune.errors import JaxtuneError, lookup

MAJORITIES = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Options:
    """How adapters are combined, besides their weights.

    Attributes:
      rank: of what comes out of a singular value decomposition; 0 for the largest that goes in.
      density: the share of values that pruning keeps.
      majority: a sign prevails by the "total" of the values that have it or by its "frequency".
      seed: of what is dropped at random.
    """

    rank: int = 0
    density: float = 0.5
    majority: str = "total"
    seed: int = 0

    def __post_init__(self):
        if self.rank < 0:
            raise JaxtuneError(f"rank={self.rank} of a combination is negative")
        if not 0 < self.density <= 1:
            raise JaxtuneError(f"density={self.density} of a combination is not within 0 and 1")
        lookup(dict.fromkeys(MAJORITIES), self.majority, "majority")


Generator = np.random.Generator
# Prunes an array.
Prune = Callable[[np.ndarray, Options, Generator], np.ndarray]
# Merges arrays of one shape, stacked along a leading axis, with a float32 weight for each.
Merge = Callable[[np.ndarray, np.ndarray, Options], np.ndarray]
# Combines the edits of one module into A [r, in] and B [out, r], whose product is not scaled.
Combine = Callable[
    [Sequence[Pair], Sequence[float], Options, Generator], tuple[np.ndarray, np.ndarray]
]


class Combination(NamedTuple):
    """A way to combine adapters.

    Attributes:
      combine: does it for one module.
      reads: the fields of `Options` that make a difference to it.
    """

    combine: Combine
    reads: tuple[str, ...] = ()


def _keep_all(array: np.ndarray, options: Options, generator: Generator) -> np.ndarray:
    del options, generator
    return array


def _keep_largest(array: np.ndarray, options: Options, generator: Generator) -> np.ndarray:
    """Zeroes all but the values that are the largest in size."""
    del generator
    kept = int(options.density * array.size)
    if kept == array.size:
        return array
    pruned, flat = np.zeros(array.size, array.dtype), array.ravel()
    largest = np.argpartition(-np.abs(flat), kept)[:kept]
    pruned[largest] = flat[largest]
    return pruned.reshape(array.shape)


def _drop(array: np.ndarray, options: Options, generator: Generator) -> np.ndarray:
    """Drops values at random and scales the others, so that each keeps its mean."""
    kept = generator.random(array.shape) < options.density
    return np.where(kept, array / np.float32(options.density), np.float32(0))


def _sum(stacked: np.ndarray, weights: np.ndarray, options: Options) -> np.ndarray:
    del options
    return np.tensordot(weights, stacked, 1)


def _agree(stacked: np.ndarray, weights: np.ndarray, options: Options) -> np.ndarray:
    """Averages, value by value, over those whose sign prevails before any weighting."""
    signs = np.sign(stacked)
    votes = stacked if options.majority == "total" else signs
    agrees = signs == np.where(votes.sum(0) >= 0, 1, -1)
    return _sum(stacked * agrees, weights, options) / np.maximum(agrees.sum(0), 1).astype(
        np.float32
    )


def _concatenate(
    pairs: Sequence[Pair], weights: Sequence[float], options: Options, generator: Generator
) -> tuple[np.ndarray, np.ndarray]:
    del options, generator
    scaled = [np.float32(w * p.scale) * p.lora_A for w, p in zip(weights, pairs, strict=True)]
    return np.concatenate(scaled), np.concatenate([pair.lora_B for pair in pairs], axis=1)


def _best_sum(
    pairs: Sequence[Pair], weights: Sequence[float], options: Options, generator: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the singular vectors of the sum from those of its factors, without forming it."""
    lora_A, lora_B = _concatenate(pairs, weights, options, generator)
    right, inner_A = np.linalg.qr(lora_A.astype(np.float64).T)
    left, inner_B = np.linalg.qr(lora_B.astype(np.float64))
    inner = _best(inner_B @ inner_A.T, options.rank or max(len(p.lora_A) for p in pairs))
    return (inner[0] @ right.T).astype(np.float32), (left @ inner[1]).astype(np.float32)


def _best(edit: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B whose product is the edit's [out, in] best of a rank, as PEFT splits it."""
    left, values, right = np.linalg.svd(edit, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def _by_factors(prune: Prune, merge: Merge) -> Combine:
    def combine(
        pairs: Sequence[Pair], weights: Sequence[float], options: Options, generator: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        # Half of each weight for each factor, a negative one's sign for A alone.
        each = np.array([w * pair.scale for w, pair in zip(weights, pairs, strict=True)])
        roots = np.sqrt(np.abs(each)).astype(np.float32)
        rank = max(len(pair.lora_A) for pair in pairs)
        merged = []
        for factors, signs in (
            ([p.lora_A for p in pairs], np.sign(each)),
            ([p.lora_B.T for p in pairs], np.ones(len(pairs))),
        ):
            pruned = [_padded(prune(factor, options, generator), rank) for factor in factors]
            merged.append(merge(np.stack(pruned), roots * signs.astype(np.float32), options))
        return merged[0], merged[1].T

    return combine


def _padded(factor: np.ndarray, rank: int) -> np.ndarray:
    """Adds rows of zeros to [r, n]: factors of lower rank meet the first ones of the others."""
    return np.pad(factor, ((0, rank - len(factor)), (0, 0)))


def _by_edits(prune: Prune, merge: Merge) -> Combine:
    def combine(
        pairs: Sequence[Pair], weights: Sequence[float], options: Options, generator: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        pruned = np.stack([prune(pair.edit, options, generator) for pair in pairs])
        merged = merge(pruned, np.asarray(weights, np.float32), options)
        return _best(merged, options.rank or max(len(pair.lora_A) for pair in pairs))

    return combine


# What each step of pruning or merging reads of `Options`.
_READS: dict[Prune | Merge, tuple[str, ...]] = {
    _keep_all: (),
    _keep_largest: ("density",),
    _drop: ("density", "seed"),
    _sum: (),
    _agree: ("majority",),
}


def _factors(prune: Prune, merge: Merge) -> Combination:
    return Combination(_by_factors(prune, merge), (*_READS[prune], *_READS[merge]))


def _edits(prune: Prune, merge: Merge) -> Combination:
    return Combination(_by_edits(prune, merge), ("rank", *_READS[prune], *_READS[merge]))


COMBINATIONS: dict[str, Combination] = {
    "linear": _factors(_keep_all, _sum),
    "cat": Combination(_concatenate),
    "svd": Combination(_best_sum, ("rank",)),
    "ties": _factors(_keep_largest, _agree),
    "ties_svd": _edits(_keep_largest, _agree),
    "dare_linear": _factors(_drop, _sum),
    "dare_linear_svd": _edits(_drop, _sum),
    "dare_ties": _factors(_drop, _agree),
    "dare_ties_svd": _edits(_drop, _agree),
    "magnitude_prune": _factors(_keep_largest, _sum),
    "magnitude_prune_svd": _edits(_keep_largest, _sum),
}


def read_pairs(name: str, stored: StoredAdapter) -> dict[str, Pair]:
    """Returns the factors of an adapter on disk by module.

    Raises:
      JaxtuneError: it holds anything but plain LoRA.
    """
    config = stored.config
    kind = kind_of(stored)
    if kind != "LoRA":
        raise JaxtuneError(f'adapter "{name}" is {kind}: only LoRA adapters can be combined')
    whole = whole_weights(stored)
    if whole:
        raise JaxtuneError(
            f'adapter "{name}" has {whole[0]}={whole[1]!r}, which are whole weights: they cannot '
            "be combined"
        )
    if config.get("bias", "none") != "none":
        raise JaxtuneError(
            f'adapter "{name}" has bias={config["bias"]!r}: trained biases cannot be combined'
        )
    return pairs_of(stored)


def combine(
    adapters: Mapping[str, StoredAdapter],
    weights: Mapping[str, float],
    method: str = "cat",
    options: Options | None = None,
) -> StoredAdapter:
    """Combines LoRA adapters into one.

    A module that only some of them edit is combined of those alone.

    Args:
      adapters: by name; their ranks, scales and targets may differ.
      weights: of those to combine, by name.
      method: of `COMBINATIONS`.
      options: see `Options`.

    Raises:
      JaxtuneError: no adapter of a name, one that is not LoRA, or an unknown method.
    """
    way = lookup(COMBINATIONS, method, "combine").combine
    options = Options() if options is None else options
    if not weights:
        raise JaxtuneError("no adapters to combine: name each with its weight")
    pairs = {name: read_pairs(name, lookup(adapters, name, "adapter")) for name in weights}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for each in pairs.values() for module in each):
        chosen = [name for name in pairs if module in pairs[name]]
        edits = [pairs[name][module] for name in chosen]
        _check_shapes(module, chosen, edits)
        # Of the module's own, so that what is dropped depends on no other target.
        generator = np.random.default_rng((options.seed, zlib.crc32(module.encode())))
        lora_A, lora_B = way(edits, [weights[name] for name in chosen], options, generator)
        ranks[module] = len(lora_A)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(lora_A)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(lora_B)
    combined = [adapters[name] for name in weights]
    tensors |= {k: v for s in combined for k, v in s.tensors.items() if k.endswith(BASE_COPY)}
    return StoredAdapter(_config([stored.config for stored in combined], ranks), tensors)


def _check_shapes(module: str, names: Sequence[str], pairs: Sequence[Pair]) -> None:
    shapes = [(len(pair.lora_B), pair.lora_A.shape[1]) for pair in pairs]
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            raise JaxtuneError(
                f'adapter "{name}" edits {module} as {list(shape)} and "{names[0]}" as '
                f"{list(shapes[0])}: they are of different base models"
            )


def _config(configs: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Returns adapter_config.json of a combination: every scale is 1, for alpha is the rank."""
    targets = [config.get("target_modules") for config in configs]
    limits = ("layers_to_transform", "exclude_modules")
    if all(isinstance(t, list) for t in targets) and not any(
        c.get(k) for c in configs for k in limits
    ):
        names = sorted({name for listed in targets for name in listed or ()})
    else:
        names = sorted(ranks)
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    return plain_config(configs[0].get("base_model_name_or_path"), names) | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
    }
