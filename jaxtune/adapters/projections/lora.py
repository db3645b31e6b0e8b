"""LoRA: a trained low-rank edit W + scale · B A of a frozen weight.

Source: Hu et al., 2021; rank-stabilised scale: Kalajdzievski, 2023 (rsLoRA).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtune.adapters.method import Start, StoredAdapter
from jaxtune.adapters.projections import biases, new_tokens
from jaxtune.adapters.projections.factors import Factor, read_settings
from jaxtune.adapters.projections.modules_to_save import saved_arrays
from jaxtune.adapters.projections.new_tokens import EMBEDDING, HEAD, TokenIds
from jaxtune.adapters.projections.peft_files import from_disk, peft_config
from jaxtune.adapters.projections.slots import (
    AdapterPart,
    LinearMethod,
    SlotAdapter,
    adapters,
    shared_settings,
)
from jaxtune.adapters.targets import find_pattern, is_target, parse_patterns
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import Edit, LowRank, Projection
from jaxtune.layers.tree import (
    Constant,
    Trainable,
    Tree,
    declaration_of,
    flatten,
    merge,
    parameter,
    unflatten,
)
from jaxtune.models.definition import Definition


class LoraAdapter(SlotAdapter):
    """The factors of a projection, stacked over the layers of its block.

    Stacks have the largest rank of the block; layers of lower rank are padded with zeros. The
    padding stays zero during training, since the gradient of each factor is a product with the
    other factor, whose padding is zero as well.
    """

    settings: tuple[Factor | None, ...]

    def __init__(self, linear: Projection, factors: tuple[Factor | None, ...], dropout: float):
        rank = max(factor.rank for factor in factors if factor)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        declared = declaration_of(linear.weight)
        (out_axis, in_axis), experts = declared.axes, declared.experts
        shape_A, shape_B = (rank, linear.in_features), (linear.out_features, rank)
        axes_A, axes_B = ("rank", in_axis), (out_axis, "rank")
        self.lora_A = parameter(shape_A, axes_A, kind=Trainable, experts=experts)
        self.lora_B = parameter(shape_B, axes_B, "zeros", kind=Trainable, experts=experts)
        self.scale = parameter((), (), "ones", kind=Constant, experts=experts)
        self.settings = factors
        self.dropout = dropout

    def parts(self, setting: Factor) -> dict[str, AdapterPart]:
        """Returns both factors."""
        return {
            "lora_A": AdapterPart(".lora_A.weight", (setting.rank, self.in_features)),
            "lora_B": AdapterPart(".lora_B.weight", (self.out_features, setting.rank)),
        }

    def start(self, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Draws A [r, in] uniformly from ±1/√in, as PEFT does; B is zero, so the edit is too."""
        if name == "lora_B":
            return jnp.zeros(shape)
        bound = shape[-1] ** -0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    def constants(self) -> dict[str, np.ndarray]:
        """Returns the scales [layers · experts]; 0 without an adapter."""
        scales = [factor.scale if factor else 0.0 for factor in self.settings]
        return {"scale": np.array(scales, np.float32)}

    def low_rank(self) -> LowRank:
        """Returns the factors and their scale."""
        return LowRank(self.lora_A.get_value(), self.lora_B.get_value(), self.scale.get_value())

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Adds the low-rank term to the weight [out, in]."""
        del weight, bias, dtype
        return Edit(self.low_rank())


@dataclasses.dataclass(frozen=True)
class Lora(LinearMethod):
    """LoRA with its settings.

    Attributes:
      rank: r of every target.
      alpha: numerator of the scale, alpha / r.
      dropout: dropout rate on the input of the low-rank branch.
      targets: modules to edit; see `match_targets`.
      factors: rank and alpha by Hugging Face module name, set for an adapter read from disk;
        replaces `rank`, `alpha` and `targets`.
      rslora: uses the scale alpha / √r.
      rank_pattern: ranks of modules whose path ends with a pattern; overrides `rank`.
      alpha_pattern: alphas of modules whose path ends with a pattern; overrides `alpha`.
      new_tokens: number of tokens at the end of the vocabulary whose rows are trained, in the
        embedding and in an untied head that is not trained otherwise.
      train_tokens: names of further tokens to train.
      token_ids: ids of all these tokens; None until they are looked up in the tokenizer.
      token_rows: token ids by module, set for an adapter read from disk; replaces the three above.
      bias: trained biases of the base: "none", "all", or "lora_only" for those of the targets.
    """

    name: ClassVar[str] = "lora"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)
    factors: tuple[tuple[str, Factor], ...] = ()
    rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    new_tokens: int = 0
    train_tokens: tuple[str, ...] = ()
    token_ids: tuple[int, ...] | None = None
    token_rows: TokenIds = ()
    bias: str = "none"

    def choose(self, modules: Mapping[str, Projection]) -> dict[str, Factor]:
        """Returns the rank and alpha of every target, or those that were read from disk."""
        if self.factors:
            return from_disk(self.factors, modules)
        names = self.select(self.targets, modules)
        ranks = _by_pattern("adapter.rank_pattern", self.rank_pattern, names, self.rank)
        alphas = _by_pattern("adapter.alpha_pattern", self.alpha_pattern, names, self.alpha)
        return {n: Factor(int(ranks[n]), float(alphas[n]), self.rslora) for n in names}

    def trains(self, name: str) -> bool:
        """Returns whether a weight is in modules_to_save or is a bias selected by `bias`."""
        return super().trains(name) or (biases.is_bias(name) and self._trains_bias(name))

    def _trains_bias(self, name: str) -> bool:
        if self.bias != "lora_only":
            return self.bias == "all"
        module = name.removesuffix(biases.END)
        if self.factors:
            return module in dict(self.factors)
        return is_target(self.targets, self.layers, module)

    def attach(self, model: CausalLM) -> None:
        """Fills the slots of the targets, and those of embedding and head if tokens are trained.

        Raises:
          JaxtuneError: embedding or head would be trained twice, or there is no bias to train.
        """
        trained = self.bias != "none" and biases.check(model, self._trains_bias, self.key("bias"))
        if self.bias != "none" and not trained and not self.from_file:
            raise JaxtuneError(
                f"adapter.bias={self.bias}: there is no bias to train in this model; set it to none"
            )
        super().attach(model)
        rows = self._rows_of_disk(model) if self.from_file else self._rows_to_train(model)
        for module, name in ((EMBEDDING, "model.embed_tokens"), (HEAD, "lm_head")):
            if module in rows and self.trains(f"{name}.weight"):
                key, saved = self._tokens_key, self.key("modules_to_save")
                raise JaxtuneError(f"{key} and {saved} both train {module}")
        new_tokens.attach(model, rows, self._tokens_key)

    @property
    def _tokens_key(self) -> str:
        return self.key("new_tokens" if self.new_tokens else "train_tokens", new_tokens.SETTING)

    def _rows_of_disk(self, model: CausalLM) -> dict[str, tuple[int, ...]]:
        """Returns the token ids, by module, of an adapter on disk."""
        rows = dict(self.token_rows)
        if model.lm_head is not None or HEAD not in rows:
            return rows
        # With a tied head PEFT shares one set of rows, provided that the tokens are the same.
        if rows.pop(HEAD) != rows.get(EMBEDDING):
            raise JaxtuneError(
                f"{self._tokens_key} has other tokens for {HEAD} than for {EMBEDDING}, but the two "
                "are tied in this model (tie_word_embeddings)"
            )
        return rows

    def _rows_to_train(self, model: CausalLM) -> dict[str, tuple[int, ...]]:
        """Returns the token ids to train by module."""
        wanted = self.new_tokens + len(self.train_tokens)
        if not wanted:
            return {}
        vocab_size = model.vocab_size
        if wanted >= vocab_size:
            raise JaxtuneError(
                f"{self._tokens_key}={wanted} is not less than all {vocab_size} tokens"
            )
        # Without a tokenizer, as in a plan, only the number of tokens matters.
        ids = self.token_ids or tuple(range(wanted))
        head = model.lm_head
        with_head = head is not None and head.adapter is None and not self.trains("lm_head.weight")
        return {EMBEDDING: ids} | ({HEAD: ids} if with_head else {})

    def with_tokenizer(self, tokenizer: Any) -> Lora:
        """Returns a copy with the ids of the tokens to train.

        Raises:
          JaxtuneError: there is no tokenizer, or it lacks one of the tokens.
        """
        if not self.new_tokens and not self.train_tokens:
            return self
        ids = new_tokens.look_up(self.new_tokens, self.train_tokens, tokenizer)
        return dataclasses.replace(self, token_ids=ids)

    def with_stored(self, stored: StoredAdapter) -> Lora:
        """Returns a copy with the token ids of the stored adapter."""
        ids = dict(new_tokens.on_disk(stored)).get(EMBEDDING)
        return dataclasses.replace(self, token_ids=ids) if ids else self

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Initialises the rows of trained tokens from the base.

        Raises:
          JaxtuneError: the token ids have not been looked up.
        """
        if start is None:
            return trees
        if (self.new_tokens or self.train_tokens) and self.token_ids is None:
            raise JaxtuneError(f"{self._tokens_key}: the tokens have to be looked up first")
        rows = new_tokens.start(definition, dict(flatten(weights)))
        return merge(trees[0], unflatten(rows)), trees[1]

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns adapter_config.json, the factors, and the rows of new tokens."""
        stored = super().store(definition, trainable, constants)
        new_tokens.write(definition, dict(flatten(trainable)), stored)
        if self.bias == "none":
            return stored
        edited = [n for _, names, one in adapters(definition) for n in _edited(names, one)]
        return biases.wrapped(stored, set(edited))

    def restore_edits(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Packs the factors and the rows of new tokens into stacked arrays."""
        trainable, constants = super().restore_edits(definition, stored)
        return merge(trainable, unflatten(new_tokens.read(definition, stored))), constants

    def whole_weights(
        self, definition: Definition, stored: StoredAdapter
    ) -> Mapping[str, np.ndarray]:
        """Returns the tensors of saved modules and trained biases, of any shape, by name."""
        if self.bias != "none":
            stored = biases.unwrapped(stored)
            known = {name for _, names, _ in saved_arrays(definition) for name in names}
            biases.check_known(stored, known)
        return super().whole_weights(definition, stored)

    def adapter(self, linear: Projection, settings: tuple[Factor | None, ...]) -> LoraAdapter:
        """Builds the two abstract factors."""
        return LoraAdapter(linear, settings, self.dropout)

    def peft_config(self, definition: Definition, settings: Mapping[str, Factor]) -> dict[str, Any]:
        """Returns the config: the most common rank and alpha, and patterns for the others."""
        common = Counter(settings.values()).most_common(1)[0][0]
        return peft_config("LORA", definition, settings) | {
            "r": common.rank,
            "lora_alpha": int(common.alpha) if common.alpha == int(common.alpha) else common.alpha,
            "lora_dropout": self.dropout,
            "rank_pattern": {n: f.rank for n, f in settings.items() if f.rank != common.rank},
            "alpha_pattern": {n: f.alpha for n, f in settings.items() if f.alpha != common.alpha},
            "bias": self.bias,
            "use_rslora": common.rslora,
            "use_dora": False,
            "init_lora_weights": True,
        }


def _edited(names: Sequence[str], adapter: SlotAdapter) -> list[str]:
    """Returns the names of the layers (and experts) of a projection that the method edits."""
    return [name for name, one in zip(names, adapter.settings, strict=True) if one is not None]


def _by_pattern(
    key: str, patterns: Iterable[tuple[str, float]], names: Sequence[str], default: float
) -> dict[str, float]:
    """Returns each module's value: that of the first pattern that matches, or the default.

    Raises:
      JaxtuneError: a pattern that matches no target.
    """
    values = dict(patterns)
    found = {name: find_pattern(values, name, key) for name in names}
    for pattern in values:
        if pattern not in found.values():
            raise JaxtuneError(
                f'{key}: "{pattern}" applies to none of the targets: it matches no module, or an '
                "earlier pattern matches the same ones"
            )
    return {name: default if p is None else values[p] for name, p in found.items()}


def from_peft(stored: StoredAdapter) -> Lora:
    """Returns the method and settings of a LoRA adapter without magnitudes.

    Raises:
      JaxtuneError: see `read_settings`.
    """
    return Lora(**read_settings(stored))


def settings_from_config(section: AdapterConfig) -> dict[str, Any]:
    """Returns the arguments of `Lora` and its variants from the ``adapter`` section of a config.

    Raises:
      JaxtuneError: a pattern whose rank is not a positive integer.
    """
    ranks = parse_patterns("adapter.rank_pattern", section.rank_pattern)
    alphas = parse_patterns("adapter.alpha_pattern", section.alpha_pattern)
    for pattern, rank in ranks.items():
        if rank < 1 or rank != int(rank):
            raise JaxtuneError(f'adapter.rank_pattern: "{pattern}={rank:g}" is not a rank')
    return shared_settings(section) | {
        "rank": section.rank,
        "alpha": section.alpha,
        "dropout": section.dropout,
        "targets": tuple(section.targets),
        "rslora": section.rslora,
        "new_tokens": section.new_tokens,
        "train_tokens": tuple(section.train_tokens),
        "bias": section.bias,
        "rank_pattern": tuple((pattern, int(rank)) for pattern, rank in ranks.items()),
        "alpha_pattern": tuple(alphas.items()),
    }


def from_config(section: AdapterConfig) -> Lora:
    """Returns the method that the ``adapter`` section of a config describes."""
    return Lora(**settings_from_config(section))
