"""What a row teaches: text and what of it is learnt, as the ``data`` section asks for it."""

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
    ends_with_think,
    separate_reasoning,
    split_content,
)
from jaxtune.chats.template import ChatTemplate
from jaxtune.chats.tokens import Tokenized
from jaxtune.errors import JaxtuneError

# What may be done to turns, as reports name it.
DROPPED, FIRST_TURN = "reasoning dropped", "first turn not learnt"


class Sample(NamedTuple):
    """What a row teaches.

    Attributes:
      content: equal for rows that say the same; what tells duplicates.
      text: to be tokenized as a whole.
      spans: ``(start, end)`` in characters of what is learnt.
      ends: whether the tokenizer adds its special tokens, and EOS ends the text and is learnt;
        otherwise the text has its own.
      tokens: ids and labels of a row that is tokenized already, in place of the text.
      unread: keys of its turns that neither jaxtune nor the chat template reads.
      turns: how many of its turns were changed or left out, by what was done to them.
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
    """How rows are read: what of the ``data`` section they depend on.

    Attributes:
      template: None without a tokenizer.
      targets: which turns are learnt; see `choose_targets`.
      reasoning: ``keep`` or ``drop`` what comes before ``</think>``.
      empty_reasoning: ``learn`` or ``mask`` the empty think block that a template adds.
      wordings: texts with ``{prompt}`` in them, one of which each prompt is put into.
      seed: that which of them is drawn depends on, beside the row.
    """

    template: ChatTemplate | None
    targets: str = "all"
    reasoning: str = "keep"
    empty_reasoning: str = "learn"
    wordings: tuple[str, ...] = ()
    seed: int = 0

    def require_template(self, place: str, *, ends: bool = False) -> ChatTemplate:
        """Returns the template; raises naming the row where there is none.

        Args:
          place: of the row.
          ends: whether the tokenizer has to have an EOS token.
        """
        if self.template is None:
            raise JaxtuneError(
                f"{place}: text needs a tokenizer and the checkpoint has none; "
                "without one, rows are input_ids + labels"
            )
        if ends and not isinstance(self.template.tokenizer.eos_token_id, int):
            raise JaxtuneError(f"{place}: the tokenizer has no EOS token to end a text with")
        return self.template

    def apply_wording(self, prompt: str, content: bytes) -> str:
        """Returns the prompt in the wording that the seed and the row's content draw."""
        if not self.wordings:
            return prompt
        drawn = int.from_bytes(hashlib.sha256(b"%d " % self.seed + content).digest()[:8], "little")
        return self.wordings[drawn % len(self.wordings)].replace("{prompt}", prompt)

    def answer(self, prompt: str, completion: str, place: str) -> tuple[str, dict[str, int]]:
        """Returns a completion without what ``data.reasoning`` drops, and what was done to it.

        Raises:
          JaxtuneError: nothing else is left, or its reasoning does not end.
        """
        opened = ends_with_think(prompt)
        if self.reasoning == "keep" or not (opened or THINK in completion):
            return completion, {}
        _check_closed(completion, f"{place}: completion")
        reasoning, answer = split_content(completion, opened)
        if not reasoning:
            return completion, {}
        if not answer.strip():
            raise JaxtuneError(f"{place}: completion is nothing but reasoning")
        return f"{END_THINK}\n\n{answer}" if opened else answer, {DROPPED: 1}


def _check_closed(content: str, name: str) -> None:
    if content.lstrip().startswith(THINK) and END_THINK not in content:
        raise JaxtuneError(
            f"{name} opens <think> and does not close it, so its reasoning cannot be dropped"
        )


def conversation_sample(conversation: Conversation, reading: ReadingOptions, place: str) -> Sample:
    """Returns what a conversation teaches.

    Args:
      conversation: of a row.
      reading: how it is read.
      place: of the row.

    Raises:
      JaxtuneError: nothing is learnt, or the template refuses or rewrites the conversation.
    """
    template = reading.require_template(place)
    learnt = choose_targets(conversation, reading.targets, place)
    content, counts = canonical_content(conversation), collections.Counter[str]()
    if conversation.turns[0]["role"] == "assistant" and reading.targets == "all":
        counts[FIRST_TURN] += conversation.marks[0] is None
    if reading.reasoning == "drop":
        conversation = _drop_reasoning(conversation, template, counts, place)
        for index in learnt:
            turn = conversation.turns[index]
            if not (turn["content"] or "").strip() and "tool_calls" not in turn:
                raise JaxtuneError(f"{place}: messages[{index}] is nothing but reasoning")
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
    text, spans = template.spans(turns, place, learnt, *context, empty_reasoning=learn_empty)
    unread = template.unread_keys(turns, conversation.extra, *context)
    named = frozenset(f"messages[].{key}" for key in unread)
    return Sample(content, text, spans, unread=named, turns={k: n for k, n in counts.items() if n})


def _drop_reasoning(
    conversation: Conversation,
    template: ChatTemplate,
    counts: collections.Counter[str],
    place: str,
) -> Conversation:
    """Takes the reasoning out of the assistant's turns, and counts those that had some."""
    turns: list[dict[str, Any]] = []
    for index, turn in enumerate(conversation.turns):
        if turn["role"] == "assistant":
            reasoning, answer = separate_reasoning(turn), turn["content"]
            _check_closed(answer or "", f"{place}: messages[{index}]")
            if END_THINK in (answer or ""):
                opened = index > 0 and ends_with_think(
                    template.render(
                        turns,
                        generation_prompt=True,
                        tools=conversation.tools,
                        arguments=conversation.arguments,
                        place=place,
                    )
                )
                within, answer = split_content(answer, opened)
                reasoning += within
            counts[DROPPED] += bool(reasoning.strip())
            kept = {key: value for key, value in turn.items() if key not in REASONING_KEYS}
            turn = {**kept, "content": answer}
        turns.append(turn)
    return conversation._replace(turns=turns)
