"""What a run keeps of its chats: which tokens end what it learns, and the template as text."""

import json

import pytest

from jaxtune.checkpoints.chat import Chat, base_chat
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.config import resolve
from jaxtune.data import DataSettings, load_examples
from jaxtune.runs.chat import (
    configured_chat,
    create_run_chat,
    find_end_tokens,
    initial_chat,
    learned_end_tokens,
    load_run_chat,
    reader_options,
)
from jaxtune.runs.directory import RunDirectory
from jaxtune.training.train import data_reader

EOS, IM_END, START = 2, 259, 258
ENDLESS = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
# The assistant's turns end in another token than those that call a tool.
TWO_ENDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ '<|call|>' if m.content == 'call' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASKED = {"role": "user", "content": "hi"}


def row(*contents):
    turns = [turn for text in contents for turn in (ASKED, {"role": "assistant", "content": text})]
    return {"messages": turns}


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


@pytest.fixture
def chat(tiny_chat):
    found = base_chat(tiny_chat, json.loads((tiny_chat / "config.json").read_text()))
    found.tokenizer.add_tokens(["<|call|>"], special_tokens=True)
    return found


@pytest.mark.parametrize(
    ("rows", "template", "options", "expected"),
    [
        ([row("a", "b"), row("c<|im_start|>")], None, {}, ["<|im_end|>"]),
        ([row("a"), row("call", "b")], TWO_ENDS, {}, ["<|im_end|>", "<|call|>"]),
        ([{"text": "some text"}], None, {}, ["<|im_end|>"]),
        ([{"prompt": "a", "completion": "b"}], None, {}, ["<|im_end|>"]),
        # A row that is cut short ends nowhere in particular: what it was before counts.
        (
            [row("a" * 40 + "<|im_start|>" + "a" * 40)],
            None,
            {"max_length": 72, "too_long": "truncate"},
            ["<|im_end|>"],
        ),
        ([{"input_ids": [3, 4, 5, 256], "labels": [-100, 4, -100, 256]}], None, {}, "token 256"),
        ([row("a", "b")], ENDLESS, {}, []),
    ],
    ids=["chat", "two ends", "text", "completion", "truncated", "ids", "endless"],
)
def test_the_tokens_that_end_what_is_learned(
    rows, template, options, expected, chat, tmp_path, caplog
):
    chat = chat.with_template(template)
    path = write(tmp_path / "rows.jsonl", rows)
    settings = DataSettings(**({"max_length": 128} | options))
    examples = load_examples(path, settings, tokenizer=chat.tokenizer)
    ids = chat.tokenizer.convert_tokens_to_ids(expected) if expected != "token 256" else [256]
    assert find_end_tokens(examples.ends, chat) == sorted(ids)
    run = RunDirectory(tmp_path / "run")
    with run.start(resolve({})) as config:
        chat = create_run_chat(run, config, chat)
        kept = chat.ending_with(learned_end_tokens(chat, examples))
    assert set(kept.eos_token_ids) == {chat.tokenizer.eos_token_id, *ids}
    assert ("no learned span ends in an end token" in caplog.text) == (not expected)


def test_a_template_is_kept_as_text(chat, tmp_path):
    run, path = RunDirectory(tmp_path / "run"), tmp_path / "mine.jinja"
    path.write_text(ENDLESS)
    with run.start(resolve({"data": {"chat_template": str(path)}})) as config:
        first = create_run_chat(run, config, chat)
    assert first.tokenizer.chat_template == ENDLESS != chat.tokenizer.chat_template
    path.write_text("{{ something else }}")
    with run.start() as config:
        again = create_run_chat(run, config, chat)
    assert again.tokenizer.chat_template == ENDLESS and again.clock == first.clock


def test_templates_by_name_are_kept(chat, tmp_path):
    chat = chat.with_template({"default": ENDLESS, "tool_use": TWO_ENDS})
    run = RunDirectory(tmp_path / "run")
    with run.start(resolve({})) as config:
        kept = create_run_chat(run, config, chat)
    assert kept.tokenizer.chat_template == {"default": ENDLESS, "tool_use": TWO_ENDS}
    assert {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= set(kept.files())


def test_a_run_that_never_began_leaves_nothing(tmp_path, chat):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.start(resolve({})) as config:
        create_run_chat(run, config, chat)
        raise ZeroDivisionError
    assert not run.path.exists()


def test_an_adapter_to_start_from_brings_its_template(chat, tiny_chat, tmp_path):
    source = open_source(tiny_chat)
    chat.with_template(TWO_ENDS).tokenizer.save_pretrained(tmp_path / "adapter")
    for adapter, expected in (("", chat.tokenizer.chat_template), ("adapter", TWO_ENDS)):
        start = {"init_from": str(tmp_path / adapter)} if adapter else {}
        config = resolve({"adapter": start})
        run = RunDirectory(tmp_path / f"run {adapter}")
        with run.start(config):
            begun = create_run_chat(run, config, initial_chat(config.adapter, source))
        assert begun.tokenizer.chat_template == expected
        assert load_run_chat(run, config, source).tokenizer.chat_template == expected


def test_end_tokens_without_a_tokenizer_are_those_of_the_config():
    assert find_end_tokens({2: 4, 7: 1}, Chat(None, {}, (2, 3))) == [2]


def test_a_gguf_names_its_end_tokens(smollm2_gguf):
    chat = base_chat(smollm2_gguf, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
    content = json.loads(chat.files()["generation_config.json"])
    assert content == {"bos_token_id": 1, "eos_token_id": 2}
    trained = json.loads(chat.ending_with([0]).files()["generation_config.json"])
    assert trained["eos_token_id"] == [2, 0]


def test_the_arguments_of_a_template_travel_with_it(chat, tmp_path):
    template = "{{ style or 'plain' }} {% for m in messages %}{{ m.content }}{% endfor %}"
    chat = chat.with_template({"default": template, "tool_use": template})
    run = RunDirectory(tmp_path / "run")
    with run.start(resolve({"data": {"chat_template_kwargs": '{"style": "brief"}'}})) as config:
        kept = create_run_chat(run, config, chat)
    for name in ("default", "tool_use"):
        ask = {"chat_template": kept.tokenizer.chat_template[name], "tokenize": False}
        assert kept.tokenizer.apply_chat_template([ASKED], **ask) == "brief hi"
        assert kept.tokenizer.apply_chat_template([ASKED], **ask, style="long") == "long hi"


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_template_that_is_not_of_the_model_is_told(command, tiny_chat, tmp_path, caplog):
    """In a run, which keeps the template as text, as well as before it."""
    config = resolve(
        {
            "model": {"path": str(tiny_chat)},
            "data": {
                "train": str(write(tmp_path / "rows.jsonl", [row("a")])),
                "chat_template": "deepseek-v3",
                "chat_template_kwargs": '{"anything": true}',
            },
        }
    )
    source, run = open_source(tiny_chat), RunDirectory(tmp_path / "run")
    chat = configured_chat(config, source)
    if command == "train":
        with run.start(config):
            chat = create_run_chat(run, config, initial_chat(config.adapter, source))
    data_reader(config, source, chat.tokenizer, **reader_options(config.data, chat)).splits()
    assert "control tokens that the tokenizer does not have: <｜User｜>" in caplog.text
