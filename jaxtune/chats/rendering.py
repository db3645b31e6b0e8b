"""Rendering of conversations, in the spelling of which the template shows all content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.chats.jsontext import restore_numbers
from jaxtune.chats.messages import Message
from jaxtune.chats.reasoning import separate_reasoning
from jaxtune.chats.spelling import Spelling, remove_whitespace, spellings
from jaxtune.errors import JaxtuneError

Apply = Callable[[Sequence[Message], bool], str]
"""Applies a template to turns, with or without a generation prompt."""


class Rendering:
    """Cached renderings of a conversation and of its prefixes."""

    def __init__(self, spelling: Spelling, apply: Apply, place: str):
        """Initializes from a spelling and a template; `place` is named in errors."""
        self._spelling, self._apply, self._place = spelling, apply, place
        self._made: dict[tuple[int, bool], str] = {}

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The turns as they are passed to the template."""
        return self._spelling.turns

    def __call__(self, count: int, prompt: bool) -> str:
        """Returns the text of the first `count` turns, optionally with a generation prompt.

        Raises:
          JaxtuneError: the template rejects the turns.
        """
        if (count, prompt) not in self._made:
            try:
                text = self._apply(self.turns[:count], prompt)
            # The expressions of a template can raise anything.
            except Exception as error:
                raise _rejection(self._place, error) from error
            self._made[count, prompt] = restore_numbers(text, self._spelling.numbers)
        return self._made[count, prompt]


def choose_rendering(
    turns: Sequence[dict[str, Any]], apply: Apply, place: str, *, generation_prompt: bool = False
) -> Rendering:
    """Returns the rendering of the first spelling of which the template shows all content.

    If the template omits content of every spelling, the first one that it accepts is used; finding
    the spans of its turns then reports what is missing.

    Args:
      turns: turns of the conversation.
      apply: function that applies the template.
      place: location of the conversation, for errors.
      generation_prompt: whether the conversation will be rendered with a generation prompt.

    Raises:
      JaxtuneError: the template rejects every spelling.
    """
    choices = list(spellings(turns))
    if len(choices) == 1:
        return Rendering(choices[0], apply, place)
    accepted, rejection = None, None
    for spelling in choices:
        try:
            whole = _is_complete(spelling, turns, apply, generation_prompt)
        except Exception as error:
            rejection = rejection or error
            continue
        if whole:
            return Rendering(spelling, apply, place)
        accepted = accepted or spelling
    if accepted is None and rejection is not None:
        raise _rejection(place, rejection) from rejection
    return Rendering(accepted or choices[0], apply, place)


def _is_complete(
    spelling: Spelling, turns: Sequence[dict[str, Any]], apply: Apply, prompt: bool
) -> bool:
    """Returns whether a rendering shows all arguments of calls, and the last reasoning."""
    if not spelling.shows(apply(spelling.turns, prompt)):
        return False
    reasons = [i for i, turn in enumerate(turns) if separate_reasoning(turn).strip()]
    if not reasons:
        return True
    # Templates may omit the reasoning of earlier turns, so the last one is rendered as the end.
    rendered = apply(spelling.turns[: reasons[-1] + 1], False)
    return remove_whitespace(separate_reasoning(turns[reasons[-1]])) in remove_whitespace(rendered)


def _rejection(place: str, error: Exception) -> JaxtuneError:
    if isinstance(error, JaxtuneError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return JaxtuneError(f"{place}: the chat template rejects the conversation: {reason}")
