"""The chat format of training is part of every export: template, tokenizer, end tokens.

The oracle is transformers: what it opens and renders has the very ids that were trained.
"""

import datetime
import json
import re
import shutil

import numpy as np
import pytest

import jaxtune
from jaxtune.api.evaluate_run import evaluate
from jaxtune.chats.builtin import built_in_templates
from jaxtune.checkpoints import huggingface
from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.runs.chat import load_run_chat
from jaxtune.training.train import data_reader, train

BOS, EOS, EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"
TAGS = ("<sql>", "</sql>")
SPECIAL = (BOS, EOS, EOT, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", *TAGS)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
DATED = (
    '{{ bos_token }}{{ strftime_now("%d %B %Y") }}\n{% for m in messages %}'
    "<｜{{ m.role | capitalize }}｜>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
YESTERDAY = datetime.datetime(2024, 2, 3, 23, 59, 58)


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


# Rows as a data set has them; what `apply_chat_template` is given comes from the same.
ROWS = {
    "one turn": {"messages": chat("hi", "ho")},
    "system": {"messages": chat("hi", "ho", system="Be brief.")},
    "turns": {"messages": chat("a", "b", "c", "d\n e", system="Two\nlines")},
    "text of a template": {"messages": chat("{{ x }} {% y %}", "z")},
}
LEARNED = [{"messages": chat(c, f"<sql>{c}</sql>", system="s")} for c in "abcd"]


@pytest.fixture(scope="module")
def make_base(tiny, tmp_path_factory):
    """Makes a tiny LLaMA with a tokenizer of bytes and special tokens, and a template or none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(template):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=BOS,
            eos_token=EOS,
            additional_special_tokens=[token for token in SPECIAL if token not in (BOS, EOS)],
        )
        tokenizer.chat_template = template
        directory = tmp_path_factory.mktemp("base") / "model"
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        shutil.copytree(tiny("llama", vocab_size=len(tokenizer), **ids), directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


def settings(base, rows, place, template, **changes):
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(path), "eval": str(path), "overlap": "keep", "max_length": 128}
    config = {
        "model": {"path": str(base)},
        "data": data | {"chat_template": template},
        "adapter": {"rank": 8, "targets": "all-linear"},
        "training": {"steps": 1, "batch_size": 4, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "evaluation": {"every": 1000, "batch_size": 4},
        "checkpoint": {"every": 1000},
        "logging": {"tensorboard": False},
    }
    return config | {name: config[name] | values for name, values in changes.items()}


@pytest.fixture(scope="module")
def coder(make_base, tmp_path_factory):
    """A run with a built-in template that ends turns in another token than its base, which has a
    template of its own; it has learned its rows by heart."""
    place, base = tmp_path_factory.mktemp("coder"), make_base(PLAIN)
    steps = {"training": {"steps": 60, "batch_size": 4, "dtype": "float32"}}
    steps["evaluation"] = {"every": 60, "batch_size": 4, "generate": 4}
    config = settings(base, LEARNED, place, "deepseek-coder", **steps)
    return jaxtune.train(config, place / "run"), base


@pytest.fixture(scope="module")
def exports(coder, tmp_path_factory):
    """Every form in which the run's model leaves it, by name: the directory of its files."""
    run, _ = coder
    place = tmp_path_factory.mktemp("exports")
    for form in ("peft", "vllm", "merged"):
        main(["export", "--workdir", str(run.path), "--format", form, "--to", str(place / form)])
    adapters = [f"--adapter={name}={place / 'peft'}" for name in ("a", "b")]
    main(["combine", *adapters, "--to", str(place / "combined")])
    run.model().save_pretrained(place / "saved")
    named = {name: run.directory.path / "adapter" / name for name in ("best", "last")}
    forms = ("peft", "vllm", "merged", "combined", "saved")
    return {form: place / form for form in forms} | named


def rendered(directory, row, **options):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ask = {"tools": row.get("tools"), **options}
    return tokenizer.apply_chat_template(row["messages"], **ask)["input_ids"]


def trained_ids(run, rows):
    """The ids that a run with these rows trains on, by row, through what reads its data."""
    location = huggingface.resolve_path(run.config.model.path)
    source = huggingface.open_source(location)
    kept = load_run_chat(run.directory, run.config, source)
    path = run.path / "rows-asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = resolve(run.config.to_dict(), ["data.max_length=1024"])
    reader = data_reader(config, source, kept.tokenizer, chat_template="", clock=kept.clock)
    return [tokens.tolist() for tokens in reader.read(str(path)).tokens]


def called(*contents):
    """A question that is answered after a call of a function."""
    function = {"name": "look_up", "arguments": '{"word": "é", "share": 1.10}'}
    call = {"id": "c1", "type": "function", "function": function}
    asked, found, answer = contents
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": found},
        {"role": "assistant", "content": answer},
    ]


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
REASONED = [*chat("a", "b", "c"), {"role": "assistant", "reasoning_content": "d", "content": "e"}]
# Beside ROWS, where a template has a form for them.
MORE_ROWS = {
    "reasoning": {"messages": REASONED},
    "call": {"messages": called("?", "42", "It is 42.")},
    "tools": {"messages": called("?", "42", "It is 42."), "tools": [TOOL]},
}
REFUSED = {
    "deepseek-coder": {"call", "tools"},
    "deepseek-llm": {"call", "tools"},
    "deepseek-r1": {"tools"},
    "deepseek-v3": {"tools"},
    "deepseek-v3.1": {"reasoning"},
    "deepseek-v3.1-thinking": set(),
    "qwen3": set(),
}


@pytest.mark.slow
def test_every_built_in_template_is_exported_with_its_model(make_base, tmp_path):
    """Over a base with a template of another form and end token, and over one without."""
    assert set(REFUSED) == set(built_in_templates())
    bases = [make_base(PLAIN), make_base(None)]
    for number, (name, refused) in enumerate(REFUSED.items()):
        place = tmp_path / name
        place.mkdir()
        run = jaxtune.train(settings(bases[number % 2], LEARNED, place, name), place / "run")
        for form in ("peft", "vllm", "merged"):
            main(
                ["export", "--workdir", str(run.path), "--format", form, "--to", str(place / form)]
            )
        model = run.model()
        for what, row in (ROWS | MORE_ROWS).items():
            if what in refused:
                with pytest.raises(jaxtune.JaxtuneError):
                    trained_ids(run, [row])
                continue
            (ids,) = trained_ids(run, [row])
            for form in ("peft", "vllm", "merged"):
                assert rendered(place / form, row) == ids, (name, what, form)
            asked = {**row, "messages": row["messages"][:-1]}
            if "tools" not in row:
                prompt = rendered(place / "merged", asked, add_generation_prompt=True)
                assert model.encode(asked["messages"]) == prompt, (name, what)
        generation = json.loads((place / "merged" / "generation_config.json").read_text())
        assert set(model.stop_ids) == set(np.atleast_1d(generation["eos_token_id"]).tolist())


FORMS = ("peft", "vllm", "merged", "combined", "saved", "best", "last")


@pytest.mark.parametrize("form", FORMS)
def test_an_export_renders_what_was_trained(form, coder, exports):
    run, base = coder
    assert json.loads((run.path / "chat.json").read_text())["eos_token_id"] == [258]
    for row, ids in zip(ROWS.values(), trained_ids(run, ROWS.values()), strict=True):
        # The template ends with white space that belongs to no turn.
        assert rendered(exports[form], row) == ids
        assert rendered(base, row) != ids
    generation = json.loads((exports[form] / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [257, 258]  # EOS of the base, and EOT


def test_every_export_encodes_prompts_as_in_training(coder, exports):
    run, base = coder
    models = {
        "run": run.model(),
        "base of the run": run.model("none"),
        "merged": jaxtune.load(exports["merged"], dtype="float32", progress=False),
        "adapters": jaxtune.load(
            base, dtype="float32", adapters={"a": exports["peft"], "b": exports["vllm"]}
        ),
        "other": jaxtune.load(base, chat_template="deepseek-v3", dtype="float32"),
    }
    plain, adapters = models["other"], models.pop("adapters")
    models["template"] = jaxtune.load(base, chat_template="deepseek-coder", dtype="float32")
    for row in ROWS.values():
        asked = row["messages"][:-1]
        expected = rendered(exports["peft"], {"messages": asked}, add_generation_prompt=True)
        for name, model in models.items():
            assert (model.encode(asked) == expected) == (name != "other"), name
            assert model.stop_ids == ((257,) if name == "other" else (257, 258)), name
        for choice in ("a", "b", {"a": 0.5, "b": 0.5}):
            assert adapters.use(choice).encode(asked) == expected
            assert adapters.stop_ids == (257, 258)
        assert adapters.use(None).stop_ids == (257,)
        assert adapters.encode(asked) == rendered(base, {"messages": asked})
        override = run.model(chat_template="deepseek-v3").encode(asked)
        assert override == plain.encode(asked)


def test_an_answer_ends_with_the_end_token_of_training(coder, exports, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, base = coder
    (scores,) = run.evaluations()
    assert scores["exact_match"] == 1.0  # special tokens within an answer are part of it
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [sample["answer"] for sample in samples] == [f"<sql>{c}</sql>" for c in "abcd"]
    tokenizer = AutoTokenizer.from_pretrained(exports["merged"])
    merged = AutoModelForCausalLM.from_pretrained(exports["merged"], dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        chat("c", system="s"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    theirs = merged.generate(**asked, max_new_tokens=32, do_sample=False)[0].tolist()
    assert theirs[-1] == 258
    answer = tokenizer.decode(theirs[asked["input_ids"].shape[1] : -1])
    assert answer == "<sql>c</sql>\n"
    ours = {
        "run": ["--workdir", str(run.path)],
        "merged": ["--model", str(exports["merged"])],
        "adapter": ["--model", str(base), "--adapter", str(exports["peft"])],
    }
    for flags in ours.values():
        capsys.readouterr()
        main(["generate", *flags, "--system", "s", "--prompt", "c", "--special-tokens"])
        assert capsys.readouterr().out == f"{answer}\n"
    main(["generate", *ours["run"], "--system", "s", "--prompt", "c"])
    assert capsys.readouterr().out == "c\n\n"
    assert run.model().generate([chat("c", system="s")], skip_special_tokens=False) == [answer]


def test_generate_takes_a_system_turn_and_a_template(coder, capsys):
    run, _ = coder
    flags = ["generate", "--workdir", str(run.path), "--max-new-tokens", "8", "--prompt", "c"]
    main([*flags, "--system", "s", "--chat-template", "deepseek-v3", "--special-tokens"])
    model = run.model(chat_template="deepseek-v3")
    (expected,) = model.generate([chat("c", system="s")], 8, skip_special_tokens=False)
    assert capsys.readouterr().out == f"{expected}\n"
    for wrong, message in (
        (["--raw", "--system", "s"], "--system needs a chat template"),
        (["--chat-template", "deepseek-v9"], 'chat_template=deepseek-v9: .*did you mean "deepseek'),
    ):
        with pytest.raises(SystemExit):
            main([*flags, *wrong])
        assert re.search(message, capsys.readouterr().err)


def test_a_single_prompt_is_not_mistaken_for_several(coder):
    model = jaxtune.load(coder[1])
    for prompt in ("once upon", chat("hi"), [1, 2]):
        assert [model.generate(prompt, 4)] == model.generate([prompt], 4)
    ids = model.tokenizer(f"{BOS}hi")["input_ids"]
    assert model.encode(f"{BOS}hi") == ids and ids.count(256) == 1


def test_an_adapter_made_elsewhere_keeps_its_template(coder, exports, tmp_path, caplog):
    """As trainers save it: the tokenizer beside the adapter, with its template and end token."""
    from transformers import AutoTokenizer

    base = coder[1]
    elsewhere, other = tmp_path / "elsewhere", tmp_path / "other"
    for directory in (elsewhere, other):
        directory.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(exports["peft"] / name, directory)
    tokenizer = AutoTokenizer.from_pretrained(base, eos_token="</sql>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    tokenizer.save_pretrained(elsewhere)
    model = jaxtune.load(base, adapters={"x": elsewhere, "ours": exports["peft"], "bare": other})
    asked = chat("hi", system="s")
    assert model.use("x").encode(asked) == rendered(elsewhere, {"messages": asked})
    assert model.stop_ids == (257, tokenizer.convert_tokens_to_ids("</sql>"))
    assert model.use("bare").encode(asked) == rendered(base, {"messages": asked})
    assert model.stop_ids == (257,)
    # Only the settings of a tokenizer, without its file.
    settings = {"chat_template": tokenizer.chat_template}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    alone = jaxtune.load(base, adapter=other)
    assert alone.encode(asked) == rendered(elsewhere, {"messages": asked})
    (other / "tokenizer_config.json").unlink()
    caplog.clear()
    assert model.use({"x": 1.0, "ours": 1.0}).encode(asked) == rendered(base, {"messages": asked})
    assert "the adapters x and ours have different chat templates" in caplog.text
    named = [f"--adapter=x={elsewhere}", f"--adapter=bare={other}"]
    main(["combine", *named, "--to", str(tmp_path / "both")])
    assert "using the chat template of x; there is none with bare" in caplog.text
    assert rendered(tmp_path / "both", {"messages": asked}) == model.use("x").encode(asked)
    # A tokenizer with other ids is not used.
    tokenizer.add_tokens(["<new>"])
    content = json.loads((elsewhere / "tokenizer.json").read_text())
    swapped = content["model"]["vocab"]
    first, second = list(swapped)[:2]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    (elsewhere / "tokenizer.json").write_text(json.dumps(content))
    caplog.clear()
    again = jaxtune.load(base, adapter=elsewhere)
    assert again.encode(chat("!")) == model.tokenizer("[!]")["input_ids"]
    assert "its tokenizer has another id for" in caplog.text


@pytest.fixture(scope="module")
def dated(make_base, tmp_path_factory):
    """A full fine-tuning of a base without a template, with a file that prints the date, begun
    yesterday; the file is gone since."""
    place, base = tmp_path_factory.mktemp("dated"), make_base(None)
    template = place / "dated.jinja"
    template.write_text(DATED)
    config = settings(base, ROWS.values(), place, str(template), adapter={"method": "full"})
    run = train(resolve(config), place / "run", clock=YESTERDAY)
    template.unlink()
    return jaxtune.Run(run.path), base


def test_a_run_keeps_the_date_on_which_it_began(dated, tmp_path):
    run, _ = dated
    (first,) = run.evaluations()
    before = json.loads((run.path / "fingerprint.json").read_text())
    jaxtune.train(None, run.path)  # resumes, with data read again
    assert json.loads((run.path / "fingerprint.json").read_text()) == before
    assert evaluate(run.directory)["loss"] == pytest.approx(first["loss"], rel=1e-6)
    text = run.model().tokenizer.decode(run.model().encode(chat("hi")))
    assert text == f"{BOS}03 February 2024\n<｜User｜>hi<｜Assistant｜>"
    # On another day it would have been another run, even if the changed clock is accepted.
    kept = json.loads((run.path / "chat.json").read_text())
    shutil.copytree(run.path, tmp_path / "moved")
    (tmp_path / "moved" / "chat.json").write_text(json.dumps(kept | {"clock": "2024-02-04"}))
    with pytest.raises(jaxtune.JaxtuneError, match=r"chat\.json has been changed: chat: "):
        jaxtune.train(None, tmp_path / "moved")
    with pytest.raises(jaxtune.JaxtuneError, match=r"have changed: data\.eval: .*data\.train"):
        jaxtune.train(None, tmp_path / "moved", accept_changes="chat")
    (tmp_path / "moved" / "chat.json").write_text(json.dumps(kept | {"clock": "soon"}))
    with pytest.raises(
        jaxtune.JaxtuneError, match=r'chat\.json: clock: "soon" is not an ISO 8601 time'
    ):
        jaxtune.train(None, tmp_path / "moved", accept_changes="chat")


def test_an_export_renders_the_current_date(dated, tmp_path):
    from transformers import AutoTokenizer

    run, base = dated
    run.save_merged(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == DATED
    for row, ids in zip(ROWS.values(), trained_ids(run, ROWS.values()), strict=True):
        today = [datetime.datetime.now().strftime("%d %B %Y") for _ in range(2)]
        text = tokenizer.decode(rendered(tmp_path / "merged", row))
        assert text in [tokenizer.decode(ids).replace("03 February 2024", day) for day in today]
    assert not (base / "chat_template.jinja").exists()
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 257
