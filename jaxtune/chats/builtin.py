"""Built-in chat templates, and templates from Jinja files."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.chats.template_process import RenderingError, Request, render
from jaxtune.errors import JaxtuneError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parent / "templates"
# Control tokens such as <|im_end|>. Think tags are excluded, because many tokenizers lack them.
_CONTROL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>")


def built_in_templates() -> dict[str, Path]:
    """Returns the Jinja files of the built-in templates, by name."""
    found = {path.stem: path for path in BUILT_IN.glob("*.jinja")}
    return dict(sorted(found.items()))


def read_template(path: str | Path, key: str = "data.chat_template") -> str:
    """Returns the Jinja source of a chat template; ``""`` for an empty path.

    Args:
      path: name of a built-in template, or a file.
      key: name of the setting, for errors.

    Raises:
      JaxtuneError: there is no such template or file, or the file cannot be read.
    """
    if not str(path):
        return ""
    known = built_in_templates()
    try:
        file = known.get(str(path), Path(path).expanduser())
        if file.exists() and not file.is_file():
            raise JaxtuneError(f"{key}={path}: not a regular file")
        return file.read_text(encoding="utf-8-sig")
    except JaxtuneError:
        raise
    except FileNotFoundError as error:
        raise JaxtuneError(
            f"{key}={path}: no such file or built-in template"
            f"{closest(str(path), known)} (built-in: {', '.join(known)})"
        ) from error
    # Among others: the user of ~user does not exist; the path has a zero byte.
    except (RuntimeError, ValueError, OSError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = getattr(error, "strerror", None) or reason
        raise JaxtuneError(f"{key}={path}: {reason}") from error


@functools.cache
def built_in_name(source: str) -> str:
    """Returns the name of the built-in template with this Jinja source, or an empty string."""
    found = (n for n, path in built_in_templates().items() if path.read_text("utf-8") == source)
    return next(found, "")


def missing_tokens(source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the control tokens of a template that the tokenizer does not have.

    Args:
      source: Jinja source; empty: the tokenizer's own template, which is not checked.
      tokenizer: tokenizer of the model.

    Returns:
      The number of tokens into which each of them is split.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens = [token for token in dict.fromkeys(_CONTROL.findall(source)) if token not in added]
    counts = {t: len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in tokens}
    return {token: count for token, count in counts.items() if count > 1}


def warn_missing_tokens(text: str, missing: dict[str, int], source: str) -> None:
    """Warns of missing control tokens in a rendered text, once per token.

    Args:
      text: rendered text.
      missing: result of `missing_tokens`; reported tokens are removed from it.
      source: Jinja source of the template.
    """
    named = [token for token in missing if token in text]
    if named:
        counts = ", ".join(f"{token} (split into {missing.pop(token)} tokens)" for token in named)
        logger.warning(
            "data.chat_template%s uses control tokens that the tokenizer does not have: %s; use "
            "the template of the model's family, or add the tokens",
            f"={name}" if (name := built_in_name(source)) else "",
            counts,
        )


def matching_built_ins(
    asked: str, tokenizer: PreTrainedTokenizerBase, *, other_than: str
) -> list[str]:
    """Returns the names of the built-in templates that render a prompt to the same text.

    Args:
      asked: rendering of the user turn ``?`` with the generation prompt.
      tokenizer: tokenizer of the model.
      other_than: Jinja source of a template to exclude.
    """
    names, question = [], [{"role": "user", "content": "?"}]
    for name in built_in_templates():
        source = read_template(name)
        special = tokenizer.special_tokens_map
        (prompt,) = render(Request.of(source, question, [(1, True)], None, special))
        # A template fails, for example, if the tokenizer has no BOS or EOS token.
        if not isinstance(prompt, RenderingError) and prompt == asked and source != other_than:
            names.append(name)
    return names


def set_default_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    """Returns a template with default values for its arguments.

    An exported model is then prompted as in training unless the caller passes other arguments.

    Args:
      source: Jinja source.
      arguments: JSON-serializable values.
    """
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
        for name, value in arguments.items()
        if name.isidentifier()
    ]
    return "".join(lines) + source


def _literal(value: Any) -> str:
    """Returns a value as a Jinja literal: JSON, except that null is ``none``."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
