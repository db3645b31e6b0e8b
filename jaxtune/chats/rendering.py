"""Rendering of conversations, in the spelling of which the template shows all content.

Functions that render are generators, which yield requests and are sent the renderings. `run_all`
advances many of them in step, so that their requests share round trips to the process that renders.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from jaxtune.chats.jsontext import restore_numbers
from jaxtune.chats.messages import Message
from jaxtune.chats.reasoning import separate_reasoning
from jaxtune.chats.spelling import Spelling, remove_whitespace, spellings
from jaxtune.chats.template_process import (
    LimitExceeded,
    Made,
    RenderingError,
    Request,
    render_all,
)
from jaxtune.errors import JaxtuneError

Part = tuple[int, bool]
"""A number of turns, counted from the first one, and whether a generation prompt follows them."""

T = TypeVar("T")

Steps = Generator[Request, Made, T]
"""The steps of a function that renders: it yields requests and is sent the renderings of each."""

Apply = Callable[[Sequence[Message], Sequence[Part]], Steps[Made]]
"""Applies a template to parts of a conversation; an error stands for a rejected part."""


class TemplateLimitError(JaxtuneError):
    """Raised for a template that exceeds a limit, which no other row would change."""


def run(steps: Steps[T]) -> T:
    """Returns the result of a function that renders."""
    (result,) = run_all([steps])
    if isinstance(result, JaxtuneError):
        raise result
    return result


def run_all(functions: Sequence[Steps[T]]) -> list[T | JaxtuneError]:
    """Returns the result, or the error, of each of several functions that render.

    Raises:
      TemplateLimitError: a template exceeds a limit.
    """
    results: dict[int, T | JaxtuneError] = {}
    waiting: list[tuple[int, Request]] = []

    def advance(index: int, step: Callable[[], Request]) -> None:
        """Takes a step, which yields a request or ends the function."""
        try:
            waiting.append((index, step()))
        except StopIteration as end:
            results[index] = end.value
        except TemplateLimitError:  # a bad template, not a bad conversation
            raise
        except JaxtuneError as error:
            results[index] = error

    for index, steps in enumerate(functions):
        advance(index, steps.__next__)
    while waiting:
        asked, waiting = waiting, []
        for (index, _), made in zip(asked, render_all([r for _, r in asked]), strict=True):
            steps = functions[index]
            if isinstance(made, LimitExceeded):
                advance(index, functools.partial(steps.throw, made))
            else:
                advance(index, functools.partial(steps.send, made))
    return [results[index] for index in range(len(functions))]


class Rendering:
    """Cached renderings of a conversation and of its prefixes."""

    def __init__(self, spelling: Spelling, apply: Apply, place: str, parts: Sequence[Part]):
        """Initializes from a spelling and a template.

        Args:
          spelling: spelling of the conversation.
          apply: function that applies the template.
          place: location of the conversation, for errors.
          parts: parts, one or more, that are rendered together because they will be needed.
        """
        self._spelling, self._apply, self._place = spelling, apply, place
        self._parts = parts
        self._made: dict[Part, str | RenderingError] = {}

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The turns as they are passed to the template."""
        return self._spelling.turns

    def __call__(self, count: int, prompt: bool) -> str:
        """Returns the text of the first `count` turns, optionally with a generation prompt.

        Raises:
          JaxtuneError: the template rejects the turns.
        """
        try:
            text = run(self._render((count, prompt)))
        except RenderingError as error:
            raise _rejection(self._place, error) from error
        return restore_numbers(text, self._spelling.numbers)

    def fetch(self) -> Steps[None]:
        """Renders the parts that will be needed, whether the template accepts them or not."""
        with contextlib.suppress(RenderingError):
            yield from self._render(self._parts[0])

    def _render(self, part: Part) -> Steps[str]:
        """Returns what the template writes, before `restore_numbers`."""
        if part not in self._made:
            missing = [p for p in dict.fromkeys((part, *self._parts)) if p not in self._made]
            made = yield from self._apply(self.turns, missing)
            self._made |= dict(zip(missing, made, strict=True))
        made = self._made[part]
        if isinstance(made, RenderingError):
            raise made
        return made

    def is_complete(self, turns: Sequence[dict[str, Any]], whole: Part) -> Steps[bool]:
        """Returns whether a rendering shows all arguments of calls, and the last reasoning.

        Args:
          turns: turns of the conversation in the spelling of the row.
          whole: the part that is the complete conversation.

        Raises:
          RenderingError: the template rejects the conversation.
        """
        if not self._spelling.shows((yield from self._render(whole))):
            return False
        reasons = [i for i, turn in enumerate(turns) if separate_reasoning(turn).strip()]
        if not reasons:
            return True
        # Templates may omit the reasoning of earlier turns, so the last one is rendered as the end.
        rendered = yield from self._render((reasons[-1] + 1, False))
        reasoning = separate_reasoning(turns[reasons[-1]])
        return remove_whitespace(reasoning) in remove_whitespace(rendered)


def choose_rendering(
    turns: Sequence[dict[str, Any]],
    apply: Apply,
    place: str,
    parts: Sequence[Part],
    *,
    generation_prompt: bool = False,
) -> Steps[Rendering]:
    """Returns the rendering of the first spelling of which the template shows all content.

    If the template omits content of every spelling, the first one that it accepts is used; finding
    the spans of its turns then reports what is missing.

    Args:
      turns: turns of the conversation.
      apply: function that applies the template.
      place: location of the conversation, for errors.
      parts: parts, one or more, that will be needed.
      generation_prompt: whether the conversation will be rendered with a generation prompt.

    Raises:
      JaxtuneError: the template rejects every spelling.
    """
    choices = [Rendering(spelling, apply, place, parts) for spelling in spellings(turns)]
    if len(choices) == 1:
        yield from choices[0].fetch()
        return choices[0]
    whole = (len(turns), generation_prompt)
    accepted, rejection = None, None
    for rendering in choices:
        try:
            complete = yield from rendering.is_complete(turns, whole)
        except RenderingError as error:
            rejection = rejection or error
            continue
        if complete:
            return rendering
        accepted = accepted or rendering
    if accepted is None and rejection is not None:
        raise _rejection(place, rejection) from rejection
    return accepted or choices[0]


def _rejection(place: str, error: RenderingError) -> JaxtuneError:
    reason = " ".join(str(error).split())
    return JaxtuneError(f"{place}: the chat template rejects the conversation: {reason}")
