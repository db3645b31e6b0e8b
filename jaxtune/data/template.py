"""Chat templates: conversations as text, and which of its characters are targets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from jaxtune.data.messages import Conversation, Message, check_messages, choose_targets, tool_name
from jaxtune.data.tokens import Tokenized, tokenize, tokenize_prompt
from jaxtune.errors import JaxtuneError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = Path(__file__).parent / "templates"


def built_in_templates() -> dict[str, Path]:
    """Returns the Jinja files that come with jaxtune, by the name that data.chat_template takes."""
    found = {path.stem: path for path in BUILT_IN.glob("*.jinja")}
    return dict(sorted(found.items()))


def read_template(path: str | Path) -> str:
    """Returns the Jinja source that data.chat_template names; an empty path gives ``""``.

    Args:
      path: the name of a built-in template, or a file.

    Raises:
      JaxtuneError: neither of these, or a file that cannot be read.
    """
    if not str(path):
        return ""
    known = built_in_templates()
    try:
        return known.get(str(path), Path(path).expanduser()).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise JaxtuneError(
            f"data.chat_template={path}: No such file or built-in template"
            f"{closest(str(path), known)} (built in: {', '.join(known)})"
        ) from error
    # No home directory of that name; a zero byte in the path.
    except (RuntimeError, ValueError, OSError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = getattr(error, "strerror", None) or reason
        raise JaxtuneError(f"data.chat_template={path}: {reason}") from error


class ChatTemplate:
    """A tokenizer together with the Jinja template that writes conversations for it.

    Templates run in the sandbox of `transformers`, which stops escapes but not endless work: use
    those of checkpoints that you trust.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str = ""):
        """Checks that tokenizer and template can be used.

        Args:
          tokenizer: a fast tokenizer of `transformers`.
          source: Jinja source used in place of the tokenizer's own template; empty: its own.

        Raises:
          JaxtuneError: the tokenizer has no offsets or loses spaces, or the source has an error.
        """
        self.tokenizer = tokenizer
        self.source = source
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
        # A turn's end token is among these, whatever a checkpoint calls it.
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        if self.exists():
            self._check_syntax()

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
        self, messages: Sequence[Message], generation_prompt: bool, tools: list[Any] | None = None
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.source or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            tools=tools,
        )
        assert isinstance(text, str)
        return text

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: list[Any] | None = None,
        place: str = "chat",
    ) -> str:
        """Returns the conversation as text.

        Args:
          messages: turns with role and content, one or more.
          generation_prompt: whether to end with the opening of the assistant's next turn.
          tools: descriptions of functions, for templates that show them.
          place: what to call the conversation in an error.

        Raises:
          JaxtuneError: there is no template, or it refuses the conversation.
        """
        if not self.exists():
            raise JaxtuneError(
                f"{place}: messages need a chat template and the tokenizer has none: "
                "set data.chat_template to a Jinja file or a built-in template "
                f"({', '.join(built_in_templates())})"
            )
        try:
            try:
                return self._apply(messages, generation_prompt, tools)
            except TypeError:
                # DeepSeek's own templates join arguments to text, others render the object.
                texts = _with_arguments_as_text(messages)
                if texts is None:
                    raise
                return self._apply(texts, generation_prompt, tools)
        # Any expression of the template may fail in its own way.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise JaxtuneError(
                f"{place}: the chat template refuses the conversation: {reason}"
            ) from error

    def spans(
        self,
        messages: Sequence[Message],
        place: str,
        learnt: Sequence[int] | None = None,
        tools: list[Any] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation and finds what the assistant wrote in it.

        A turn starts where the generation prompt after the turns before it ends, and ends with the
        rendering of the turns up to it; the end token belongs to it, white space after that
        token does not.

        Args:
          messages: turns as `check_messages` returns them.
          place: what to call the conversation in an error.
          learnt: which turns are looked for; all of the assistant by default.
          tools: descriptions of functions, for templates that show them.

        Returns:
          The text, and ``(start, end)`` in characters of every turn looked for.

        Raises:
          JaxtuneError: no assistant turn, or the template rewrites turns, so that no rendering of
            the first turns is a prefix of the whole, or leaves tools out.
        """
        if learnt is None:
            learnt = choose_targets(
                Conversation([*map(dict, messages)], [None] * len(messages)), "all", place
            )
        text, spans = self.render(messages, tools=tools, place=place), []
        for name in map(tool_name, tools or ()):
            if name not in text:
                raise JaxtuneError(
                    f"{place}: the chat template does not show the tool {name}: describe the "
                    "tools in the system turn, or set data.chat_template to one that does"
                )
        for index in learnt:
            if index == 0:
                raise JaxtuneError(
                    f"{place}: messages[0] is an assistant turn that answers nothing"
                )
            prompt = self.render(messages[:index], generation_prompt=True, tools=tools, place=place)
            last = index + 1 == len(messages)
            turn = text if last else self.render(messages[: index + 1], tools=tools, place=place)
            if not turn.startswith(prompt):
                raise _rewrites(place, index, "renders differently from its generation prompt")
            if not text.startswith(turn):
                raise _rewrites(place, index, "renders differently once other turns follow")
            written = turn[len(prompt) :]
            if not _is_whole(messages[index], written):
                # The prompt may have opened what the content says itself, such as <think>.
                before = self.render(messages[:index], tools=tools, place=place)
                whole = turn.startswith(before) and _is_whole(messages[index], turn[len(before) :])
                if not whole:
                    raise _rewrites(place, index, "is not rendered whole")
            spans.append((len(prompt), len(prompt) + self._trimmed(written)))
        return text, spans

    def _trimmed(self, turn: str) -> int:
        """Returns the length of a turn without the white space that follows its end token."""
        kept = turn.rstrip()
        return len(kept) if kept.endswith(self._added) else len(turn)

    def encode(self, messages: Sequence[Message], place: str = "chat") -> Tokenized:
        """Returns the tokens of a conversation; its assistant turns are the labels.

        Raises:
          JaxtuneError: as `check_messages` and `spans` do.
        """
        text, spans = self.spans(check_messages(messages, place), place)
        # The template writes BOS itself where the model wants one.
        return tokenize(self.tokenizer, text, spans, complete=False)


def _with_arguments_as_text(messages: Sequence[Message]) -> list[dict[str, Any]] | None:
    """Returns the turns with the arguments of calls as JSON text; None where there are no calls."""
    turns, found = [], False
    for message in messages:
        turn = dict(message)
        if calls := turn.get("tool_calls"):
            found = True
            turn["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": arguments}}
                for call in calls
                for arguments in [json.dumps(call["function"]["arguments"], ensure_ascii=False)]
            ]
        turns.append(turn)
    return turns if found else None


def _is_whole(message: Message, written: str) -> bool:
    """Returns whether a rendering has the content and the calls of a turn, but for white space."""
    parts = [message["content"] or ""]
    for call in message.get("tool_calls", ()):
        parts += [call["function"]["name"], *call["function"]["arguments"]]
    squeezed = "".join(written.split())
    return all("".join(part.split()) in squeezed for part in parts)


def _rewrites(place: str, index: int, what: str) -> JaxtuneError:
    return JaxtuneError(
        f"{place}: the chat template rewrites the conversation: messages[{index}] {what} (some "
        "templates delete or add reasoning), so its targets cannot be told; end the row at the "
        "turn to learn, or set data.chat_template to one that keeps every turn as it is: a Jinja "
        "file, or a built-in such as deepseek-r1"
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat_template: str = ""
) -> list[int]:
    """Returns the token ids of a conversation that the assistant is to go on with, int[n].

    Args:
      tokenizer: a fast tokenizer of `transformers`.
      messages: turns with role and content.
      chat_template: a Jinja file or the name of a built-in template, used in place of the
        tokenizer's own; empty: its own.
    """
    template = ChatTemplate(tokenizer, read_template(chat_template))
    turns = check_messages(messages, "prompt")
    text = template.render(turns, generation_prompt=True, place="prompt")
    return tokenize_prompt(tokenizer, text, complete=False)
