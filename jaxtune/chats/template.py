"""Chat templates: conversations as text, and which of its characters are targets."""

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
    """A tokenizer together with the Jinja template that writes conversations for it.

    Templates run in the sandbox of `transformers`, which stops escapes but not endless work: use
    those of checkpoints that you trust.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str = "",
        arguments: Mapping[str, Any] | None = None,
        clock: datetime.datetime | None = None,
    ):
        """Checks that tokenizer and template can be used.

        Args:
          tokenizer: a fast tokenizer of `transformers`.
          source: Jinja source used in place of the tokenizer's own template; empty: its own.
          arguments: of the template, such as ``{"enable_thinking": False}``.
          clock: the time that the template prints; None: that of each rendering.

        Raises:
          JaxtuneError: the tokenizer has no offsets or loses spaces, or the source has an error.
        """
        self.tokenizer = tokenizer
        self.source = source
        self.arguments = arguments or {}
        self.clock: datetime.datetime | None = None
        if not tokenizer.is_fast:
            raise JaxtuneError(
                f"{type(tokenizer).__name__} gives no offsets: save it with a tokenizer.json"
            )
        probe = tokenizer("two words", add_special_tokens=False)["input_ids"]
        if tokenizer.decode(probe) == "twowords":
            raise JaxtuneError(
                f"{type(tokenizer).__name__} loses spaces: it is not the class this "
                "tokenizer.json was made for (see tokenizer_class in tokenizer_config.json)"
            )
        own = tokenizer.chat_template or ""
        self._text = source or ("\n".join(own.values()) if isinstance(own, dict) else own)
        # A turn's end token is among these, whatever a checkpoint calls it.
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        self._missing = missing_tokens(self.source, tokenizer)
        if self.exists():
            self._check_syntax()  # whose line numbers are those without a fixed clock
        self.clock = clock

    def exists(self) -> bool:
        """Returns whether there is a template, given or the tokenizer's own."""
        return bool(self.source or self.tokenizer.chat_template)

    def _check_syntax(self) -> None:
        try:
            self._apply([{"role": "user", "content": "?"}], generation_prompt=True)
        except jinja2.TemplateSyntaxError as error:
            raise JaxtuneError(f"chat template, line {error.lineno}: {error.message}") from error
        except Exception:
            # A template may refuse this conversation; whether it takes the real ones shows there.
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
          JaxtuneError: there is no template, or it refuses the conversation.
        """
        if not self.exists():
            raise JaxtuneError(
                f"{place}: messages need a chat template and the tokenizer has none: "
                "set data.chat_template (chat_template= of jaxtune.load, --chat-template of "
                "jaxtune generate) to a Jinja file or a built-in template "
                f"({', '.join(built_in_templates())}); jaxtune generate --raw needs none"
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
          generation_prompt: whether to end with the opening of the assistant's next turn.
          tools: descriptions of functions, for templates that show them.
          arguments: of the template, in addition to and before those of all conversations.
          place: what to call the conversation in an error.

        Raises:
          JaxtuneError: there is no template, or it refuses the conversation.
        """
        rendering = self._rendering(
            messages, tools, arguments, place, generation_prompt=generation_prompt
        )
        return rendering(len(messages), generation_prompt)

    def spans(
        self,
        messages: Sequence[Message],
        place: str,
        learnt: Sequence[int] | None = None,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        *,
        empty_reasoning: bool = True,
    ) -> tuple[str, list[Span]]:
        """Renders a conversation and finds what the assistant wrote in it, as `turn_span` says.

        Args:
          messages: turns as `check_messages` returns them.
          place: what to call the conversation in an error.
          learnt: which turns are looked for; all of the assistant by default.
          tools: descriptions of functions, for templates that show them.
          arguments: of the template, in addition to and before those of all conversations.
          empty_reasoning: whether the empty think block of a turn belongs to it.

        Returns:
          The text, and ``(start, end)`` in characters of every turn looked for.

        Raises:
          JaxtuneError: no assistant turn, or the template rewrites turns or leaves tools out.
        """
        if learnt is None:
            learnt = choose_targets(
                Conversation([*map(dict, messages)], [None] * len(messages)), "all", place
            )
        rendering = self._rendering(messages, tools, arguments, place)
        text, found = rendering(len(messages), False), []
        self._check_tools(messages, text, tools, arguments, place)
        for index in learnt:
            if index == 0:
                raise JaxtuneError(
                    f"{place}: messages[0] is an assistant turn that answers nothing"
                )
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
        """Raises where a rendering leaves a tool out."""
        if not tools:
            return
        shown = True
        with contextlib.suppress(JaxtuneError):  # a template may refuse to do without
            # A short name may stand in the text by chance.
            shown = text != self.render(messages, arguments=arguments, place=place)
        for name in map(tool_name, tools):
            if not shown or name not in text:
                raise JaxtuneError(
                    f"{place}: the chat template does not show the tool {name}: describe the "
                    "tools in the system turn, or set data.chat_template to one that does"
                )

    def unread_keys(
        self,
        messages: Sequence[Message],
        keys: Iterable[str],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> set[str]:
        """Returns those keys of turns without which the conversation renders the same."""
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
        """Returns the tokens of a conversation; its assistant turns are the labels.

        Raises:
          JaxtuneError: as `check_messages` and `spans` do.
        """
        text, spans = self.spans(check_messages(messages, place), place)
        # The template writes BOS itself where the model wants one.
        return tokenize(self.tokenizer, text, spans, complete=False)

    def _rewrite_error(
        self, place: str, index: int, what: str, arguments: Mapping[str, Any] | None
    ) -> JaxtuneError:
        names: list[str] = []
        with contextlib.suppress(JaxtuneError):
            question = [{"role": "user", "content": "?"}]
            asked = self.render(question, generation_prompt=True, arguments=arguments)
            names = matching_built_ins(asked, self.tokenizer, other_than=self.source)
        built_in = f", or a built-in such as {names[0]}" if names else ""
        return JaxtuneError(
            f"{place}: the chat template rewrites the conversation: messages[{index}] {what} (some "
            "templates delete or add reasoning), so its targets cannot be told; end the row at the "
            "turn to learn, or set data.chat_template to one that keeps every turn as it is: a "
            f"Jinja file{built_in}"
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    chat_template: str = "",
    arguments: Mapping[str, Any] | None = None,
    clock: datetime.datetime | None = None,
) -> list[int]:
    """Returns the token ids of a conversation that the assistant is to go on with, int[n].

    Args:
      tokenizer: a fast tokenizer of `transformers`.
      messages: turns with role and content.
      chat_template: a Jinja file or the name of a built-in template, used in place of the
        tokenizer's own; empty: its own.
      arguments: of the template, such as ``{"enable_thinking": False}``.
      clock: the time that the template prints; None: now.
    """
    template = ChatTemplate(tokenizer, read_template(chat_template), arguments, clock)
    turns = check_messages(messages, "prompt")
    text = template.render(turns, generation_prompt=True, place="prompt")
    return tokenize_prompt(tokenizer, text, complete=False)
