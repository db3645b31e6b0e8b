"""Combines LoRA adapters of one base into a single one, by PEFT's methods and under its names.

With edits Δᵢ = sᵢ Bᵢ Aᵢ and weights wᵢ:
- ``cat`` is the exact sum Σ wᵢ Δᵢ; its rank is the sum of ranks.
- ``svd`` is the best approximation of that sum of a given rank.
- ``linear`` sums the factors instead, (Σ cᵢ Bᵢ)(Σ cᵢ Aᵢ) with cᵢ = √(wᵢ sᵢ), which adds cross
  terms Bᵢ Aⱼ.
- ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` prune the factors before they
  are merged. ``ties`` keeps the largest values, and where signs disagree only the majority's;
  ``dare`` drops values at random and scales up the rest.
- With the suffix ``_svd`` they prune and merge the edits [out, in] instead of the factors, and
  take the best approximation of the result. This forms every edit as a full matrix.

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
from jaxtune.errors import JaxtuneError, check_argument, lookup, shown

MAJORITIES = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a combination, in addition to the weights.

    Attributes:
      rank: rank of a singular value decomposition; 0 for the largest rank among the adapters.
      density: fraction of values that pruning keeps.
      majority: elects signs by the "total" of the values or by their "frequency".
      seed: seed of random pruning.
    """

    rank: int = 0
    density: float = 0.5
    majority: str = "total"
    seed: int = 0

    def __post_init__(self):
        check_argument("rank", self.rank, (int, np.integer), "a number")
        check_argument("density", self.density, (int, float), "a number")
        check_argument("seed", self.seed, (int, np.integer), "a number")
        if not 0 <= self.seed < 2**63:
            raise JaxtuneError(f"seed={shown(self.seed)} of a combination is not within 0 and 2⁶³")
        if self.rank < 0:
            raise JaxtuneError(f"rank={self.rank} of a combination is negative")
        if not 0 < self.density <= 1:
            raise JaxtuneError(f"density={self.density} of a combination is not between 0 and 1")
        lookup(dict.fromkeys(MAJORITIES), self.majority, "majority")


Generator = np.random.Generator
# Prunes an array, keeping its shape.
Prune = Callable[[np.ndarray, Options, Generator], np.ndarray]
# Merges arrays of one shape, stacked along a leading axis, with a float32 weight for each.
Merge = Callable[[np.ndarray, np.ndarray, Options], np.ndarray]
# Combines the edits of one module into A [r, in] and B [out, r] with a scale of 1.
Combine = Callable[
    [Sequence[Pair], Sequence[float], Options, Generator], tuple[np.ndarray, np.ndarray]
]


class Combination(NamedTuple):
    """A method of combination.

    Attributes:
      combine: combines the edits of one module.
      reads: fields of `Options` that it reads.
    """

    combine: Combine
    reads: tuple[str, ...] = ()


def _keep_all(array: np.ndarray, options: Options, generator: Generator) -> np.ndarray:
    del options, generator
    return array


def _keep_largest(array: np.ndarray, options: Options, generator: Generator) -> np.ndarray:
    """Zeroes all but the fraction `density` of values with the largest magnitude."""
    del generator
    kept = int(options.density * array.size)
    if kept == array.size:
        return array
    pruned, flat = np.zeros(array.size, array.dtype), array.ravel()
    largest = np.argpartition(-np.abs(flat), kept)[:kept]
    pruned[largest] = flat[largest]
    return pruned.reshape(array.shape)


def _drop(array: np.ndarray, options: Options, generator: Generator) -> np.ndarray:
    """Keeps each value with probability `density`, scaled by 1 / density: the mean is preserved."""
    kept = generator.random(array.shape) < options.density
    return np.where(kept, array / np.float32(options.density), np.float32(0))


def _sum(stacked: np.ndarray, weights: np.ndarray, options: Options) -> np.ndarray:
    del options
    return np.tensordot(weights, stacked, 1)


def _agree(stacked: np.ndarray, weights: np.ndarray, options: Options) -> np.ndarray:
    """Averages each value over the adapters that have its majority sign (TIES).

    The sign is elected before weighting: by the sum of values, or by the number of each sign.
    """
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
    """Returns the best approximation of the weighted sum, without forming a matrix [out, in].

    With R = Σ rᵢ the concatenated factors are A [R, in] and B [out, R]. QR decompositions
    Aᵀ = V S and B = U T give B A = U (T Sᵀ) Vᵀ, where U and V are orthogonal, so the singular
    value decomposition of the small matrix T Sᵀ [R, R] yields that of B A.
    """
    lora_A, lora_B = _concatenate(pairs, weights, options, generator)
    right, inner_A = np.linalg.qr(lora_A.astype(np.float64).T)
    left, inner_B = np.linalg.qr(lora_B.astype(np.float64))
    inner = _best(inner_B @ inner_A.T, options.rank or max(len(p.lora_A) for p in pairs))
    return (inner[0] @ right.T).astype(np.float32), (left @ inner[1]).astype(np.float32)


def _best(edit: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B whose product is the best fit of an edit [out, in]; B takes the values."""
    left, values, right = np.linalg.svd(edit, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def _by_factors(prune: Prune, merge: Merge) -> Combine:
    def combine(
        pairs: Sequence[Pair], weights: Sequence[float], options: Options, generator: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        # Each factor gets the square root of the weight; the sign of a negative one goes to A.
        scaled = np.array([w * pair.scale for w, pair in zip(weights, pairs, strict=True)])
        roots = np.sqrt(np.abs(scaled)).astype(np.float32)
        rank = max(len(pair.lora_A) for pair in pairs)
        merged = []
        for factors, signs in (
            ([p.lora_A for p in pairs], np.sign(scaled)),
            ([p.lora_B.T for p in pairs], np.ones(len(pairs))),
        ):
            pruned = [_padded(prune(factor, options, generator), rank) for factor in factors]
            merged.append(merge(np.stack(pruned), roots * signs.astype(np.float32), options))
        return merged[0], merged[1].T

    return combine


def _padded(factor: np.ndarray, rank: int) -> np.ndarray:
    """Pads a factor [r, n] with rows of zeros to [rank, n]."""
    return np.pad(factor, ((0, rank - len(factor)), (0, 0)))


def _by_edits(prune: Prune, merge: Merge) -> Combine:
    def combine(
        pairs: Sequence[Pair], weights: Sequence[float], options: Options, generator: Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        pruned = np.stack([prune(pair.edit, options, generator) for pair in pairs])
        merged = merge(pruned, np.asarray(weights, np.float32), options)
        return _best(merged, options.rank or max(len(pair.lora_A) for pair in pairs))

    return combine


# Fields of `Options` that each step of pruning or merging reads.
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
      JaxtuneError: the adapter is not plain LoRA.
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

    A module is combined from those adapters that edit it.

    Args:
      adapters: adapters by name; their ranks, scales and targets may differ.
      weights: weights of the adapters to combine, by name.
      method: a key of `COMBINATIONS`.
      options: see `Options`.

    Raises:
      JaxtuneError: an unknown adapter or method, an adapter that is not LoRA, or adapters of
        different base models.
    """
    combine_module = lookup(COMBINATIONS, method, "combine").combine
    options = Options() if options is None else options
    if not weights:
        raise JaxtuneError("no adapters to combine: name each with its weight")
    pairs = {name: read_pairs(name, lookup(adapters, name, "adapter")) for name in weights}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module in dict.fromkeys(module for edited in pairs.values() for module in edited):
        chosen = [name for name in pairs if module in pairs[name]]
        edits = [pairs[name][module] for name in chosen]
        _check_shapes(module, chosen, edits)
        # Seeded by the module's name, so that random pruning does not depend on other targets.
        generator = np.random.default_rng((options.seed, zlib.crc32(module.encode())))
        chosen_weights = [weights[name] for name in chosen]
        lora_A, lora_B = combine_module(edits, chosen_weights, options, generator)
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
                f"{list(shapes[0])}: they belong to different base models"
            )


def _config(configs: Sequence[Mapping[str, Any]], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Returns adapter_config.json of a combination; alpha equals the rank, so scales are 1."""
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
