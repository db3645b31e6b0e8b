"""End tokens: the last tokens of learned spans, and the token with which a template ends a turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxtune.chats.template import ChatTemplate
from jaxtune.chats.tokens import IGNORE
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def span_end_tokens(labels: np.ndarray) -> list[int]:
    """Returns the id of the last token of each learned span.

    Args:
      labels: int[n], labels of a row; a learned span is a maximal range without `IGNORE`.
    """
    learned = labels != IGNORE
    last = learned & ~np.append(learned[1:], False)
    return labels[last].tolist()


def turn_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the id of the token that ends an answer in the tokenizer's template, as a list.

    The list is empty if that token is not an added token, or if the template rejects or rewrites a
    conversation of one question and answer.
    """
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        labels = ChatTemplate(tokenizer).encode(probe).labels
    except JaxtuneError:
        return []
    last = [label for label in labels if label != IGNORE][-1]
    return [last] if last in tokenizer.added_tokens_decoder else []
