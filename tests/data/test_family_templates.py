"""Built-in templates: what each family is shown, token by token, and what of it is learned.

Tokens are those of DeepSeek's own tokenizer; in brackets stands what is a target.
"""

from __future__ import annotations

import json

import pytest
from loading import load_examples

from jaxtune.chats.template import built_in_templates, read_template
from jaxtune.data import IGNORE, ChatTemplate, encode_prompt
from jaxtune.errors import JaxtuneError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CODER = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by "
    "DeepSeek Company, and you only answer questions related to computer science. For politically "
    "sensitive questions, security and privacy issues, and other non-computer science questions, "
    "you will refuse to answer.\n"
)
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Good day"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]
ASKED = [{"role": "user", "content": "Q"}]
REASONED = "<think>\nhm\n</think>\n\nA"


DEEPSEEK = [name for name in built_in_templates() if name.startswith("deepseek")]


def conversation(answer):
    return [*ASKED, {"role": "assistant", "content": answer}]


def template(tokenizer, name):
    return ChatTemplate(tokenizer, read_template(name))


def pieces(tokenizer, encoded):
    """Each token's text, in brackets where it is a target."""
    return [
        text if label == IGNORE else f"[{text}]"
        for text, label in zip(
            (tokenizer.decode([token]) for token in encoded.tokens), encoded.labels, strict=True
        )
    ]


def test_every_family_is_built_in():
    assert list(built_in_templates()) == [
        "deepseek-coder",
        "deepseek-llm",
        "deepseek-r1",
        "deepseek-v3",
        "deepseek-v3.1",
        "deepseek-v3.1-thinking",
        "qwen3",
    ]


def test_llm(deepseek):
    encoded = template(deepseek, "deepseek-llm").encode(TWO_TURNS)
    assert pieces(deepseek, encoded) == [
        *(BOS, "Be", " brief", ".\n\n", "User", ":", " Hi", "\n\n", "Assistant", ":"),
        *("[ Good]", "[ day]", f"[{EOS}]"),
        *("User", ":", " ", "1", "+", "1", "?\n\n", "Assistant", ":", "[ ]", "[2]", f"[{EOS}]"),
    ]


def test_coder(deepseek):
    rendered = template(deepseek, "deepseek-coder")
    encoded = rendered.encode(TWO_TURNS[1:])
    system = deepseek(CODER, add_special_tokens=False)["input_ids"]
    assert list(encoded.tokens[: len(system) + 1]) == [deepseek.bos_token_id, *system]
    assert pieces(deepseek, encoded)[len(system) + 1 :] == [
        *("###", " Instruction", ":\n", "Hi", "\n", "###", " Response", ":\n"),
        *("[Good]", "[ day]", "[\n]", "[<|EOT|>]", "\n"),
        *("###", " Instruction", ":\n", "1", "+", "1", "?\n", "###", " Response", ":\n"),
        *("[2]", "[\n]", "[<|EOT|>]", "\n"),
    ]
    own = pieces(deepseek, rendered.encode(TWO_TURNS))
    assert own[:6] == [BOS, "Be", " brief", ".\n", "###", " Instruction"]


def test_v3(deepseek):
    encoded = template(deepseek, "deepseek-v3").encode(TWO_TURNS)
    assert pieces(deepseek, encoded) == [
        *(BOS, "Be", " brief", ".", USER, "Hi", ASSISTANT, "[Good]", "[ day]", f"[{EOS}]"),
        *(USER, "1", "+", "1", "?", ASSISTANT, "[2]", f"[{EOS}]"),
    ]


@pytest.mark.parametrize("content", [REASONED, "<think>hm\n</think>\n\nA", "hm\n</think>\n\nA"])
def test_r1_learns_its_reasoning_but_not_the_tag_that_opens_it(deepseek, content):
    encoded = template(deepseek, "deepseek-r1").encode(conversation(content))
    assert pieces(deepseek, encoded) == [
        *(BOS, USER, "Q", ASSISTANT, "<think>", "\n"),
        *("[hm]", "[\n]", "[</think>]", "[\n\n]", "[A]", f"[{EOS}]"),
    ]


@pytest.mark.parametrize("content", ["A", "<think>\n\n</think>\n\nA"])
def test_r1_without_reasoning_learns_that_it_is_empty(deepseek, content):
    encoded = template(deepseek, "deepseek-r1").encode(conversation(content))
    assert pieces(deepseek, encoded) == [
        *(BOS, USER, "Q", ASSISTANT, "<think>", "\n"),
        *("[</think>]", "[\n\n]", "[A]", f"[{EOS}]"),
    ]


def test_r1_keeps_the_reasoning_of_every_turn(deepseek):
    messages = [*conversation(REASONED), *conversation("<think>\nso\n</think>\n\nB")]
    encoded = template(deepseek, "deepseek-r1").encode(messages)
    targets = [label for label in encoded.labels if label != IGNORE]
    assert deepseek.decode(targets) == f"hm\n</think>\n\nA{EOS}so\n</think>\n\nB{EOS}"


def test_v31_answers_at_once(deepseek):
    encoded = template(deepseek, "deepseek-v3.1").encode(TWO_TURNS)
    assert pieces(deepseek, encoded) == [
        *(BOS, "Be", " brief", ".", USER, "Hi", ASSISTANT, "</think>"),
        *("[Good]", "[ day]", f"[{EOS}]"),
        *(USER, "1", "+", "1", "?", ASSISTANT, "</think>", "[2]", f"[{EOS}]"),
    ]
    with pytest.raises(JaxtuneError, match=r"f:3: .*needs the template deepseek-v3\.1-thinking"):
        template(deepseek, "deepseek-v3.1").encode(conversation("hm</think>A"), "f:3")


@pytest.mark.parametrize(
    ("content", "reasoning"),
    [("<think>hm</think>A", ["[hm]"]), ("hm</think>A", ["[hm]"]), ("A", [])],
)
def test_v31_reasons_first(deepseek, content, reasoning):
    encoded = template(deepseek, "deepseek-v3.1-thinking").encode(conversation(content))
    assert pieces(deepseek, encoded) == [
        *(BOS, USER, "Q", ASSISTANT, "<think>"),
        *(*reasoning, "[</think>]", "[A]", f"[{EOS}]"),
    ]


PROMPTS = {
    "deepseek-llm": f"{BOS}User: Q\n\nAssistant:",
    "deepseek-coder": f"{BOS}{CODER}### Instruction:\nQ\n### Response:\n",
    "deepseek-v3": f"{BOS}{USER}Q{ASSISTANT}",
    "deepseek-r1": f"{BOS}{USER}Q{ASSISTANT}<think>\n",
    "deepseek-v3.1": f"{BOS}{USER}Q{ASSISTANT}</think>",
    "deepseek-v3.1-thinking": f"{BOS}{USER}Q{ASSISTANT}<think>",
}


@pytest.mark.parametrize("name", DEEPSEEK)
def test_the_prompt_is_what_the_targets_follow(deepseek, name):
    prompt = encode_prompt(deepseek, ASKED, name)
    assert deepseek.decode(prompt) == PROMPTS[name]
    encoded = template(deepseek, name).encode(conversation("A"))
    assert list(encoded.tokens[: len(prompt)]) == prompt
    assert set(encoded.labels[: len(prompt)]) == {IGNORE}
    rest = [label for label in encoded.labels[len(prompt) :] if label != IGNORE]
    end = "<|EOT|>" if name == "deepseek-coder" else EOS
    assert deepseek.decode(rest).endswith(f"A\n{end}" if name == "deepseek-coder" else f"A{end}")
    assert list(encoded.tokens).count(deepseek.bos_token_id) == 1


@pytest.mark.parametrize("name", DEEPSEEK)
@pytest.mark.parametrize(
    "messages",
    [
        [*conversation("A"), {"role": "system", "content": "late"}, *conversation("B")],
        [*ASKED, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "A"}],
    ],
)
def test_turns_that_a_family_has_no_words_for_are_refused(deepseek, name, messages):
    with pytest.raises(JaxtuneError, match=r"^f:3: .* turn cannot stand here"):
        template(deepseek, name).encode(messages, "f:3")


@pytest.mark.parametrize("name", DEEPSEEK)
def test_a_tokenizer_without_special_tokens_is_refused(deepseek, name):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=deepseek.backend_tokenizer)
    with pytest.raises(JaxtuneError, match=r"f:3: .*the tokenizer has no bos_token"):
        template(bare, name).encode(conversation("A"), "f:3")


def test_a_checkpoint_with_its_own_template_uses_that(deepseek, templates):
    deepseek_v2 = ChatTemplate(deepseek, templates["v2"])
    assert deepseek_v2.encode(TWO_TURNS) == template(deepseek, "deepseek-llm").encode(TWO_TURNS)


def test_a_template_that_deletes_reasoning_names_the_built_in_one(deepseek, templates):
    with pytest.raises(JaxtuneError, match="a built-in template such as deepseek-r1"):
        ChatTemplate(deepseek, templates["r1"]).encode(conversation(REASONED))


def test_unknown_names_are_refused_with_the_closest():
    with pytest.raises(JaxtuneError) as raised:
        read_template("deepseek-v32")
    assert str(raised.value) == (
        "data.chat_template=deepseek-v32: no such file or built-in template; did you mean "
        f'"deepseek-v3"? (built-in: {", ".join(built_in_templates())})'
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [("~nobody-of-that-name/x.jinja", "home directory"), ("a\0b", "null byte")],
)
def test_what_cannot_be_a_file_is_refused(path, reason):
    with pytest.raises(JaxtuneError, match=rf"^data\.chat_template=.*{reason}"):
        read_template(path)


def test_the_config_names_it(deepseek, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": conversation(REASONED)}), encoding="utf-8")
    examples = load_examples(path, tokenizer=deepseek, max_length=64, chat_template="deepseek-r1")
    expected = template(deepseek, "deepseek-r1").encode(conversation(REASONED))
    assert examples.tokens[0].tolist() == list(expected.tokens)
