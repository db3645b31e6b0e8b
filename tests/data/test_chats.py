"""Chats as people write them: reasoning, calls, tools, arguments of templates.

What a template renders is held against `transformers` with the same template, and against the
templates that TRL ships: those of DeepSeek and Qwen, and its own for training.
"""

from __future__ import annotations

import importlib.resources
import json

import pytest
from loading import load_examples

from jaxtune.chats.builtin import set_default_arguments
from jaxtune.chats.template import read_template
from jaxtune.data import IGNORE, ChatTemplate, encode_prompt
from jaxtune.data.detect_format import FORMATS
from jaxtune.errors import JaxtuneError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, BOT = "<｜User｜>", "<｜Assistant｜>"
TRL = importlib.resources.files("trl") / "chat_templates"
QWEN, QWEN_TRAINING, R1, V3 = (
    (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("qwen3", "qwen3_training", "deepseek_r1_distill", "deepseekv3")
)


def user(content="Q"):
    return {"role": "user", "content": content}


def assistant(content=None, **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments, name="f"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def load(jsonl, tokenizer, *rows, **settings):
    options = {"max_length": 512, "chat_template": "deepseek-v3", "progress": False}
    return load_examples(jsonl(*rows), tokenizer=tokenizer, **(options | settings))


def shown(tokenizer, examples, index=0):
    """An example's text, with ⟦ ⟧ around what is learned."""
    text, inside = "", False
    targets = [IGNORE, *examples.targets[index][:-1]]
    for token, target in zip(examples.tokens[index], targets, strict=True):
        if bool(target != IGNORE) != inside:
            inside = not inside
            text += "⟦" if inside else "⟧"
        text += tokenizer.decode([int(token)])
    return text + "⟧" * inside


def theirs(tokenizer, source, messages, **arguments):
    """The ids that `transformers` gives."""
    return tokenizer.apply_chat_template(messages, chat_template=source, **arguments)["input_ids"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of templates by name: files, as data.chat_template takes them."""
    folder = tmp_path_factory.mktemp("templates")
    for name, source in {"qwen": QWEN, "r1": R1, "v3": V3, "object": OBJECT}.items():
        (folder / f"{name}.jinja").write_text(source, encoding="utf-8")
    return lambda name: str(folder / f"{name}.jinja")


# As Llama 3.1's does it: a string would be printed as a JSON string.
OBJECT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)

FORMS = {
    "deepseek-llm": "User: Q\n\nAssistant:⟦ <think>\nbecause\n</think>\n\n42",
    "deepseek-coder": None,
    "deepseek-v3": f"{USER}Q{BOT}⟦<think>\nbecause\n</think>\n\n42",
    "deepseek-r1": f"{USER}Q{BOT}<think>\n⟦because\n</think>\n\n42",
    "deepseek-v3.1-thinking": f"{USER}Q{BOT}<think>⟦because</think>42",
    "qwen3": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\nbecause\n</think>\n\n42",
}


@pytest.mark.parametrize("name", FORMS)
def test_reasoning_has_the_form_of_its_family_however_it_is_written(chatml, jsonl, name):
    string = "<think>because</think>42"
    if name in ("deepseek-llm", "deepseek-coder", "deepseek-v3"):
        string = "<think>\nbecause\n</think>\n\n42"  # no family form: content is as it is
    spelled = [
        assistant("42", **{key: "because"})
        for key in ("reasoning_content", "reasoning", "thinking")
    ]
    rows = [{"messages": [user(), turn]} for turn in [*spelled, assistant(string)]]
    examples = load(jsonl, chatml, *rows, chat_template=name)
    first = examples.tokens[0].tolist()
    for row, tokens, targets in zip(rows, examples.tokens, examples.targets, strict=True):
        assert tokens.tolist() == first
        assert targets.tolist() == examples.targets[0].tolist()
        assert theirs(chatml, read_template(name), row["messages"]) == first
    if FORMS[name]:
        assert shown(chatml, examples).removeprefix(BOS).startswith(FORMS[name])
    assert examples.duplicates == len(rows) - 1


@pytest.mark.parametrize("name", [*FORMS, "deepseek-v3.1"])
@pytest.mark.parametrize("empty", ["", "\n"])
def test_empty_reasoning_is_none(chatml, jsonl, name, empty):
    rows = [
        {"messages": [user(), turn]}
        for turn in (assistant("42"), assistant("42", reasoning_content=empty))
    ]
    examples = load(jsonl, chatml, *rows, chat_template=name)
    assert examples.tokens[0].tolist() == examples.tokens[1].tolist()
    ids = theirs(chatml, read_template(name), rows[1]["messages"])
    assert ids == examples.tokens[1].tolist()


def test_reasoning_that_a_template_cannot_show_is_refused(chatml, jsonl, files):
    row = {"messages": [user(), assistant("42", reasoning_content="because")]}
    with pytest.raises(JaxtuneError, match=r":1: .*needs the template deepseek-v3\.1-thinking"):
        load(jsonl, chatml, row, chat_template="deepseek-v3.1")
    # It deletes what stands in the content, and does not know reasoning_content.
    with pytest.raises(JaxtuneError, match=r":1: .*messages\[1\].*such as deepseek-r1$"):
        load(jsonl, chatml, row, chat_template=files("r1"))
    # One that knows neither gets it in the content.
    examples = load(jsonl, chatml, row, chat_template=files("object"))
    assert shown(chatml, examples).endswith(f"⟦<think>\nbecause\n</think>\n\n42{EOS}⟧")
    different = assistant("42", reasoning_content="a", thinking="b")
    with pytest.raises(JaxtuneError, match="different reasoning in reasoning_content and thinking"):
        load(jsonl, chatml, {"messages": [user(), different]})
    open_ended = {"messages": [user(), assistant("<think>hm")]}
    with pytest.raises(JaxtuneError, match="opens <think> and does not close it"):
        load(jsonl, chatml, open_ended, chat_template="deepseek-r1")


WRITTEN = '{"q":"é","lr":0.00001,"p":1.10,"id":12345678901234567.89,"n":7,"z":-0}'


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "deepseek-v3.1", "v3", "qwen3"])
def test_arguments_that_are_text_stay_as_they_were_written(chatml, jsonl, files, name):
    turns = [user(), assistant("", tool_calls=[call(WRITTEN)])]
    turns += [{"role": "tool", "content": "9"}, assistant("nine")]
    path = files("v3") if name == "v3" else name
    # The prompt of TRL's copy ends with <think>, which its turns do not: learn the last one only.
    settings = {"chat_template": path, "targets": "last" if name == "v3" else "all"}
    examples = load(jsonl, chatml, {"messages": turns}, **settings)
    ids = theirs(chatml, read_template(path), turns)
    assert examples.tokens[0].tolist() == ids
    assert WRITTEN in chatml.decode(ids)


def test_templates_of_objects_get_objects_with_every_digit(chatml, jsonl, files):
    turns = [user(), assistant(tool_calls=[call(WRITTEN), call("{}", "g")])]
    examples = load(jsonl, chatml, {"messages": turns}, chat_template=files("object"))
    spaced = WRITTEN.replace(":", ": ").replace(",", ", ")
    assert shown(chatml, examples) == f"{BOS}{USER}Q{BOT}⟦f {spaced}g {{}}{EOS}⟧"


@pytest.mark.parametrize("nothing", ["", " ", {}, None])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.1", "qwen3", "v3"])
def test_a_call_without_arguments_has_an_empty_object(chatml, jsonl, files, name, nothing):
    turns = [user(), assistant(tool_calls=[call(nothing)])]
    path = files("v3") if name == "v3" else name
    if name == "v3":
        with pytest.raises(JaxtuneError, match="rewrites"):  # its prompt ends with <think>
            load(jsonl, chatml, {"messages": turns}, chat_template=path)
        return
    text = shown(chatml, load(jsonl, chatml, {"messages": turns}, chat_template=path))
    assert text.count("{}") == 1


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "deepseek-v3.1", "qwen3"])
def test_a_call_may_lack_its_type_and_its_wrapper(chatml, jsonl, name):
    bare, rows = {"name": "f", "arguments": {"a": 1.5}}, []
    for made in (call(bare["arguments"]), {"function": bare}, bare):
        rows.append({"messages": [user(), assistant("", tool_calls=[made])]})
    examples = load(jsonl, chatml, *rows, chat_template=name)
    for row, tokens in zip(rows, examples.tokens, strict=True):
        assert theirs(chatml, read_template(name), row["messages"]) == tokens.tolist()
        assert tokens.tolist() == examples.tokens[0].tolist()


DROPPED = [
    ("deepseek-v3", "<think>a</think>x<think>b</think>y", "y", 1),
    ("deepseek-v3", "<think>\nhm\n</think>\n\n    code", "    code", 1),
    ("deepseek-v3", "It is the `</think>` tag.", None, 0),
    ("deepseek-v3", "It is the </think> tag.", None, 0),
    ("deepseek-v3", "<b>x</b>", None, 0),
    ("deepseek-v3", "<think></think>y", "y", 0),
    ("deepseek-r1", "hm\n</think>\n\ny", "</think>\n\ny", 1),
    ("deepseek-r1", "<think>a</think>See `</think>`.", "</think>\n\nSee `</think>`.", 1),
    ("deepseek-r1", "It is the `</think>` tag.", "</think>\n\nIt is the `</think>` tag.", 0),
    ("deepseek-v3.1-thinking", "It is the `</think>` tag.", "</think>It is the `</think>` tag.", 0),
]


@pytest.mark.parametrize(("name", "content", "answer", "count"), DROPPED)
def test_drop_keeps_the_answer_and_counts(chatml, jsonl, name, content, answer, count):
    row = {"messages": [user(), assistant(content)]}
    examples = load(jsonl, chatml, row, chat_template=name, reasoning="drop")
    assert shown(chatml, examples).endswith(f"⟦{content if answer is None else answer}{EOS}⟧")
    assert examples.turns == ({"reasoning dropped": 1} if count else {})


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1", "deepseek-v3.1-thinking", "qwen3"])
@pytest.mark.parametrize("content", [None, ""])
def test_a_turn_of_reasoning_alone_is_one_thing_however_it_is_written(chatml, jsonl, name, content):
    tag = "<think>\nwhy\n</think>\n\n" if name == "deepseek-v3" else "<think>why</think>"
    beside = [user(), assistant(content, reasoning_content="why"), user("R"), assistant("S")]
    within = [user(), assistant(tag), user("R"), assistant("S")]
    rows = [{"messages": beside}, {"messages": within}]
    one, other = (shown(chatml, load(jsonl, chatml, row, chat_template=name)) for row in rows)
    assert one == other and "why" in one
    with pytest.raises(JaxtuneError, match=r"messages\[1\] contains only reasoning"):
        load(jsonl, chatml, rows[0], chat_template=name, reasoning="drop")


def test_reasoning_that_does_not_end_cannot_be_dropped(chatml, jsonl):
    row = {"messages": [user(), assistant("<think>\nbecause")]}
    assert "⟦<think>\nbecause" in shown(chatml, load(jsonl, chatml, row))
    with pytest.raises(JaxtuneError, match=r"messages\[1\] has <think> without </think>"):
        load(jsonl, chatml, row, reasoning="drop")


@pytest.mark.parametrize(
    "prompt, completion, expected",
    [
        ("Q: ", "<think>a</think>x<think>b</think>\n\ny", f"Q:⟦ y{EOS}⟧"),
        ("Q<think>\n", "a</think>y", f"Q<think>\n⟦</think>\n\ny{EOS}⟧"),
        ("Q", "\nthe tag <think>", f"Q⟦\nthe tag <think>{EOS}⟧"),
        ("Q", "\n<think>a", "completion has <think> without </think>"),
        ("Q", "<think>a</think>\n", "completion contains only reasoning"),
        ("Q<think>\n", "a", "the prompt ends with <think> and the completion has no </think>"),
        ("Q<think>", "a `</think>`", "the completion has no </think>, so the reasoning cannot be"),
        ("Q<think>", "\n</think>y", f"Q<think>⟦\n</think>y{EOS}⟧"),
    ],
)
def test_drop_reaches_completions_that_are_strings(chatml, jsonl, prompt, completion, expected):
    row = {"prompt": prompt, "completion": completion}
    if EOS not in expected:
        with pytest.raises(JaxtuneError, match=expected):
            load(jsonl, chatml, row, reasoning="drop")
        return
    examples = load(jsonl, chatml, row, reasoning="drop")
    assert shown(chatml, examples) == expected
    assert examples.turns == ({"reasoning dropped": 1} if "a</think>" in completion else {})


@pytest.mark.parametrize(
    "turns, reason",
    [
        (
            [assistant(tool_calls=[call({})]), {"role": "tool", "content": {"a": 1}}],
            "not dict; .*JSON",
        ),
        (
            [assistant(tool_calls=[call({})]), {"role": "tool", "content": [{"a": 1}]}],
            "not list; .*JSON",
        ),
        (
            [assistant(function_call={"name": "f", "arguments": "{}"})],
            "function_call to tool_calls",
        ),
    ],
)
def test_errors_for_non_text_results_and_function_call_say_what_to_do(chatml, jsonl, turns, reason):
    with pytest.raises(JaxtuneError, match=reason):
        load(jsonl, chatml, {"messages": [user(), *turns, assistant("done")]})


def test_drop_takes_what_stands_beside_the_content(chatml, jsonl):
    rows = [
        {"messages": [user(), assistant("y", thinking="hm"), user(), assistant("z")]},
        {"messages": [user(), assistant("y", reasoning_content="")]},
    ]
    examples = load(jsonl, chatml, *rows, chat_template="deepseek-v3.1", reasoning="drop")
    assert examples.turns == {"reasoning dropped": 1}
    assert "hm" not in shown(chatml, examples)


TURN, END = "<|im_start|>", "<|im_end|>"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "does", "parameters": {"type": "object"}},
    }
]
CALLED = [
    *(user(), assistant("", tool_calls=[call({"a": 1})])),
    *({"role": "tool", "content": "9"}, assistant("nine")),
]
NO = "<think>\n\n</think>\n\n"
OWN = {
    "one": ([user(), assistant("A")], {}, [f"{NO}A{END}"]),
    "turns": ([user(), assistant("A"), user("R"), assistant("B")], {}, [f"A{END}", f"{NO}B{END}"]),
    "reasoned": (
        [user(), assistant("A"), user("R"), assistant("B", reasoning_content="so")],
        *({}, [f"A{END}", f"<think>\nso\n</think>\n\nB{END}"]),
    ),
    "called": (*(CALLED, {}, [None, f"{NO}nine{END}"]),),
    "steps": (
        [*CALLED, user("R"), assistant("B")],
        *({}, [None, f"nine{END}", f"{NO}B{END}"]),
    ),
    "fast": (
        [user(), assistant("A"), user("R"), assistant("B")],
        *({"enable_thinking": False}, [f"A{END}", f"B{END}"]),
    ),
}


@pytest.mark.parametrize("chat", OWN)
def test_qwen3s_own_template_gives_the_targets_of_the_whole_conversation(chatml, chat):
    messages, arguments, expected = OWN[chat]
    template = ChatTemplate(chatml, QWEN, arguments)
    text, spans = template.spans(messages, "f:3", tools=TOOLS if chat == "called" else None)
    assert chatml(text, add_special_tokens=False)["input_ids"] == theirs(
        chatml, QWEN, messages, tools=TOOLS if chat == "called" else None, **arguments
    )
    called = f'<tool_call>\n{{"name": "f", "arguments": {{"a": 1}}}}\n</tool_call>{END}'
    wanted = [called if part is None else part for part in expected]
    assert [text[start:stop] for start, stop in spans] == wanted


def test_reasoning_that_qwen3s_own_template_deletes_is_refused_with_its_family(chatml):
    messages = [user(), assistant("A", reasoning_content="hm"), user("R"), assistant("B")]
    with pytest.raises(JaxtuneError) as error:
        ChatTemplate(chatml, QWEN).spans(messages, "f:3")
    assert "messages[1] renders differently when other turns follow" in str(error.value)
    assert str(error.value).endswith("a built-in template such as qwen3")
    # Where that turn is not learned, it is only read, and reads as the model will see it.
    text, _ = ChatTemplate(chatml, QWEN).spans(messages, "f:3", [3])
    assert "hm" not in text
    foreign = OBJECT.replace("<｜Assistant｜>", "Bot:").replace("(m.content or '')", "'!'")
    with pytest.raises(JaxtuneError, match=r"a Jinja file$"):
        ChatTemplate(chatml, foreign).spans(messages, "f:3")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "S"}, user(), assistant("A"), user("R"), assistant("B")],
        [
            user(),
            assistant("A", reasoning_content="hm"),
            user("R"),
            assistant("<think>so</think>B"),
        ],
        CALLED,
        [user(), assistant("x", tool_calls=[call(WRITTEN), call({"é": [1.5, None]})])],
    ],
)
def test_the_built_in_qwen3_is_trls_template_for_training(chatml, messages):
    encoded = ChatTemplate(chatml, read_template("qwen3")).encode(messages)
    expected = chatml.apply_chat_template(
        messages, chat_template=QWEN_TRAINING, return_assistant_tokens_mask=True
    )
    assert list(encoded.tokens) == expected["input_ids"]
    mask = expected["assistant_masks"]
    line_end = chatml("\n", add_special_tokens=False)["input_ids"]
    for i in range(1, len(mask)):  # TRL marks the line end after a turn as well
        if mask[i - 1] and encoded.tokens[i - 1] == chatml.convert_tokens_to_ids(END):
            assert [encoded.tokens[i]] == line_end
            mask[i] = 0
    assert [int(label != IGNORE) for label in encoded.labels] == mask


def test_arguments_of_the_template_come_from_the_config_and_from_rows(chatml, jsonl, files):
    from trl.data_utils import apply_chat_template

    turns = [user(), assistant("A")]
    fast = {"enable_thinking": False}
    rows = [
        {"messages": turns, "chat_template_kwargs": fast},
        {"messages": turns},
        {"prompt": turns[:1], "completion": turns[1:], "chat_template_kwargs": json.dumps(fast)},
    ]
    source = "{{ 'loud' if shout is defined and shout }}" + QWEN
    slow = f"{TURN}user\nQ{END}\n{TURN}assistant\n⟦{NO}A{END}⟧\n"
    quick = f"{TURN}user\nQ{END}\n{TURN}assistant\n{NO}⟦A{END}⟧\n"
    settings = {"chat_template": files("qwen")}
    examples = load(jsonl, chatml, *rows[:2], **settings)
    assert [shown(chatml, examples, index) for index in range(2)] == [quick, slow]
    assert shown(chatml, load(jsonl, chatml, rows[2], **settings)) == quick
    set_for_all = load(jsonl, chatml, *rows[1:2], chat_template_kwargs=json.dumps(fast), **settings)
    assert shown(chatml, set_for_all) == quick
    assert encode_prompt(chatml, turns[:1], files("qwen"), fast) == theirs(
        chatml, QWEN, turns[:1], add_generation_prompt=True, **fast
    )
    loud = {"messages": turns, "chat_template_kwargs": {"shout": True}}
    text, _ = ChatTemplate(chatml, source).spans(turns, "f:3", arguments={"shout": True})
    chatml_template, chatml.chat_template = chatml.chat_template, source
    try:
        assert apply_chat_template(loud, chatml)["text"] == text
    finally:
        chatml.chat_template = chatml_template
    assert examples.unread == ()
    strings = {"prompt": "Q", "completion": "A", "chat_template_kwargs": fast}
    assert load(jsonl, chatml, strings).unread == ("chat_template_kwargs",)


def test_a_template_can_carry_its_arguments(chatml):
    values = {"enable_thinking": False, "more": {"a": [1.5, None, True, 'é"{{ 1 }}']}}
    source = QWEN + "{{ more | tojson }}"
    carried = set_default_arguments(source, values)
    for messages in ([user()], [user(), assistant("A")]):
        expected = theirs(chatml, source, messages, add_generation_prompt=True, **values)
        assert theirs(chatml, carried, messages, add_generation_prompt=True) == expected
    slow = {**values, "enable_thinking": True}
    expected = theirs(chatml, source, [user()], add_generation_prompt=True, **slow)
    assert theirs(chatml, carried, [user()], add_generation_prompt=True, enable_thinking=True) == (
        expected
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"chat_template": "{{ 1 }}"}, "must not set chat_template"),
        ({"tokenize": True}, "must not set tokenize"),
        ([1], "must be a JSON object"),
        ('{"a": ', "invalid JSON"),
        ("fast", "must be a JSON object"),
    ],
)
def test_arguments_that_are_not_the_templates_are_refused(chatml, jsonl, arguments, reason):
    row = {"messages": [user(), assistant("A")], "chat_template_kwargs": arguments}
    with pytest.raises(JaxtuneError, match=rf":1: chat_template_kwargs.*{reason}"):
        load(jsonl, chatml, row)
    with pytest.raises(JaxtuneError, match=rf"^data: chat_template_kwargs.*{reason}"):
        load(jsonl, chatml, {"messages": row["messages"]}, chat_template_kwargs=arguments)


def test_tokens_that_the_tokenizer_lacks_are_named_once(
    deepseek, chatml, smollm2_gguf, jsonl, caplog, files
):
    from jaxtune.checkpoints.tokenizer import load_tokenizer

    row, other = {"messages": [user(), assistant("A")]}, load_tokenizer(smollm2_gguf)

    def warnings(tokenizer, template):
        caplog.clear()
        load(jsonl, tokenizer, row, row, chat_template=template)
        return [r.getMessage() for r in caplog.records if "control tokens" in r.getMessage()]

    (warning,) = warnings(other, "deepseek-v3")
    assert "data.chat_template=deepseek-v3 uses control tokens that" in warning
    for token in (USER, BOT):
        count = len(other(token, add_special_tokens=False)["input_ids"])
        assert f"{token} (split into {count} tokens)" in warning
    assert "tool" not in warning
    assert f"{TURN} (split into 6 tokens)" in warnings(deepseek, "qwen3")[0]
    assert len(warnings(deepseek, files("qwen"))) == 1
    assert not warnings(other, "deepseek-llm") + warnings(chatml, "qwen3")


def test_keys_of_turns_that_nobody_reads_are_named_once(chatml, jsonl, caplog):
    turns = [{**user(), "name": "Ada", "language": "en"}, assistant("A", annotations=[])]
    examples = load(jsonl, chatml, *[{"messages": turns}] * 3)
    assert examples.unread == ("messages[].annotations", "messages[].language", "messages[].name")
    assert examples.tokens[0].tolist() == theirs(chatml, read_template("deepseek-v3"), turns)
    named = "{% for m in messages %}{{ (m.name or '') + m.content + eos_token }}{% endfor %}"
    template = ChatTemplate(chatml, named)
    assert template.unread_keys(turns, {"name", "language"}) == {"language"}
    assert template.spans(turns, "f:3")[0] == f"AdaQ{EOS}A{EOS}"


@pytest.mark.parametrize("name", [*FORMS, "deepseek-v3.1"])
def test_a_developer_is_the_system(chatml, jsonl, name):
    rows = [
        {"messages": [{"role": role, "content": "S"}, user(), assistant("A")]}
        for role in ("system", "developer")
    ]
    examples = load(jsonl, chatml, *rows, chat_template=name)
    ids = theirs(chatml, read_template(name), rows[1]["messages"])
    assert examples.tokens[0].tolist() == examples.tokens[1].tolist() == ids
    assert examples.duplicates == 1


def test_a_first_assistant_turn_is_context_but_not_a_target(chatml, jsonl):
    greeting = [assistant("Hello"), user(), assistant("A")]
    examples = load(jsonl, chatml, {"messages": greeting})
    assert shown(chatml, examples) == f"{BOS}{BOT}Hello{EOS}{USER}Q{BOT}⟦A{EOS}⟧"
    assert examples.turns == {"first turn not trained on": 1}
    known = {"messages": [{**greeting[0], "train": False}, *greeting[1:]]}
    assert load(jsonl, chatml, known).turns == {}
    marked = {"messages": [{**greeting[0], "train": True}, *greeting[1:]]}
    for row in (marked, {"messages": greeting[:1]}):
        with pytest.raises(JaxtuneError, match=r'without a prompt.*"train": false'):
            load(jsonl, chatml, row)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("deepseek-r1", "⟦</think>\n\nA", "</think>\n\n⟦A"),
        ("deepseek-v3.1-thinking", "⟦</think>A", "</think>⟦A"),
        ("qwen3", f"⟦{NO}A", f"{NO}⟦A"),
    ],
)
def test_an_empty_think_block_may_be_masked(chatml, jsonl, name, before, after):
    rows = [
        {"messages": [user(), assistant("A")]},
        {"messages": [user(), assistant("A", reasoning_content="hm")]},
    ]
    learned, masked = (
        load(jsonl, chatml, *rows, chat_template=name, empty_reasoning=how)
        for how in ("learn", "mask")
    )
    assert before in shown(chatml, learned)
    assert after in shown(chatml, masked)
    assert shown(chatml, learned, 1) == shown(chatml, masked, 1)


def test_turns_to_complete_may_be_json_text(chatml, jsonl):
    """Two strings that are JSON of something else are two strings."""
    turns = {"prompt": [user()], "completion": [assistant("A")]}
    written = {key: json.dumps(value) for key, value in turns.items()}
    one, other = (shown(chatml, load(jsonl, chatml, row)) for row in (turns, written))
    assert one == other and one.endswith(f"⟦A{EOS}⟧")
    for completion in ('[{"role": "x"', '[{"name": "role"}]', "[]"):
        row = written | {"completion": completion}
        assert completion in shown(chatml, load(jsonl, chatml, row)).replace("⟦", "")


def test_chats_and_tools_may_be_json_text(chatml, jsonl, tmp_path):
    plain = {"messages": CALLED, "tools": TOOLS}
    texts = {key: json.dumps(value) for key, value in plain.items()}
    settings = {"chat_template": "qwen3"}
    expected = load(jsonl, chatml, plain, **settings)
    ids = theirs(chatml, QWEN_TRAINING, CALLED, tools=TOOLS)
    assert expected.tokens[0].tolist() == ids
    for row in (texts, {**plain, "tools": texts["tools"]}):
        assert load(jsonl, chatml, row, **settings).fingerprint() == expected.fingerprint()
    # LLaMA-Factory's files: several calls in one turn, functions without a wrapper.
    theirs_too = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {
                "from": "function_call",
                "value": '[{"name": "f", "arguments": {"a": 1.10}}, '
                '{"name": "g", "arguments": {}}]',
            },
            {"from": "observation", "value": "9"},
            {"from": "gpt", "value": "nine"},
        ],
        "tools": json.dumps([TOOLS[0]["function"]]),
    }
    text = shown(chatml, load(jsonl, chatml, theirs_too, **settings))
    assert (
        '{"name": "f", "arguments": {"a": 1.10}}\n</tool_call>\n<tool_call>\n{"name": "g"' in text
    )
    assert json.dumps(TOOLS[0]["function"]) in text
    in_text = {"conversations": json.dumps(theirs_too["conversations"])}
    assert load(jsonl, chatml, in_text, **settings).target_count
    for value, reason in (("[", "messages: invalid JSON"), ("hello", "one or more turns")):
        with pytest.raises(JaxtuneError, match=rf":1: .*{reason}"):
            load(jsonl, chatml, {"messages": value}, **settings)
    with pytest.raises(JaxtuneError, match=r":1: tools: invalid JSON"):
        load(jsonl, chatml, {**plain, "tools": "[f, g]"}, **settings)
    assert all("chat_template_kwargs" in FORMATS[f].optional for f in ("messages", "sharegpt"))


def test_v31_lists_its_tools_and_the_others_refuse_them(chatml, jsonl):
    """The text is that of DeepSeek's model card."""
    row = {"messages": [{"role": "system", "content": "S"}, user(), assistant("A")], "tools": TOOLS}
    listed = (
        f"{BOS}S\n\n## Tools\nYou have access to the following tools:\n\n### f\n"
        'Description: does\n\nParameters: {"type": "object"}\n\n'
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>"
        "tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>\n\n"
        "Where:\n- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
        "Schema\n- For multiple tool calls, chain them directly without separators or spaces"
        f"{USER}Q{BOT}"
    )
    for name in ("deepseek-v3.1", "deepseek-v3.1-thinking"):
        text = shown(chatml, load(jsonl, chatml, row, chat_template=name))
        assert text.startswith(listed)
    for name in ("deepseek-llm", "deepseek-coder", "deepseek-v3", "deepseek-r1"):
        with pytest.raises(JaxtuneError, match=r":1: .*does not show the tool f; describe"):
            load(jsonl, chatml, {**row, "messages": row["messages"]}, chat_template=name)


SYSTEM = {"role": "system", "content": "S"}
PUBLISHED = {
    "system": [SYSTEM, user(), assistant("A")],
    "turns": [SYSTEM, user(), assistant("A"), user("R"), assistant("B")],
    "call": [user(), assistant("", tool_calls=[call(WRITTEN)]), *CALLED[2:]],
}


@pytest.mark.parametrize("chat", PUBLISHED)
def test_v3_renders_as_deepseeks_published_template(chatml, chat):
    expected = theirs(chatml, V3, PUBLISHED[chat])
    assert theirs(chatml, read_template("deepseek-v3"), PUBLISHED[chat]) == expected
    encoded = ChatTemplate(chatml, read_template("deepseek-v3")).encode(PUBLISHED[chat])
    assert list(encoded.tokens) == expected


@pytest.mark.parametrize("source", [R1, V3])
def test_r1_asks_as_deepseeks_published_templates(chatml, source):
    for messages in ([user()], [SYSTEM, user("R")], CALLED[:3]):
        messages = [
            {**turn, "tool_calls": [call(WRITTEN)]} if "tool_calls" in turn else turn
            for turn in messages
            if "tool_calls" not in turn or source is V3
        ]
        prompt = theirs(chatml, source, messages[:1], add_generation_prompt=True)
        assert encode_prompt(chatml, messages[:1], "deepseek-r1") == prompt


def test_a_long_turn_that_is_rewritten_is_refused_in_linear_time(chatml):
    # The template leaves the reasoning of earlier turns out. A search that compares every end of
    # the turn would copy 10¹² characters before it fails.
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}A{% else %}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
        + EOS
        + "{% endif %}{% endfor %}"
    )
    long = "word " * 400_000
    turns = [user("Q"), assistant(f"<think>{long}</think>{long}"), user("R"), assistant("S")]
    with pytest.raises(JaxtuneError, match="renders differently when other turns follow"):
        ChatTemplate(chatml, source).spans(turns, "f:3")
