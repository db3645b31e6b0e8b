"""The chat templates that come with jaxtune, and Jinja files by path."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from jaxtune.errors import JaxtuneError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parent / "templates"
# Tokens that only stand between turns; the think tags are text in many tokenizers.
_CONTROL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>")


def built_in_templates() -> dict[str, Path]:
    """Returns the Jinja files that come with jaxtune, by the name that data.chat_template takes."""
    found = {path.stem: path for path in BUILT_IN.glob("*.jinja")}
    return dict(sorted(found.items()))


def read_template(path: str | Path, key: str = "data.chat_template") -> str:
    """Returns the Jinja source that data.chat_template names; an empty path gives ``""``.

    Args:
      path: the name of a built-in template, or a file.
      key: what to call the setting in an error.

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
            f"{key}={path}: No such file or built-in template"
            f"{closest(str(path), known)} (built in: {', '.join(known)})"
        ) from error
    # No home directory of that name; a zero byte in the path.
    except (RuntimeError, ValueError, OSError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = getattr(error, "strerror", None) or reason
        raise JaxtuneError(f"{key}={path}: {reason}") from error


@functools.cache
def built_in_name(source: str) -> str:
    """Returns the name of the built-in template that Jinja source is; empty if it is none."""
    found = (n for n, path in built_in_templates().items() if path.read_text("utf-8") == source)
    return next(found, "")


def missing_tokens(source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the control tokens that a template writes and a tokenizer lacks.

    Args:
      source: of the template; empty: the tokenizer's own, which is not looked into.
      tokenizer: of the model.

    Returns:
      How many tokens each one becomes.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens = [token for token in dict.fromkeys(_CONTROL.findall(source)) if token not in added]
    counts = {t: len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in tokens}
    return {token: count for token, count in counts.items() if count > 1}


def warn_missing_tokens(text: str, missing: dict[str, int], source: str) -> None:
    """Names the tokens of `missing_tokens` that a rendering has, each of them once.

    Args:
      text: rendered.
      missing: from which those that are named are taken.
      source: of the template.
    """
    named = [token for token in missing if token in text]
    if named:
        counts = ", ".join(f"{token} (it becomes {missing.pop(token)} tokens)" for token in named)
        logger.warning(
            "data.chat_template%s writes what is not a token of this tokenizer: %s; choose the "
            "template of the model's own family, or add the tokens",
            f"={name}" if (name := built_in_name(source)) else "",
            counts,
        )


def matching_built_ins(
    asked: str, tokenizer: PreTrainedTokenizerBase, *, other_than: str
) -> list[str]:
    """Returns the built-in templates of a family, by how it asks.

    Args:
      asked: the user turn ``?`` with the prompt for the answer, as the family renders them.
      tokenizer: of the model.
      other_than: source of the template that is not wanted.
    """
    names = []
    for name in built_in_templates():
        source = read_template(name)
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}],
                chat_template=source,
                tokenize=False,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError:  # the tokenizer lacks BOS or EOS
            continue
        if prompt == asked and source != other_than:
            names.append(name)
    return names


def set_default_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    """Returns a template that renders as `source` does with these arguments.

    A caller's own arguments come before them, so the template of an exported model asks as the
    model was trained to be asked, and can still be asked otherwise.

    Args:
      source: Jinja.
      arguments: values that JSON can hold.
    """
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in arguments.items()
        if name.isidentifier()
    ]
    return "".join(lines) + source


def _literal(value: Any) -> str:
    """Returns a value as Jinja writes it, which is JSON but for null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
