"""Chat templates: render conversations and find the spans to train on."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.chats.builtin import (
    built_in_name,
    built_in_templates,
    matching_built_ins,
    missing_tokens,
    read_template,
    warn_missing_tokens,
)
from jaxtune.chats.clock import fix_clock
from jaxtune.chats.messages import Conversation, Message, check_messages, choose_targets, tool_name
from jaxtune.chats.rendering import (
    Part,
    Rendering,
    Steps,
    TemplateLimitError,
    choose_rendering,
    run,
)
from jaxtune.chats.spans import RewrittenTurn, Span, skip_empty_block, turn_span
from jaxtune.chats.template_process import LimitExceeded, Made, RenderingError, Request
from jaxtune.chats.tokens import Tokenized, tokenize, tokenize_prompt
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_TEMPLATE = 2**20  # characters; those of published models have up to 30,000


class ChatTemplate:
    """A tokenizer with the Jinja template that renders conversations for it.

    Templates run in the sandbox of `transformers`, in a process with limits on time, memory and
    output; see `template_process`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str = "",
        arguments: Mapping[str, Any] | None = None,
        clock: datetime.datetime | None = None,
    ):
        """Checks the tokenizer and the template.

        Args:
          tokenizer: a fast tokenizer of `transformers`.
          source: Jinja source of the template; empty: the tokenizer's own template.
          arguments: template arguments, such as ``{"enable_thinking": False}``.
          clock: date and time that the template prints; None: the time of rendering.

        Raises:
          JaxtuneError: the tokenizer has no offsets or drops spaces, or the source is invalid.
          TemplateLimitError: rendering a short conversation exceeds a limit.
        """
        self.tokenizer = tokenizer
        self.source = source
        self.arguments = arguments or {}
        self.clock: datetime.datetime | None = None
        if not tokenizer.is_fast:
            raise JaxtuneError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; save it with a tokenizer.json"
            )
        probe = tokenizer("two words", add_special_tokens=False)["input_ids"]
        if tokenizer.decode(probe) == "twowords":
            raise JaxtuneError(
                f"{type(tokenizer).__name__} drops spaces: it does not match tokenizer.json (see "
                "tokenizer_class in tokenizer_config.json)"
            )
        own = tokenizer.chat_template or ""
        self._text = source or ("\n".join(own.values()) if isinstance(own, dict) else own)
        if len(self._text) > MAX_TEMPLATE:
            raise TemplateLimitError(
                f"{self._name()}: {len(self._text):,} characters, more than {MAX_TEMPLATE:,}"
            )
        # Candidates for the end token of a turn.
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._missing = missing_tokens(self.source, tokenizer)
        if self.exists():
            self._check_syntax()  # before the clock is set: its macro would shift line numbers
        self.clock = clock

    def exists(self) -> bool:
        """Returns whether there is a template, given as `source` or by the tokenizer."""
        return bool(self.source or self.tokenizer.chat_template)

    def _name(self) -> str:
        """Returns the name of the template for errors: that of a built-in one, or its beginning."""
        name = built_in_name(self.source)
        return f"chat template {name or json.dumps(self._text[:40], ensure_ascii=False) + '…'}"

    def _check_syntax(self) -> None:
        (made,) = run(self._apply([{"role": "user", "content": "?"}], [(1, True)]))
        # A template may reject this probe and still accept the actual conversations.
        if isinstance(made, RenderingError) and made.kind == "TemplateSyntaxError":
            raise JaxtuneError(f"chat template, line {made.line}: {made}") from made

    def _apply(
        self,
        messages: Sequence[Message],
        parts: Sequence[Part],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        place: str = "",
    ) -> Steps[Made]:
        """Returns the text, or the error of the template, for each part of a conversation."""
        try:
            source = self.source or self.tokenizer.get_chat_template(tools=tools)
            source = source if self.clock is None else fix_clock(source, self.clock)
            given = {**self.tokenizer.special_tokens_map, **self.arguments, **(arguments or {})}
            request = Request.of(source, messages, parts, tools, given)
        except LimitExceeded as error:
            raise self._limit_error(place, error) from error
        # Several templates without a default; values that JSON lacks.
        except (TypeError, ValueError, RecursionError) as error:
            return [RenderingError(str(error), type(error).__name__, None)] * len(parts)
        try:
            return (yield request)
        except LimitExceeded as error:
            raise self._limit_error(place, error) from error

    def _limit_error(self, place: str, error: LimitExceeded) -> TemplateLimitError:
        where = f"{place}: " if place else ""
        return TemplateLimitError(f"{where}{self._name()} {error}")

    def _rendering(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        arguments: Mapping[str, Any] | None,
        place: str,
        parts: Sequence[Part],
        *,
        generation_prompt: bool = False,
    ) -> Steps[Rendering]:
        """Returns the renderings of a conversation and its first turns.

        `parts` are those that will be needed.

        Raises:
          JaxtuneError: there is no template, or it rejects the conversation.
        """
        if not self.exists():
            raise JaxtuneError(
                f"{place}: messages require a chat template and the tokenizer has none; set "
                "data.chat_template (chat_template= of jaxtune.load, --chat-template of jaxtune "
                "generate) to a Jinja file or a built-in template "
                f"({', '.join(built_in_templates())}), or use jaxtune generate --raw"
            )
        turns = [dict(message) for message in messages]
        if "developer" not in self._text:
            for turn in turns:
                turn["role"] = "system" if turn["role"] == "developer" else turn["role"]

        def apply(turns: Sequence[Message], parts: Sequence[Part]) -> Steps[Made]:
            made = yield from self._apply(turns, parts, tools, arguments, place)
            if self._missing:
                for text in made:
                    warn_missing_tokens(str(text), self._missing, self.source)
            return made

        return (
            yield from choose_rendering(
                turns, apply, place, parts, generation_prompt=generation_prompt
            )
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        place: str = "chat",
    ) -> str:
        """Returns the conversation as text.

        Args:
          messages: turns with role and content, one or more.
          generation_prompt: whether the text ends with the start of the assistant's next turn.
          tools: JSON schemas of functions, for templates that support them.
          arguments: template arguments; override those of the constructor.
          place: location of the conversation, for errors.

        Raises:
          JaxtuneError: there is no template, or it rejects the conversation.
        """
        return run(
            self.render_steps(
                messages,
                generation_prompt=generation_prompt,
                tools=tools,
                arguments=arguments,
                place=place,
            )
        )

    def render_steps(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        place: str = "chat",
    ) -> Steps[str]:
        """Returns the conversation as text, in steps; see `render`."""
        part = (len(messages), generation_prompt)
        rendering = yield from self._rendering(
            messages, tools, arguments, place, [part], generation_prompt=generation_prompt
        )
        return rendering(*part)

    def spans(
        self,
        messages: Sequence[Message],
        place: str,
        learned: Sequence[int] | None = None,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        *,
        empty_reasoning: bool = True,
    ) -> tuple[str, list[Span]]:
        """Renders a conversation and finds the spans of assistant turns; see `turn_span`.

        Args:
          messages: checked turns; see `check_messages`.
          place: location of the conversation, for errors.
          learned: indices of the turns to find; all assistant turns by default.
          tools: JSON schemas of functions, for templates that support them.
          arguments: template arguments; override those of the constructor.
          empty_reasoning: whether spans include empty think blocks.

        Returns:
          The text, and ``(start, end)`` of each turn, in characters.

        Raises:
          JaxtuneError: there is no assistant turn, or the template rewrites turns or omits tools.
        """
        return run(
            self.spans_steps(
                messages, place, learned, tools, arguments, empty_reasoning=empty_reasoning
            )
        )

    def spans_steps(
        self,
        messages: Sequence[Message],
        place: str,
        learned: Sequence[int] | None = None,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        *,
        empty_reasoning: bool = True,
    ) -> Steps[tuple[str, list[Span]]]:
        """Returns the text and the spans of assistant turns, in steps; see `spans`."""
        if learned is None:
            learned = choose_targets(
                Conversation([*map(dict, messages)], [None] * len(messages)), "all", place
            )
        # The renderings that `turn_span` compares.
        parts = [(len(messages), False)]
        for index in learned:
            parts += [(index, True), (index + 1, False)] if index else []
        rendering = yield from self._rendering(messages, tools, arguments, place, parts)
        text, found = rendering(len(messages), False), []
        yield from self._check_tools(messages, text, tools, arguments, place)
        for index in learned:
            if index == 0:
                raise JaxtuneError(f"{place}: messages[0] is an assistant turn without a prompt")
            try:
                span = turn_span(rendering.turns, index, rendering, self._added)
            except RewrittenTurn as change:
                raise self._rewrite_error(place, index, str(change), arguments) from change
            if not empty_reasoning:
                span = skip_empty_block(text, span, rendering.turns[index])
            found.append(span)
        return text, found

    def _check_tools(
        self,
        messages: Sequence[Message],
        text: str,
        tools: list[Any] | None,
        arguments: Mapping[str, Any] | None,
        place: str,
    ) -> Steps[None]:
        """Raises if the rendering `text` omits a tool."""
        if not tools:
            return
        try:
            # A short name may occur in the text by chance, so the renderings are compared as well.
            plain = yield from self.render_steps(messages, arguments=arguments, place=place)
            shown = text != plain
        except TemplateLimitError:
            raise
        except JaxtuneError:  # the template may require tools
            shown = True
        for name in map(tool_name, tools):
            if not shown or name not in text:
                raise JaxtuneError(
                    f"{place}: the chat template does not show the tool {name}; describe the tools "
                    "in the system turn, or set data.chat_template to a template with tools"
                )

    def unread_keys(
        self,
        messages: Sequence[Message],
        keys: Iterable[str],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> set[str]:
        """Returns the keys of turns that do not affect the rendering.

        A key that the source of the template never mentions has no effect; for any other key, the
        conversation is rendered with and without it.
        """
        unread = {key for key in keys if not re.search(rf"\b{re.escape(key)}\b", self._text)}
        mentioned = set(keys) - unread
        if not mentioned:
            return unread
        text = self.render(messages, tools=tools, arguments=arguments)
        for key in mentioned:
            without = [{k: v for k, v in turn.items() if k != key} for turn in messages]
            if self.render(without, tools=tools, arguments=arguments) == text:
                unread.add(key)
        return unread

    def encode(self, messages: Sequence[Message], place: str = "chat") -> Tokenized:
        """Returns the tokens and labels of a conversation, int[n]; assistant turns are targets.

        Raises:
          JaxtuneError: the messages are invalid, or the template rejects or rewrites them.
        """
        text, spans = self.spans(check_messages(messages, place), place)
        # The template itself writes BOS if the model uses it.
        return tokenize(self.tokenizer, text, spans, complete=False)

    def _rewrite_error(
        self, place: str, index: int, what: str, arguments: Mapping[str, Any] | None
    ) -> JaxtuneError:
        names: list[str] = []
        with contextlib.suppress(JaxtuneError):
            question = [{"role": "user", "content": "?"}]
            asked = self.render(question, generation_prompt=True, arguments=arguments)
            names = matching_built_ins(asked, self.tokenizer, other_than=self.source)
        built_in = f" or a built-in template such as {names[0]}" if names else ""
        return JaxtuneError(
            f"{place}: the chat template rewrites the conversation: messages[{index}] {what} (some "
            "templates remove or add reasoning), so its targets cannot be determined; end the row "
            "with the turn to train on, or set data.chat_template to a template that keeps every "
            f"turn unchanged: a Jinja file{built_in}"
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_template: str = "",
    arguments: Mapping[str, Any] | None = None,
    clock: datetime.datetime | None = None,
) -> list[int]:
    """Returns the token ids of a conversation with a generation prompt, int[n].

    Args:
      tokenizer: a fast tokenizer of `transformers`.
      messages: turns with role and content.
      chat_template: Jinja file or name of a built-in template; empty: the tokenizer's own.
      arguments: template arguments, such as ``{"enable_thinking": False}``.
      clock: date and time that the template prints; None: now.

    Raises:
      JaxtuneError: the messages are invalid, or the template rejects them.
    """
    template = ChatTemplate(tokenizer, read_template(chat_template), arguments, clock)
    turns = check_messages(messages, "prompt")
    text = template.render(turns, generation_prompt=True, place="prompt")
    return tokenize_prompt(tokenizer, text, complete=False)
