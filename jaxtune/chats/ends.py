"""Where answers end: the last tokens of learned spans, and the token that a template ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jaxtune.chats.template import ChatTemplate
from jaxtune.chats.tokens import IGNORE
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def span_end_tokens(labels: np.ndarray) -> list[int]:
    """Returns the last token of each learned span of a whole row: labels int[n] → ids."""
    learned = labels != IGNORE
    last = learned & ~np.append(learned[1:], False)
    return labels[last].tolist()


def turn_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the added token, if there is one, that the tokenizer's template ends an answer with.

    Empty as well where the template refuses a question with an answer, or rewrites it.
    """
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        labels = ChatTemplate(tokenizer).encode(probe).labels
    except JaxtuneError:
        return []
    last = [label for label in labels if label != IGNORE][-1]
    return [last] if last in tokenizer.added_tokens_decoder else []
