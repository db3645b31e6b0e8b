"""A model in memory: logits, generation and saving."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from jaxtune.adapter_files.combine import Options
from jaxtune.adapters.merge import check_merges, edits
from jaxtune.api.adapter_set import AdapterSet
from jaxtune.chats.template import encode_prompt
from jaxtune.chats.tokens import tokenize_prompt
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.chat import Chat, base_chat
from jaxtune.checkpoints.load_model import LoadedModel
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.generation.generate import Sampling, generate_tokens
from jaxtune.layers.attention import choose_backend
from jaxtune.layers.cpu_bfloat16 import jit
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree, merge
from jaxtune.models.definition import Definition, Kind
from jaxtune.parallel.processes import fetch, put
from jaxtune.registry import DTYPES
from jaxtune.vocabulary import check_token_ids

# A prompt: text, token ids or chat messages.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
# The adapters in use: the name of one, weights of several by name, or None.
Choice = str | Mapping[str, float] | None


class Model:
    """A loaded model: its definition, its three trees and its chat format."""

    def __init__(
        self,
        parts: LoadedModel,
        source: Path,
        mesh: Mesh,
        *,
        dtype: DTypeLike,
        attention: str = "auto",
        adapters: AdapterSet | None = None,
        chats: Callable[[Choice], Chat] | None = None,
    ):
        self.source, self.mesh = source, mesh
        self._dtype, self._attention, self._adapters = jnp.dtype(dtype), attention, adapters
        self._chats = chats
        self._choice: Choice = None
        self._hold(parts)

    def _hold(self, parts: LoadedModel) -> None:
        self.definition, self.method = parts.definition, parts.method
        self.base, self.trainable, self.constants = parts.base, parts.trainable, parts.constants
        if self.mesh.size > 1:  # an adapter is read onto one device
            self.trainable = self._placed(self.trainable, "trainable")
            self.constants = self._placed(self.constants, "constants")
        platform = self.mesh.devices.flat[0].platform
        prefix = parts.definition.has_prefix
        backend = choose_backend(self._attention, platform, prefix)
        self.options = ForwardOptions(self._dtype, backend, "none", platform)

    def _placed(self, tree: Tree, kind: Kind) -> Tree:
        like = self.definition.abstract(kind, self.mesh)
        return jax.tree.map(lambda value, like: put(value, like.sharding), tree, like)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return () if self._adapters is None else tuple(self._adapters.stored)

    def use(
        self,
        adapter: Choice,
        combine: str = "cat",
        **options: float | str,
    ) -> Model:
        """Switches to one of the loaded adapters, to a combination of several, or to none.

        Args:
          adapter: name of an adapter; weights of several by name; or None for the base model.
          combine: method of combining LoRA adapters: "cat" and "svd" are weighted sums of the
            edits; see `jaxtune.adapter_files.combine` for the others.
          **options: rank, density, majority and seed; see `jaxtune.adapter_files.combine.Options`.

        Returns:
          The model itself.

        Raises:
          JaxtuneError: an unknown name, or adapters that cannot be combined.
        """
        if self.method is not None and self.method.edits_base:
            raise JaxtuneError(
                f"adapter={adapter!r}: adapter.method={self.method.name} has edited the base for "
                "the adapter in use; load the checkpoint again to use another"
            )
        if self._adapters is None or (adapter is not None and not self.adapters):
            raise JaxtuneError(f"adapter={adapter!r}: the model was loaded without adapters")
        known = [field.name for field in dataclasses.fields(Options)]
        for name in options:
            lookup(dict.fromkeys(known), name, "option")
        self._hold(
            self._adapters.select(adapter, combine, dataclasses.replace(Options(), **options))
        )
        self._choice = adapter
        for name in ("chat", "stop_ids"):  # cached properties that depend on the choice
            self.__dict__.pop(name, None)
        return self

    @functools.cached_property
    def chat(self) -> Chat:
        """Tokenizer, chat template, end tokens and clock.

        They come from the run or the adapter in use, or else from the checkpoint.
        """
        if self._chats is None:
            return base_chat(self.source, self.definition.config)
        return self._chats(self._choice)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the chat template in use.

        Raises:
          JaxtuneError: the checkpoint has no tokenizer files.
        """
        if self.chat.tokenizer is None:
            raise JaxtuneError(f"{self.source}: has no tokenizer files, which text requires")
        return self.chat.tokenizer

    @property
    def _trees(self) -> tuple[Tree, Tree, Tree]:
        """The three trees: base, trainable and constants."""
        return self.base, self.trainable, self.constants

    def logits(
        self,
        tokens: ArrayLike,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
    ) -> jax.Array:
        """Computes the logits of every position.

        Args:
          tokens: int[B, T].
          segment_ids: int[B, T]; tokens attend within their segment. One segment by default.
          positions: int[B, T]; by default counted within each segment.

        Returns:
          float32[B, T, vocabulary].

        Raises:
          JaxtuneError: an array has another shape, or a token id is outside the vocabulary.
        """
        check_token_ids(tokens, self.definition.vocab_size, "tokens")
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or not tokens.size:
            raise JaxtuneError(
                f"tokens must be int[batch, time], not of shape {list(tokens.shape)}"
            )
        for name, value in (("segment_ids", segment_ids), ("positions", positions)):
            if value is not None and np.shape(value) != tokens.shape:
                shape, needed = list(np.shape(value)), list(tokens.shape)
                raise JaxtuneError(f"{name} have shape {shape}, but tokens have {needed}")
        segments = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
        place = segment_positions(segments) if positions is None else jnp.asarray(positions)
        reserved = self.definition.reserved
        if reserved:  # logits at the positions of virtual tokens are computed and dropped
            tokens, segments, place, text = make_room(tokens, segments, place, reserved)
        with jax.set_mesh(self.mesh):
            logits = _logits(self._trees, tokens, segments, place, self.definition, self.options)
        logits = fetch(logits)
        return jnp.take_along_axis(logits, text[..., None], axis=1) if reserved else logits

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        top_p: float = 1.0,
        seed: int = 0,
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """Continues each prompt, in one batch.

        Args:
          prompts: prompts in any form that `encode` accepts.
          max_new_tokens: maximum number of new tokens per prompt.
          temperature: sampling temperature; 0 is greedy.
          top_p: samples from the smallest set of tokens with at least this probability.
          seed: seed of the samples.
          skip_special_tokens: leaves special tokens out of the text, as in `transformers`; the
            token that ended the answer is never part of it.

        Returns:
          The new text of each prompt.

        Raises:
          JaxtuneError: a single prompt instead of a list, or an error of `encode`.
        """
        if isinstance(prompts, str) or any(
            isinstance(prompt, (Mapping, int, np.integer)) for prompt in prompts
        ):
            raise JaxtuneError("generate takes a list of prompts: put a single prompt into a list")
        new = self.generate_tokens(
            [self.encode(prompt) for prompt in prompts],
            max_new_tokens,
            Sampling(temperature, top_p, seed),
        )
        decode = functools.partial(
            self.tokenizer.decode,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # would change the generated text
        )
        return [decode(tokens) for tokens in new]

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """Continues prompts of token ids; returns the new ids, without the end token."""
        with jax.set_mesh(self.mesh):
            return generate_tokens(
                self.definition,
                self._trees,
                prompts,
                self.options,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=self.stop_ids,
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt, int[n].

        Args:
          prompt: text, to which the tokenizer adds its special tokens; token ids; or chat
            messages, rendered with the chat template.

        Raises:
          JaxtuneError: the template rejects the messages, or there is no template.
        """
        if isinstance(prompt, str):
            return tokenize_prompt(self.tokenizer, prompt)
        messages = [message for message in prompt if isinstance(message, Mapping)]
        if messages:
            return encode_prompt(self.tokenizer, messages, clock=self.chat.clock)
        return [token for token in prompt if not isinstance(token, Mapping)]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of tokens that end an answer, those of the base and of the adapter."""
        return self.chat.eos_token_ids

    def save_pretrained(
        self, directory: str | Path, dtype: str | None = None, *, quantized: bool = False
    ) -> Path:
        """Writes a Hugging Face checkpoint that transformers loads, with the adapter merged.

        Args:
          directory: directory to create.
          dtype: "bfloat16", "float16" or "float32" on disk; by default each weight's own dtype.
          quantized: writes quantized weights in their format, which other tools read, rather than
            dequantized. Weights that the adapter edits are read from the checkpoint again, edited
            and quantized, and ``merge_report.json`` reports the rounding loss; the others are
            written bit for bit.

        Returns:
          The directory.

        Raises:
          JaxtuneError: the adapter cannot be merged, or the model has no quantized weights.
        """
        if quantized and all(leaf.format is None for leaf in self.definition.leaves.values()):
            raise JaxtuneError(
                "quantized=True: the model has no quantized weights; load it with quantize=…"
            )
        if self.method is not None:
            check_merges(self.method)
        if dtype is not None:
            lookup(dict.fromkeys(DTYPES), dtype, "dtype")
        model = self.definition.bind(self.base, self.trainable, self.constants)
        # A base that the method has edited was not quantized from the checkpoint's own weights.
        onto_checkpoint = quantized and self.method is not None and not self.method.edits_base
        return huggingface.save(
            directory,
            self.definition,
            merge(self.base, self.trainable, self.constants),
            beside=files_beside(self.source, self.chat),
            dtype=None if dtype is None else jnp.dtype(dtype),
            edits=edits(model),
            quantized=quantized,
            original=huggingface.open_source(self.source) if onto_checkpoint else None,
        )


def files_beside(source: Path, chat: Chat) -> huggingface.Beside:
    """Returns the files to write with the weights of a model from `source`."""
    code = source if source.is_dir() else None
    return huggingface.Beside(chat.tokenizer, chat.generation_files(), code)


@functools.partial(jit, static_argnames=("definition", "options"))
def _logits(
    trees: tuple[Tree, Tree, Tree],
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    definition: Definition,
    options: ForwardOptions,
) -> jax.Array:
    model = definition.bind(*trees)
    hidden, _, _ = model.decoder(tokens, segment_ids, positions, options)
    return model.head()(hidden)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns positions from 0 within each stretch of equal ids: int[B, T] → int32[B, T].

    The position is the index minus the start of the stretch, which is the running maximum of the
    indices at which the id changes.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def make_room(
    tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, reserved: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inserts `reserved` positions for virtual tokens in front of every segment.

    Args:
      tokens: int[B, T].
      segment_ids: int[B, T].
      positions: int[B, T].
      reserved: number of virtual tokens.

    Returns:
      tokens, segment_ids and positions, int[B, T + reserved · segments] with the largest number of
      segments of a row, and the new index of each original token, int[B, T].
    """
    segments = np.asarray(segment_ids)
    # A token moves right by `reserved` for each segment that has begun up to it.
    first = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    before = np.cumsum(first & (segments != 0), axis=1)
    text = np.arange(segments.shape[1]) + reserved * before
    wider = (segments.shape[0], segments.shape[1] + reserved * int(before.max()))
    moved = [np.zeros(wider, np.int32) for _ in range(3)]
    for row, start in zip(*np.nonzero(first & (segments != 0)), strict=True):
        head = slice(text[row, start] - reserved, text[row, start])
        moved[1][row, head] = segments[row, start]
        moved[2][row, head] = np.arange(reserved)
    shifted = np.where(segments != 0, np.asarray(positions) + reserved, 0)
    for wide, value in zip(moved, (np.asarray(tokens), segments, shifted), strict=True):
        np.put_along_axis(wide, text, value, axis=1)
    return moved[0], moved[1], moved[2], text
