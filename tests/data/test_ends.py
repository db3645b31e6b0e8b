"""Which tokens end an answer."""

import copy

import numpy as np
import pytest

from jaxtune.chats.ends import span_end_tokens, turn_end_tokens
from jaxtune.chats.template import read_template


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([], []),
        ([-100, -100], []),
        ([5, 6], [6]),
        ([-100, 5, 6, -100, 7, -100], [6, 7]),
        ([5, -100, 6], [5, 6]),
    ],
)
def test_the_last_token_of_each_learned_span(labels, expected):
    assert span_end_tokens(np.array(labels, np.int32)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["<|im_end|>"]),
        ("v3", ["<｜end▁of▁sentence｜>"]),
        ("deepseek-coder", ["<|EOT|>"]),
        ("deepseek-r1", ["<｜end▁of▁sentence｜>"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", []),
        ("{{ raise_exception('no') }}", []),
    ],
)
def test_the_token_that_a_template_ends_an_answer_with(name, expected, chatml, templates):

    tokenizer = copy.copy(chatml)
    source = templates.get(name) or (name if "{" in name else read_template(name))
    tokenizer.chat_template = source
    ids = [tokenizer.convert_tokens_to_ids(token) for token in expected]
    assert turn_end_tokens(tokenizer) == ids
