"""Chat templates: render conversations and find the spans to train on."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from jaxtune.chats.builtin import (
    built_in_templates,
    matching_built_ins,
    missing_tokens,
    read_template,
    warn_missing_tokens,
)
from jaxtune.chats.clock import fix_clock
from jaxtune.chats.messages import Conversation, Message, check_messages, choose_targets, tool_name
from jaxtune.chats.rendering import Rendering, choose_rendering
from jaxtune.chats.spans import RewrittenTurn, Span, skip_empty_block, turn_span
from jaxtune.chats.tokens import Tokenized, tokenize, tokenize_prompt
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    """A tokenizer with the Jinja template that renders conversations for it.

    Templates run in the sandbox of `transformers`, which does not limit their running time: use
    only templates that you trust.
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
        # Candidates for the end token of a turn.
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._missing = missing_tokens(self.source, tokenizer)
        if self.exists():
            self._check_syntax()  # before the clock is set: its macro would shift line numbers
        self.clock = clock

    def exists(self) -> bool:
        """Returns whether there is a template, given as `source` or by the tokenizer."""
        return bool(self.source or self.tokenizer.chat_template)

    def _check_syntax(self) -> None:
        try:
            self._apply([{"role": "user", "content": "?"}], generation_prompt=True)
        except jinja2.TemplateSyntaxError as error:
            raise JaxtuneError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception:
            # A template may reject this probe and still accept the actual conversations.
            return

    def _apply(
        self,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        source = self.source or self.tokenizer.get_chat_template(tools=tools)
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=source if self.clock is None else fix_clock(source, self.clock),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            tools=tools,
            **{**self.arguments, **(arguments or {})},
        )
        assert isinstance(text, str)
        return text

    def _rendering(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        arguments: Mapping[str, Any] | None,
        place: str,
        *,
        generation_prompt: bool = False,
    ) -> Rendering:
        """Returns the renderings of a conversation and its first turns.

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

        def apply(some: Sequence[Message], prompt: bool) -> str:
            text = self._apply(some, prompt, tools, arguments)
            warn_missing_tokens(text, self._missing, self.source)
            return text

        return choose_rendering(turns, apply, place, generation_prompt=generation_prompt)

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
        rendering = self._rendering(
            messages, tools, arguments, place, generation_prompt=generation_prompt
        )
        return rendering(len(messages), generation_prompt)

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
        if learned is None:
            learned = choose_targets(
                Conversation([*map(dict, messages)], [None] * len(messages)), "all", place
            )
        rendering = self._rendering(messages, tools, arguments, place)
        text, found = rendering(len(messages), False), []
        self._check_tools(messages, text, tools, arguments, place)
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
    ) -> None:
        """Raises if the rendering `text` omits a tool."""
        if not tools:
            return
        shown = True
        with contextlib.suppress(JaxtuneError):  # the template may require tools
            # A short name may occur in the text by chance, so the renderings are compared as well.
            shown = text != self.render(messages, arguments=arguments, place=place)
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
