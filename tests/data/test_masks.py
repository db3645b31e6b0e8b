"""Targets of twelve templates, written out by hand: ⟦ ⟧ stands around what is learned.

Each is compared token by token: a run of targets begins and ends with a token.
"""

from __future__ import annotations

import itertools

import pytest

from jaxtune.chats.template import read_template
from jaxtune.data import IGNORE, ChatTemplate
from jaxtune.errors import JaxtuneError

BOS, EOS, USER, BOT = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    *("<｜User｜>", "<｜Assistant｜>"),
)
SPECIAL = [BOS, EOS, USER, BOT, "<think>", "</think>", "<|EOT|>"]
SPECIAL += [f"<｜tool▁{part}▁{end}｜>" for part in ("calls", "call") for end in ("begin", "end")]
SPECIAL += [
    f"<｜tool▁{part}▁{end}｜>" for part in ("outputs", "output") for end in ("begin", "end")
]
SPECIAL += ["<｜tool▁sep｜>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>"]

TALK = [
    {"role": "system", "content": "简短。"},
    {"role": "user", "content": "¿Qué tal? 🎉"},
    {"role": "assistant", "content": "שלום 👩‍🚀"},
    {"role": "user", "content": "  and\n"},
    {"role": "assistant", "content": "def f():\n\treturn '𠮷'"},
]
FIRST, SECOND = TALK[2]["content"], TALK[4]["content"]
CALL = {"function": {"name": "weather", "arguments": '{"city": "北京"}'}}
OTHER = {"type": "function", "function": {"name": "time", "arguments": {}}}
TOOLS = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, OTHER]},
    {"role": "tool", "content": "晴", "name": "weather"},
    {"role": "tool", "content": "9:00", "tool_call_id": "2"},
    {"role": "assistant", "content": "Sunny"},
]
REASONED = [
    *(
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nz\n</think>\n\n2"},
    ),
    *({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}),
]
# Headers as those of Llama 3, and V3's own way with tools: arguments are joined to text.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
JOINED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content }}"
    "{% elif m.tool_calls %}{{ '<｜Assistant｜>' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + ' ' + c.function.arguments + ';' }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
CODER = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by "
    "DeepSeek Company, and you only answer questions related to computer science. For politically "
    "sensitive questions, security and privacy issues, and other non-computer science questions, "
    "you will refuse to answer.\n"
)
BEGUN, DONE = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
)
BLOCK = (
    f'{BEGUN}function<｜tool▁sep｜>weather\n```json\n{{"city": "北京"}}\n```<｜tool▁call▁end｜>\n'
    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{{}}\n```{DONE}"
)
OUTPUTS = (
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>晴<｜tool▁output▁end｜>\n"
    "<｜tool▁output▁begin｜>9:00<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)
SHORT = (
    f'{BEGUN}weather<｜tool▁sep｜>{{"city": "北京"}}<｜tool▁call▁end｜>'
    f"<｜tool▁call▁begin｜>time<｜tool▁sep｜>{{}}{DONE}"
)
SHORT_OUTPUTS = "".join(f"<｜tool▁output▁begin｜>{x}<｜tool▁output▁end｜>" for x in ("晴", "9:00"))
OPEN, NONE = "<think>\n", "</think>\n\n"
ASKED = TALK[1]["content"]

EXPECTED = {
    ("deepseek-llm", "talk"): (
        f"{BOS}简短。\n\nUser: {ASKED}\n\nAssistant:⟦ {FIRST}{EOS}⟧"
        f"User:   and\n\n\nAssistant:⟦ {SECOND}{EOS}⟧"
    ),
    ("deepseek-coder", "talk"): (
        f"{BOS}简短。\n### Instruction:\n{ASKED}\n### Response:\n⟦{FIRST}\n<|EOT|>⟧\n"
        f"### Instruction:\n  and\n\n### Response:\n⟦{SECOND}\n<|EOT|>⟧\n"
    ),
    ("deepseek-coder", "one"): (f"{BOS}{CODER}### Instruction:\nQ\n### Response:\n⟦A\n<|EOT|>⟧\n"),
    ("deepseek-v3", "talk"): (
        f"{BOS}简短。{USER}{ASKED}{BOT}⟦{FIRST}{EOS}⟧{USER}  and\n{BOT}⟦{SECOND}{EOS}⟧"
    ),
    ("deepseek-v3", "tools"): f"{BOS}{USER}Q{BOT}⟦{BLOCK}{EOS}⟧{OUTPUTS}⟦Sunny{EOS}⟧",
    ("deepseek-r1", "talk"): (
        f"{BOS}简短。{USER}{ASKED}{BOT}{OPEN}⟦{NONE}{FIRST}{EOS}⟧"
        f"{USER}  and\n{BOT}{OPEN}⟦{NONE}{SECOND}{EOS}⟧"
    ),
    ("deepseek-r1", "tools"): (f"{BOS}{USER}Q{BOT}{OPEN}⟦{NONE}{BLOCK}{EOS}⟧{OUTPUTS}⟦Sunny{EOS}⟧"),
    ("deepseek-r1", "reasoned"): (
        f"{BOS}{USER}1+1?{BOT}{OPEN}⟦z\n{NONE}2{EOS}⟧{USER}2+2?{BOT}{OPEN}⟦{NONE}4{EOS}⟧"
    ),
    ("deepseek-v3.1", "talk"): (
        f"{BOS}简短。{USER}{ASKED}{BOT}</think>⟦{FIRST}{EOS}⟧"
        f"{USER}  and\n{BOT}</think>⟦{SECOND}{EOS}⟧"
    ),
    ("deepseek-v3.1", "tools"): (
        f"{BOS}{USER}Q{BOT}</think>⟦{SHORT}{EOS}⟧{SHORT_OUTPUTS}⟦Sunny{EOS}⟧"
    ),
    ("deepseek-v3.1-thinking", "reasoned"): (
        f"{BOS}{USER}1+1?{BOT}<think>⟦\nz\n{NONE}2{EOS}⟧{USER}2+2?{BOT}<think>⟦</think>4{EOS}⟧"
    ),
    ("deepseek-v3.1-thinking", "tools"): (
        f"{BOS}{USER}Q{BOT}<think>⟦</think>{SHORT}{EOS}⟧{SHORT_OUTPUTS}⟦Sunny{EOS}⟧"
    ),
    ("v2", "talk"): (
        f"{BOS}简短。\n\nUser: {ASKED}\n\nAssistant:⟦ {FIRST}{EOS}⟧"
        f"User:   and\n\n\nAssistant:⟦ {SECOND}{EOS}⟧"
    ),
    ("v3", "talk"): (
        f"{BOS}简短。{USER}{ASKED}{BOT}⟦{FIRST}{EOS}⟧{USER}  and\n{BOT}⟦{SECOND}{EOS}⟧"
    ),
    ("chatml", "talk"): (
        f"<|im_start|>system\n简短。<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{FIRST}<|im_end|>⟧\n<|im_start|>user\n  and\n<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{SECOND}<|im_end|>⟧\n"
    ),
    ("llama3", "talk"): (
        f"{BOS}<|start_header_id|>system<|end_header_id|>\n\n简短。<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{ASKED}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n⟦{FIRST}<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nand<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n⟦{SECOND}<|eot_id|>⟧"
    ),
    ("joined", "tools"): (
        f'{BOS}{USER}Q{BOT}⟦weather {{"city": "北京"}};time {{}};{EOS}⟧'
        f"<｜tool▁output▁begin｜>晴<｜tool▁output▁begin｜>9:00{BOT}⟦Sunny{EOS}⟧"
    ),
    # R1's distilled models have the tokenizers of Qwen and Llama with these tokens added.
    ("distill", "reasoned"): (
        f"{BOS}{USER}1+1?{BOT}{OPEN}⟦z\n{NONE}2{EOS}⟧{USER}2+2?{BOT}{OPEN}⟦{NONE}4{EOS}⟧"
    ),
    ("distill", "talk"): (
        f"{BOS}简短。{USER}{ASKED}{BOT}{OPEN}⟦{NONE}{FIRST}{EOS}⟧"
        f"{USER}  and\n{BOT}{OPEN}⟦{NONE}{SECOND}{EOS}⟧"
    ),
}
ONE = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CHATS = {"talk": TALK, "tools": TOOLS, "reasoned": REASONED, "one": ONE}


@pytest.fixture(scope="module")
def tokenizers(deepseek, smollm2_gguf):
    """DeepSeek's with every family's special tokens, and another byte-level one with the same."""
    from transformers import PreTrainedTokenizerFast

    from jaxtune.checkpoints.tokenizer import load_tokenizer

    made = {}
    for name, start in (("deepseek", deepseek), ("distill", load_tokenizer(smollm2_gguf))):
        backend = start.backend_tokenizer
        made[name] = PreTrainedTokenizerFast(
            tokenizer_object=backend.from_str(backend.to_str()), bos_token=BOS, eos_token=EOS
        )
        made[name].add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def test_there_are_twelve_templates():
    assert len({name for name, _ in EXPECTED}) == 12


@pytest.mark.parametrize(("name", "chat"), EXPECTED)
def test_exactly_the_assistants_text_and_its_end_are_targets(tokenizers, templates, name, chat):
    tokenizer = tokenizers["distill" if name == "distill" else "deepseek"]
    sources = {**templates, "llama3": LLAMA3, "joined": JOINED}
    source = sources.get(name) or read_template("deepseek-r1" if name == "distill" else name)
    encoded = ChatTemplate(tokenizer, source).encode(CHATS[chat])
    expected = EXPECTED[name, chat]
    whole = tokenizer(
        expected.translate({ord("⟦"): None, ord("⟧"): None}), add_special_tokens=False
    )
    assert list(encoded.tokens) == whole["input_ids"]
    assert all(label in (token, IGNORE) for token, label in zip(*encoded, strict=True))
    found = ""
    for learned, run in itertools.groupby(zip(*encoded, strict=True), lambda pair: pair[1] >= 0):
        text = tokenizer.decode([token for token, _ in run])
        found += f"⟦{text}⟧" if learned else text
    assert found == expected


@pytest.mark.parametrize("name", ["deepseek-llm", "deepseek-coder"])
def test_families_without_words_for_tools_refuse_them(deepseek, name):
    with pytest.raises(JaxtuneError, match=r"f:3: .*cannot stand here"):
        ChatTemplate(deepseek, read_template(name)).encode(TOOLS, "f:3")


def test_a_template_that_leaves_a_call_out_is_refused(deepseek, templates):
    said = [{**turn, "content": turn["content"] or "I call."} for turn in TOOLS]
    with pytest.raises(JaxtuneError, match=r"f:3: .*messages\[1\] is not rendered completely"):
        ChatTemplate(deepseek, templates["v3"]).encode(said, "f:3")


def test_tools_that_the_template_does_not_show_are_refused(deepseek, templates):
    template = ChatTemplate(deepseek, templates["v3"])
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with pytest.raises(JaxtuneError, match=r"f:3: .*does not show the tool weather"):
        template.spans(ONE, "f:3", tools=tools)
    shown = ChatTemplate(deepseek, "{{ tools[0].function.name }}" + templates["v3"])
    text, spans = shown.spans(ONE, "f:3", tools=tools)
    assert [text[start:stop] for start, stop in spans] == [f"A{EOS}"]
