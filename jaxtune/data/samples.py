"""Samples: the text of a row and the parts of it to train on, according to the data settings."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.chats.messages import Conversation, canonical_content, choose_targets
from jaxtune.chats.reasoning import (
    END_THINK,
    REASONING_KEYS,
    THINK,
    ends_reasoning,
    ends_with_think,
    separate_reasoning,
    split_content,
)
from jaxtune.chats.rendering import Steps
from jaxtune.chats.template import ChatTemplate
from jaxtune.chats.tokens import Tokenized
from jaxtune.errors import JaxtuneError

# Changes to turns, as reports name them.
DROPPED, FIRST_TURN = "reasoning dropped", "first turn not trained on"


class Sample(NamedTuple):
    """The text of a row and the parts of it to train on.

    Attributes:
      content: canonical content, equal for duplicate rows.
      text: text to tokenize as a whole.
      spans: ``(start, end)`` of the spans to train on, in characters.
      ends: whether the tokenizer adds its special tokens and a trained EOS; otherwise the text
        contains its own special tokens.
      tokens: ids and labels of a tokenized row, instead of a text.
      unread: keys of turns that are used neither by jaxtune nor by the chat template.
      turns: number of turns that were changed or not trained on, by kind of change.
    """

    content: bytes
    text: str = ""
    spans: Sequence[tuple[int, int]] = ()
    ends: bool = False
    tokens: Tokenized | None = None
    unread: frozenset[str] = frozenset()
    turns: Mapping[str, int] = {}


@dataclasses.dataclass(frozen=True)
class ReadingOptions:
    """Options for reading rows.

    Attributes:
      template: chat template; None without a tokenizer.
      targets: turns to train on, see `choose_targets`.
      reasoning: ``keep`` or ``drop`` the reasoning before ``</think>``.
      empty_reasoning: ``learn`` or ``mask`` an empty think block that the template adds.
      wordings: prompt templates that contain ``{prompt}``; one is drawn for each row.
      seed: random seed of the draw, which also depends on the row's content.
    """

    template: ChatTemplate | None
    targets: str = "all"
    reasoning: str = "keep"
    empty_reasoning: str = "learn"
    wordings: tuple[str, ...] = ()
    seed: int = 0

    def require_template(self, place: str, *, ends: bool = False) -> ChatTemplate:
        """Returns the template.

        Args:
          place: location of the row, for errors.
          ends: whether the tokenizer must have an EOS token.

        Raises:
          JaxtuneError: there is no tokenizer, or it has no EOS token.
        """
        if self.template is None:
            raise JaxtuneError(
                f"{place}: text requires a tokenizer, which the checkpoint does not have; without "
                "one, rows must have input_ids and labels"
            )
        if ends and not isinstance(self.template.tokenizer.eos_token_id, int):
            raise JaxtuneError(f"{place}: the tokenizer has no EOS token to end a text with")
        return self.template

    def apply_wording(self, prompt: str, content: bytes) -> str:
        """Inserts a prompt into a prompt template, chosen by a hash of the seed and the content."""
        if not self.wordings:
            return prompt
        drawn = int.from_bytes(hashlib.sha256(b"%d " % self.seed + content).digest()[:8], "little")
        return self.wordings[drawn % len(self.wordings)].replace("{prompt}", prompt)

    def answer(self, prompt: str, completion: str, place: str) -> tuple[str, dict[str, int]]:
        """Returns a completion, without its reasoning if that is dropped, and counts of changes.

        Raises:
          JaxtuneError: the completion is only reasoning, or its think block is not closed.
        """
        opened = ends_with_think(prompt)
        if self.reasoning == "keep" or not (opened or THINK in completion):
            return completion, {}
        _check_closed(completion, f"{place}: completion")
        if opened and not ends_reasoning(completion):
            raise JaxtuneError(
                f"{place}: the prompt ends with <think> and the completion has no </think>, so the "
                "reasoning cannot be dropped"
            )
        reasoning, answer = split_content(completion, opened)
        if not reasoning:
            return completion, {}
        if not answer.strip():
            raise JaxtuneError(f"{place}: completion contains only reasoning")
        return f"{END_THINK}\n\n{answer}" if opened else answer, {DROPPED: 1}


def _check_closed(content: str, name: str) -> None:
    if content.lstrip().startswith(THINK) and END_THINK not in content:
        raise JaxtuneError(
            f"{name} has <think> without </think>, so the reasoning cannot be dropped"
        )


def conversation_sample(
    conversation: Conversation, reading: ReadingOptions, place: str
) -> Steps[Sample]:
    """Returns the sample of a conversation, in steps.

    Args:
      conversation: conversation of a row.
      reading: reading options.
      place: location of the row, for errors.

    Raises:
      JaxtuneError: there is no turn to train on, or the template rejects or rewrites the
        conversation.
    """
    template = reading.require_template(place)
    learned = choose_targets(conversation, reading.targets, place)
    content, counts = canonical_content(conversation), collections.Counter[str]()
    if conversation.turns[0]["role"] == "assistant" and reading.targets == "all":
        counts[FIRST_TURN] += conversation.marks[0] is None
    if reading.reasoning == "drop":
        conversation = yield from _drop_reasoning(conversation, template, counts, place)
        for index in learned:
            turn = conversation.turns[index]
            if not (turn["content"] or "").strip() and "tool_calls" not in turn:
                raise JaxtuneError(f"{place}: messages[{index}] contains only reasoning")
    turns = conversation.turns
    if reading.wordings:
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
        if first is not None:
            worded = {
                **turns[first],
                "content": reading.apply_wording(turns[first]["content"], content),
            }
            turns = [*turns[:first], worded, *turns[first + 1 :]]
    context = (conversation.tools, conversation.arguments)
    learn_empty = reading.empty_reasoning == "learn"
    text, spans = yield from template.spans_steps(
        turns, place, learned, *context, empty_reasoning=learn_empty
    )
    unread = template.unread_keys(turns, conversation.extra, *context)
    named = frozenset(f"messages[].{key}" for key in unread)
    return Sample(content, text, spans, unread=named, turns={k: n for k, n in counts.items() if n})


def _drop_reasoning(
    conversation: Conversation,
    template: ChatTemplate,
    counts: collections.Counter[str],
    place: str,
) -> Steps[Conversation]:
    """Removes the reasoning from assistant turns, and counts the turns that had any."""
    turns: list[dict[str, Any]] = []
    for index, turn in enumerate(conversation.turns):
        if turn["role"] == "assistant":
            reasoning, answer = separate_reasoning(turn), turn["content"]
            _check_closed(answer or "", f"{place}: messages[{index}]")
            if END_THINK in (answer or ""):
                prompt = ""
                if index:
                    prompt = yield from template.render_steps(
                        turns,
                        generation_prompt=True,
                        tools=conversation.tools,
                        arguments=conversation.arguments,
                        place=place,
                    )
                within, answer = split_content(answer, ends_with_think(prompt))
                reasoning += within
            counts[DROPPED] += bool(reasoning.strip())
            kept = {key: value for key, value in turn.items() if key not in REASONING_KEYS}
            turn = {**kept, "content": answer}
        turns.append(turn)
    return conversation._replace(turns=turns)
