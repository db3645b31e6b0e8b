"""`jaxtune data` through the command line, and that training uses what it prepared."""

from __future__ import annotations

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.checkpoints.open_model import open_model
from jaxtune.cli import main
from jaxtune.config import load_file, resolve
from jaxtune.runs.chat import configured_chat
from jaxtune.training.evaluation import held_out_batches
from jaxtune.training.train import data_reader


@pytest.fixture
def config(tiny_chat, tmp_path):
    """A config file over twelve rows of which one repeats another, and its cache."""
    rows = []
    for index in [*range(11), 0]:
        turns = [("user", f"q{index}"), ("assistant", "好" * (index % 3 + 1))]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append(json.dumps({"messages": messages, "id": index}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    path = tmp_path / "config.py"
    path.write_text(
        "from jaxtune import config\n\n"
        "def get_config():\n"
        "    c = config.default()\n"
        f"    c.model.path = {str(tiny_chat)!r}\n"
        f"    c.data.train = {str(tmp_path / 'rows.jsonl')!r}\n"
        "    c.data.eval_split = 2\n"
        "    c.data.max_length = 64\n"
        f"    c.data.cache = {str(tmp_path / 'cache')!r}\n"
        "    c.training.steps = 2\n"
        "    c.training.batch_size = 2\n"
        "    c.evaluation.batch_size = 2\n"
        "    return c\n"
    )
    return path


def data(capsys, *arguments):
    main(["data", *map(str, arguments)])
    return capsys.readouterr().out


def test_inspect_marks_targets(config, capsys):
    output = data(capsys, "inspect", "--config", config, "--rows", 2)
    assert output.count("rows.jsonl:") == 2
    assert "<|im_start|>assistant\n⟦好" in output
    assert "<|im_end|>⟧\n" in output
    assert "⟦<|im_start|>" not in output
    held_out = data(capsys, "inspect", "--config", config, "--split", "eval")
    assert held_out.count("rows.jsonl:") == 2
    places = [
        {line.split()[0] for line in text.splitlines() if "rows.jsonl:" in line}
        for text in (output, held_out)
    ]
    assert len(places[0] | places[1]) == 4


def test_inspect_colours_a_terminal_and_lets_no_escape_through(deepseek, jsonl):
    from loading import load_examples
    from rich.console import Console

    from jaxtune.data.report import LEARNED, show_example

    path = jsonl({"prompt": "a [red]", "completion": " b\x1b[2J"})
    examples = load_examples(path, tokenizer=deepseek, max_length=64)
    text = show_example(examples, 0, deepseek, marks=False)
    learned = [text.plain[span.start : span.end] for span in text.spans if span.style == LEARNED]
    assert learned == [" b␛[2J<｜end▁of▁sentence｜>"]
    assert "a [red]" in text.plain
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(text)
    assert "\x1b[1;32m b␛" in capture.get()


def test_stats_count_what_is_there(config, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + '{"messages": []}\n{"messages": 3}\n{\n')
    numbers = json.loads(data(capsys, "stats", "--config", config, "--json"))
    train, held_out = numbers["train"], numbers["eval"]
    assert train["examples"] + held_out["examples"] == 12
    assert train["duplicates"] + held_out["duplicates"] == 1
    assert train["held_out_too"] == 0
    assert train["unread"] == ["id"]
    assert sum(bar["examples"] for bar in train["histogram"]) == train["examples"]
    assert 0.3 < train["packing_efficiency"] <= 1
    assert train["targets"] < train["tokens"]
    rejected = train["rejected"]
    assert [entry["rows"] for entry in rejected.values()] == [2, 1]
    assert all(entry["first"].startswith(f"{path}:1") for entry in rejected.values())
    text = data(capsys, "stats", "--config", config)
    assert "█" in text
    assert "rejected rows" in text and f"{path}:13: messages must be a list" in text


def test_stats_count_the_virtual_tokens_of_held_out_rows(config, capsys):
    """The padding in the statistics is that of the batches of an evaluation."""
    overrides = ["adapter.method=prompt", "adapter.virtual_tokens=40"]
    flags = [f"--config.{override}" for override in overrides]
    numbers = json.loads(data(capsys, "stats", "--config", config, "--json", *flags))
    resolved = resolve(load_file(config), overrides)
    source = open_model(resolved.model.path).source
    chat = configured_chat(resolved, source)
    held_out = data_reader(resolved, source, chat.tokenizer).splits().held_out
    batches = list(held_out_batches(resolved, held_out, reserved=40))
    filled = np.mean([batch["segment_ids"] != 0 for batch in batches])
    assert numbers["eval"]["packing_efficiency"] == pytest.approx(filled)


@pytest.mark.slow
def test_what_is_prepared_is_trained_on(config, tmp_path, capsys, caplog):
    output = data(capsys, "prepare", "--config", config, "--workers", 1)
    assert output.startswith("prepared: ") and str(tmp_path / "cache") in output
    (kept,) = (tmp_path / "cache").iterdir()
    caplog.set_level("INFO", logger="jaxtune")
    caplog.clear()
    run = jaxtune.train(resolve(load_file(config)), tmp_path / "run")
    assert f"using the tokenized data in {kept}" in caplog.text
    assert [line["step"] for line in run.evaluations()] == [2]
    fingerprint = json.loads((tmp_path / "run" / "fingerprint.json").read_text())
    # Without the kept files the same run goes on: they change nothing.
    for file in kept.iterdir():
        file.unlink()
    caplog.clear()
    jaxtune.train(resolve(load_file(config), ["training.steps=2"]), tmp_path / "run")
    assert "using the tokenized data" not in caplog.text
    assert json.loads((tmp_path / "run" / "fingerprint.json").read_text()) == fingerprint


def test_a_wrong_action_is_named(capsys, config):
    with pytest.raises(SystemExit):
        main(["data", "stat", "--config", str(config)])
    assert 'did you mean "stats"' in capsys.readouterr().err
