"""Targets are what the assistant wrote, and its end token; checked against masks made by hand."""

import pytest

from jaxtune.chats.template import read_template
from jaxtune.data import IGNORE, ChatTemplate, encode_prompt
from jaxtune.errors import JaxtuneError


def turns(*contents, system=None):
    """A conversation of alternating user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return messages + [
        {"role": roles[i % 2], "content": content} for i, content in enumerate(contents)
    ]


def pieces(tokenizer, encoded):
    """Each token's text, in brackets where it is a target."""
    texts = [tokenizer.decode([token]) for token in encoded.tokens]
    for token, label in zip(encoded.tokens, encoded.labels, strict=True):
        assert label in (token, IGNORE)
    return [
        f"[{text}]" if label != IGNORE else text
        for text, label in zip(texts, encoded.labels, strict=True)
    ]


def test_chatml_single_turn(chatml):
    encoded = ChatTemplate(chatml).encode(turns("Hi there", "Hello!"))
    assert pieces(chatml, encoded) == [
        *("<|im_start|>", "user", "\n", "Hi", " there", "<|im_end|>", "\n"),
        *("<|im_start|>", "ass", "istant", "\n", "[Hello]", "[!]", "[<|im_end|>]", "\n"),
    ]


def test_chatml_system_and_two_turns(chatml):
    messages = turns("One", "Two", "Three", "Four", system="Count")
    assert pieces(chatml, ChatTemplate(chatml).encode(messages)) == [
        *("<|im_start|>", "system", "\n", "Count", "<|im_end|>", "\n"),
        *("<|im_start|>", "user", "\n", "One", "<|im_end|>", "\n"),
        *("<|im_start|>", "ass", "istant", "\n", "[Two]", "[<|im_end|>]", "\n"),
        *("<|im_start|>", "user", "\n", "Three", "<|im_end|>", "\n"),
        *("<|im_start|>", "ass", "istant", "\n", "[Four]", "[<|im_end|>]", "\n"),
    ]


def test_v3_learns_eos(deepseek, templates):
    encoded = ChatTemplate(deepseek, templates["v3"]).encode(turns("1+1?", "2", system="Be brief."))
    assert pieces(deepseek, encoded) == [
        *("<｜begin▁of▁sentence｜>", "Be", " brief", ".", "<｜User｜>", "1", "+", "1", "?"),
        *("<｜Assistant｜>", "[2]", "[<｜end▁of▁sentence｜>]"),
    ]


def test_v2_learns_the_space_that_its_prompt_lacks(deepseek, templates):
    encoded = ChatTemplate(deepseek, templates["v2"]).encode(turns("Hi", "Good day"))
    assert pieces(deepseek, encoded) == [
        *("<｜begin▁of▁sentence｜>", "User", ":", " Hi", "\n\n", "Assistant", ":"),
        *("[ Good]", "[ day]", "[<｜end▁of▁sentence｜>]"),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "你好，世界",
        "👨‍👩‍👧 and 🎉",
        "naïve — ﬁne\t\tx",
        "𠮷野家",
        "a\n\nb  c",
        "  led by spaces",
        "ends\n",
    ],
)
@pytest.mark.parametrize("family", ["chatml", "v3", "v2"])
def test_targets_spell_the_answer(chatml, templates, family, answer):
    encoded = ChatTemplate(chatml, templates[family]).encode(turns("问题 🎉", answer, "x", "y"))
    targets = [label for label in encoded.labels if label != IGNORE]
    end = "<|im_end|>" if family == "chatml" else chatml.eos_token
    space = " " if family == "v2" else ""
    assert chatml.decode(targets) == space + answer + end + space + "y" + end


def test_masks_equal_those_of_the_generation_marks(chatml):
    """`transformers` marks the same tokens where the template has generation marks."""
    messages = turns("Bonjour", "Ça va ? 🎉", "是", "  不是\n", system="Réponds")
    ours = ChatTemplate(chatml).encode(messages)
    theirs = chatml.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(ours.tokens) == theirs["input_ids"]
    assert [int(label != IGNORE) for label in ours.labels] == theirs["assistant_masks"]


def test_the_think_tag_of_the_prompt_is_not_a_target(deepseek, templates):
    keeps = templates["v3"].replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}")
    encoded = ChatTemplate(deepseek, keeps).encode(turns("Q", "<think>\nhm\n</think>\n\nA"))
    assert pieces(deepseek, encoded)[2:] == [
        *("Q", "<｜Assistant｜>", "<think>", "\n"),
        *("[hm]", "[\n]", "[</think>]", "[\n\n]", "[A]", "[<｜end▁of▁sentence｜>]"),
    ]


def test_a_template_without_an_end_token_keeps_its_line_end_as_target(deepseek):
    plain = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    encoded = ChatTemplate(deepseek, plain).encode(turns("Hi", "Yes"))
    assert pieces(deepseek, encoded)[-4:] == ["istant", ":", "[ Yes]", "[\n]"]


@pytest.mark.parametrize(
    ("family", "old", "new", "reason"),
    [
        ("r1", "", "", "differently from its generation prompt"),
        ("r1", "<think>\\n' }}", "' }}", "is not rendered completely"),
        (
            # Reasoning is kept in the last turn only.
            *("v3", "m.content + eos", "(m.content if loop.last else '') + eos"),
            "differently when other turns follow",
        ),
    ],
)
def test_templates_that_rewrite_are_refused(deepseek, templates, family, old, new, reason):
    template = templates[family].replace(old, new) if old else templates[family]
    assert old == "" or template != templates[family]
    messages = turns("Q", "<think>hm</think>A", "R", "<think>hm</think>B")
    with pytest.raises(
        JaxtuneError, match=r"^f:3: .*rewrites the conversation: messages\[1\]"
    ) as e:
        ChatTemplate(deepseek, template).encode(messages, "f:3")
    assert reason in str(e.value)
    assert "data.chat_template" in str(e.value)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "one or more turns"),
        ("hi", "one or more turns"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"role": "user"}], r'messages\[0\] has no key "content"'),
        ([{"content": "x"}], r'messages\[0\] has no key "role"'),
        ([{"role": "user", "content": None}], r'messages\[0\] has no key "content"'),
        ([{"role": "user", "content": 3}], "must be a string, not int"),
        ([{"role": "asistant", "content": "x"}], 'did you mean "assistant"'),
        ([{"role": "user", "content": "x", "trian": False}], 'unknown key "trian"; .* "train"'),
        ([{"role": "user", "content": "\ud83d"}], "an unpaired surrogate"),
        (turns("x"), "no assistant turn"),
        (turns("x", ""), r"messages\[1\] is an empty assistant turn"),
        (turns("x", "y", "z", " \n"), r"messages\[3\] is an empty assistant turn"),
        (turns("x", "y")[1:], "without a prompt"),
    ],
)
def test_bad_conversations_are_named(chatml, messages, reason):
    with pytest.raises(JaxtuneError, match=r"^f:3: .*" + reason):
        ChatTemplate(chatml).encode(messages, "f:3")


def test_a_turn_may_have_empty_columns(chatml):
    messages = [{**turn, "tool_calls": None} for turn in turns("a", "b")]
    assert ChatTemplate(chatml).encode(messages) == ChatTemplate(chatml).encode(turns("a", "b"))


def test_a_template_that_refuses_or_breaks_is_named(deepseek):
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(JaxtuneError, match=r"f:3: the chat template rejects .*must alternate"):
        ChatTemplate(deepseek, refuses).encode(turns("a", "b"), "f:3")
    escapes = "{{ ''.__class__.__mro__ }}"
    with pytest.raises(JaxtuneError, match=r"f:3: the chat template rejects .*unsafe"):
        ChatTemplate(deepseek, escapes).encode(turns("a", "b"), "f:3")
    with pytest.raises(JaxtuneError, match=r"chat template, line 2: .*endfor"):
        ChatTemplate(deepseek, "{{ bos_token }}\n{% for m in messages %}")
    with pytest.raises(JaxtuneError, match=r"set data\.chat_template"):
        ChatTemplate(deepseek).encode(turns("a", "b"), "f:3")


def test_a_tokenizer_that_loses_spaces_is_refused(deepseek):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"two": 0, "words": 1}, unk_token="two"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = deepseek.backend_tokenizer.decoder
    with pytest.raises(JaxtuneError, match="drops spaces"):
        ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=words))


def test_encode_prompt_is_what_the_targets_follow(chatml, templates, tmp_path):
    messages = turns("Hi", "Hello", "And?", "More", system="Talk")
    encoded = ChatTemplate(chatml).encode(messages)
    prompt = encode_prompt(chatml, messages[:-1])
    assert prompt == list(encoded.tokens[: len(prompt)])
    assert chatml.decode([t for t in encoded.labels[len(prompt) :] if t >= 0]) == "More<|im_end|>"

    path = tmp_path / "v3.jinja"
    path.write_text(templates["v3"], encoding="utf-8")
    assert chatml.decode(encode_prompt(chatml, turns("Hi"), str(path))) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
    )
    with pytest.raises(JaxtuneError, match=r"data\.chat_template=.*none.jinja: no such file"):
        read_template(tmp_path / "none.jinja")
