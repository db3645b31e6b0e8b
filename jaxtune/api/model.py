"""A model in memory: logits, generation and saving."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from jaxtune.adapter_files.combine import Options
from jaxtune.adapters.merge import check_merges, edits
from jaxtune.api.adapter_set import AdapterSet, check_choice
from jaxtune.api.logits import logits as compute_logits
from jaxtune.api.logits import pass_inputs
from jaxtune.api.prompts import Prompt, TextOptions, as_prompts, warn_of_length
from jaxtune.chats.template import encode_prompt
from jaxtune.chats.tokens import tokenize_prompt
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.chat import Chat, base_chat
from jaxtune.checkpoints.load_model import LoadedModel
from jaxtune.checkpoints.open_model import files_beside
from jaxtune.errors import JaxtuneError, check_argument, check_path, lookup, shown
from jaxtune.generation.decoding import CHUNK
from jaxtune.generation.generate import Generation
from jaxtune.generation.sampling import Sampling
from jaxtune.generation.text import (
    AnswerText,
    check_stop,
    complete_texts,
    stop_tokens,
    stream_texts,
)
from jaxtune.layers.attention import choose_backend
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree, merge
from jaxtune.models.definition import Kind
from jaxtune.parallel.processes import fetch, put
from jaxtune.registry import DTYPES

# Tokens per row and piece of a stream: enough to keep a device busy, and few enough to read along.
STREAM_CHUNK = 8
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
        check_choice(adapter)
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
        *arrays, text = pass_inputs(self.definition, tokens, segment_ids, positions)
        with jax.set_mesh(self.mesh):
            logits = compute_logits(self._trees, *arrays, self.definition, self.options)
        logits = fetch(logits)
        return logits if text is None else jnp.take_along_axis(logits, text[..., None], axis=1)

    @overload
    def generate(
        self,
        prompts: Prompt,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        stream: Literal[False] = False,
        **options: Unpack[TextOptions],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        stream: Literal[False] = False,
        **options: Unpack[TextOptions],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompts: Prompt,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        stream: Literal[True],
        **options: Unpack[TextOptions],
    ) -> Iterator[str]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        stream: Literal[True],
        **options: Unpack[TextOptions],
    ) -> Iterator[tuple[int, str]]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
        stream: bool = False,
    ) -> Any:
        """Continues one prompt, or several in one batch.

        Args:
          prompts: a prompt in any form that `encode` accepts, or a list of prompts.
          max_new_tokens: maximum number of new tokens per prompt.
          temperature: sampling temperature; 0 is greedy.
          top_k: samples from this number of most likely tokens; 0 for all.
          top_p: samples from the smallest set of tokens with at least this probability.
          seed: seed of the samples.
          stop: a string, or several, that end an answer; the text is cut before it.
          skip_special_tokens: leaves special tokens out of the text, as in `transformers`; the
            token that ended the answer is never part of it.
          stream: returns an iterator over the text as it is generated.

        Returns:
          The new text: a string for one prompt, a list of strings for a list. With `stream`, an
          iterator over pieces of text for one prompt, and over pairs (index of the prompt, piece)
          for a list. Pieces hold whole characters and add up to the text.

        Raises:
          JaxtuneError: an error of `encode`, or settings out of range.
        """
        several, alone = as_prompts(prompts)
        for name, flag in (("skip_special_tokens", skip_special_tokens), ("stream", stream)):
            check_argument(name, flag, bool, "True or False")
        strings = check_stop(stop)
        ends = stop_tokens(self.tokenizer, strings) if strings else []
        generation = self.generation(
            [self.encode(prompt) for prompt in several],
            max_new_tokens,
            Sampling(temperature, top_p, seed, top_k),
            stop=(*self.stop_ids, *ends),
            largest_chunk=STREAM_CHUNK if stream else CHUNK,
        )
        texts = [AnswerText(self.tokenizer, strings, skip_special_tokens) for _ in several]
        if stream:
            pairs = stream_texts(generation, texts)
            return (piece for _, piece in pairs) if alone else pairs
        answers = complete_texts(generation, texts)
        return answers[0] if alone else answers

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling,
    ) -> list[list[int]]:
        """Continues prompts of token ids; returns the new ids, without the end token."""
        answers = self.generation(prompts, max_new_tokens, sampling).complete()
        return [answer.tokens for answer in answers]

    def generation(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling,
        *,
        stop: Sequence[int] | None = None,
        largest_chunk: int = CHUNK,
    ) -> Generation:
        """Returns an iterator over chunks of new tokens and their log-probabilities.

        Args:
          prompts: token ids, at least one each.
          max_new_tokens: maximum number of new tokens, of all prompts or of each.
          sampling: settings for choosing tokens.
          stop: token ids that end an answer; `stop_ids` by default.
          largest_chunk: maximum number of tokens per prompt and iteration.

        Raises:
          JaxtuneError: an empty prompt, ids outside the vocabulary, or settings out of range.
        """
        generation = Generation(
            self.definition,
            self._trees,
            prompts,
            self.options,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=self.stop_ids if stop is None else stop,
            mesh=self.mesh,
            largest_chunk=largest_chunk,
        )
        positions = self.definition.config.get("max_position_embeddings")
        warn_of_length(positions, prompts, max_new_tokens)
        return generation

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of a prompt, int[n].

        Args:
          prompt: text, to which the tokenizer adds its special tokens; token ids; or chat
            messages, rendered with the chat template.

        Raises:
          JaxtuneError: the template rejects the messages, or there is no template.
        """
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise JaxtuneError(
                    f"the prompt has an unpaired surrogate: {shown(prompt)}"
                ) from None
            return tokenize_prompt(self.tokenizer, prompt)
        if isinstance(prompt, Mapping):
            raise JaxtuneError("a single message is not a prompt: give a list of chat messages")
        expected = "text, a list of token ids or a list of chat messages"
        check_argument("a prompt", prompt, Iterable, expected)
        elements: list[Any] = list(prompt)
        messages = [message for message in elements if isinstance(message, Mapping)]
        if not messages:
            return elements
        if len(messages) < len(elements):
            raise JaxtuneError("a prompt mixes chat messages with something else")
        return encode_prompt(self.tokenizer, messages, clock=self.chat.clock)

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
        directory = check_path("directory", directory)
        if quantized and all(leaf.format is None for leaf in self.definition.leaves.values()):
            raise JaxtuneError(
                "quantized=True: the model has no quantized weights; load it with quantize=…"
            )
        if self.method is not None:
            check_merges(self.method)
        if dtype is not None:
            lookup(dict.fromkeys(DTYPES), dtype, "dtype")
        # A base that the method has edited was not quantized from the checkpoint's own weights.
        onto_checkpoint = quantized and self.method is not None and not self.method.edits_base
        return huggingface.save(
            directory,
            self.definition,
            merge(*self._trees),
            beside=files_beside(self.source, self.chat),
            dtype=None if dtype is None else jnp.dtype(dtype),
            edits=edits(self.definition.bind(*self._trees)),
            quantized=quantized,
            original=huggingface.open_source(self.source) if onto_checkpoint else None,
        )
