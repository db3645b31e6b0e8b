"""Chat templates: conversations as text, and which of its tokens are targets.

Labels are aligned with the tokens, as Hugging Face has them: ``labels[t]`` is ``tokens[t]`` where
that token is to be learnt and `IGNORE` elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np

from jaxtune.errors import JaxtuneError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
ROLES = ("system", "user", "assistant", "tool")
BUILT_IN = Path(__file__).parent / "templates"

Message = Mapping[str, Any]


class Tokenized(NamedTuple):
    """An example's token ids and labels, both int[n]."""

    tokens: Sequence[int]
    labels: Sequence[int]


def check_text(value: Any, name: str, place: str) -> str:
    """Returns `value` if it is a string that can be tokenized; raises naming `place` if not."""
    if not isinstance(value, str):
        raise JaxtuneError(f"{place}: {name} must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise JaxtuneError(f"{place}: {name} holds half a surrogate pair") from error
    return value


def check_messages(messages: Any, place: str) -> list[dict[str, str]]:
    """Returns the conversation as ``{"role", "content"}`` turns; raises naming `place`."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise JaxtuneError(f"{place}: messages must be a list of one or more turns")
    turns = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise JaxtuneError(f"{place}: {name} must be an object with role and content")
        given = {key: value for key, value in message.items() if value is not None}
        for key in ("role", "content"):
            if key not in given:
                raise JaxtuneError(f"{place}: {name} has no {key}")
        if unknown := sorted(set(given) - {"role", "content"}):
            raise JaxtuneError(
                f'{place}: {name} has the key "{unknown[0]}"; a turn is role and content alone'
            )
        if given["role"] not in ROLES:
            role = str(given["role"])
            raise JaxtuneError(
                f'{place}: {name}.role="{role}" is unknown{closest(role, ROLES)} '
                f"(known: {', '.join(ROLES)})"
            )
        content = check_text(given["content"], f"{name}.content", place)
        if given["role"] == "assistant" and not content.strip():
            raise JaxtuneError(f"{place}: {name} is an empty assistant turn")
        turns.append({"role": given["role"], "content": content})
    return turns


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
        return known.get(str(path), Path(path).expanduser()).read_text(encoding="utf-8")
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

    def _apply(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        turns = [dict(message) for message in messages]
        text = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.source or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = False, place: str = "chat"
    ) -> str:
        """Returns the conversation as text.

        Args:
          messages: turns with role and content, one or more.
          generation_prompt: whether to end with the opening of the assistant's next turn.
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
            return self._apply(messages, generation_prompt)
        # Any expression of the template may fail in its own way.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise JaxtuneError(
                f"{place}: the chat template refuses the conversation: {reason}"
            ) from error

    def spans(self, messages: Sequence[Message], place: str) -> tuple[str, list[tuple[int, int]]]:
        """Renders a conversation and finds what the assistant wrote in it.

        A turn starts where the generation prompt after the turns before it ends, and ends with the
        rendering of the turns up to it; the end token belongs to it, white space after that
        token does not.

        Args:
          messages: turns as `check_messages` returns them.
          place: what to call the conversation in an error.

        Returns:
          The text, and ``(start, end)`` in characters of every assistant turn.

        Raises:
          JaxtuneError: no assistant turn, or the template rewrites turns, so that no rendering of
            the first turns is a prefix of the whole.
        """
        text = self.render(messages, place=place)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise JaxtuneError(
                    f"{place}: messages[0] is an assistant turn that answers nothing"
                )
            before = self.render(messages[:index], place=place)
            prompt = self.render(messages[:index], generation_prompt=True, place=place)
            turn = self.render(messages[: index + 1], place=place)
            if not turn.startswith(prompt):
                raise _rewrites(place, index, "renders differently from its generation prompt")
            if not text.startswith(turn):
                raise _rewrites(place, index, "renders differently once other turns follow")
            written = turn[len(before) :] if turn.startswith(before) else turn[len(prompt) :]
            if "".join(message["content"].split()) not in "".join(written.split()):
                raise _rewrites(place, index, "is not rendered whole")
            spans.append((len(prompt), len(prompt) + self._trimmed(turn[len(prompt) :])))
        if not spans:
            raise JaxtuneError(f"{place}: no assistant turn, so nothing to learn")
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
        return tokenize(self.tokenizer, text, spans, add_special_tokens=False)


def _rewrites(place: str, index: int, what: str) -> JaxtuneError:
    return JaxtuneError(
        f"{place}: the chat template rewrites the conversation: messages[{index}] {what} (some "
        "templates delete or add reasoning), so its targets cannot be told; end the row at the "
        "turn to learn, or set data.chat_template to one that keeps every turn as it is: a Jinja "
        "file, or a built-in such as deepseek-r1"
    )


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    add_special_tokens: bool,
) -> Tokenized:
    """Tokenizes `text` once, as a whole; tokens with a character in a span are labels.

    Args:
      tokenizer: a fast tokenizer.
      text: the whole example.
      spans: ``(start, end)`` in characters. A token over a span's edge counts as within: left out,
        an answer's first word would never be learnt after a prompt that ends in a space.
      add_special_tokens: whether the tokenizer adds those that it adds by itself, such as BOS.

    Returns:
      tokens and labels, int[n] each.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    tokens = encoded["input_ids"]
    starts, ends = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    learnt = np.zeros(len(tokens), bool)
    for start, end in spans:
        learnt |= (starts < end) & (ends > start) & (ends > starts)
    return Tokenized(tokens, np.where(learnt, tokens, IGNORE).tolist())


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
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
