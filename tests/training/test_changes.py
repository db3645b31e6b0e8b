"""What has changed since a run was started: refused with its name, accepted by name, recorded."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.api.run import Run
from jaxtune.cli import main
from jaxtune.errors import JaxtuneError
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.paths import RunFiles
from jaxtune.runs.record import Record, hash_value, read_record
from jaxtune.runs.resuming import check_stored
from jaxtune.runs.review import Review
from jaxtune.training import train as training
from jaxtune.training.verification import Verification

SEED = 20261129


def sections(model, data, **changes):
    base = {
        "model": {"path": str(model)},
        "data": {"train": str(data), "max_length": 64},
        "adapter": {"rank": 4},
        "training": {"steps": 2, "batch_size": 4, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }
    return base | {name: base.get(name, {}) | values for name, values in changes.items()}


@pytest.fixture(scope="module")
def original(tiny_chat, chats, tmp_path_factory):
    """A directory with a base, a data file and a run of two steps over them."""
    place = tmp_path_factory.mktemp("original")
    shutil.copytree(tiny_chat, place / "base")
    shutil.copy(chats, place / "rows.jsonl")
    jaxtune.train(sections(place / "base", place / "rows.jsonl"), place / "run", progress=False)
    return place


@pytest.fixture
def place(original):
    """The same directory; its content is restored afterwards."""
    kept = original.with_name(f"{original.name}-kept")
    shutil.copytree(original, kept)
    yield original
    shutil.rmtree(original)
    kept.rename(original)


def resume(place, config=None, accept=()):
    return jaxtune.train(config, place / "run", accept_changes=accept, progress=False)


def refused(place, match, config=None, accept=()):
    with pytest.raises(JaxtuneError, match=match) as error:
        resume(place, config, accept)
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(path, draw):
    """Flips one random bit; returns its byte."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return at


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_unchanged_run_resumes_and_keeps_its_record(original):
    before = (original / "run/fingerprint.json").read_bytes()
    resume(original)
    resume(original, sections(original / "base", original / "rows.jsonl"))
    assert (original / "run/fingerprint.json").read_bytes() == before
    record = read_record(original / "run/fingerprint.json")
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= record.base.files.keys()
    for name, file in record.base.files.items():
        assert file.size == (original / "base" / name).stat().st_size and len(file.hashes) == 1


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_one_flipped_bit_of_any_file_of_the_base_is_refused(place, count):
    print("seed", SEED, count)
    draw = random.Random(SEED + count)
    for path in sorted((place / "base").iterdir()):
        content = path.read_bytes()
        for _ in range(count):
            at = flip(path, draw)
            message = refused(place, f"{path.name}")
            assert f"{path.name} differs within bytes 0–{len(content) - 1}" in message or (
                path.suffix == ".safetensors"  # its header is checked when it is opened
                and f"{path}: not a valid safetensors file" in message
            ), (at, message)
            path.write_bytes(content)
    resume(place)


def test_a_replaced_base_can_be_accepted(place, tiny_chat):
    weights = place / "base/model.safetensors"
    flip(weights, random.Random(SEED))
    message = refused(place, r"the base model .*/base has changed: model\.safetensors differs")
    assert message.endswith("restore it, or accept with --accept-changes model")
    (place / "base/added_tokens.json").write_text("{}")
    refused(place, r"has changed: added_tokens\.json is new; restore")
    (place / "base/added_tokens.json").unlink()
    resume(place, accept="model")
    (line,) = Run(place / "run").directory.read_history()
    assert line["accepted"] == ["model"] and line["step"] == 2
    resume(place)
    refused(place, "nothing to accept, because it has not changed", accept="model")
    # Another architecture cannot be accepted.
    edit(place / "base/config.json", lambda c: c.update(num_hidden_layers=2))
    refused(place, r"config\.json (differs|has)", accept=())


def test_files_that_are_not_read_may_come_and_go(place, caplog):
    """As in the hub's cache, which other programs add to."""
    assert (place / "base/tokenizer.json").is_file()  # read instead of vocab.json and merges.txt
    others = "LICENSE.txt merges.txt eval_results.json .DS_Store modeling_x.py pytorch_model.bin"
    for name in others.split():
        (place / "base" / name).write_text("{}")
    before = (place / "run/fingerprint.json").read_bytes()
    resume(place)
    assert (place / "run/fingerprint.json").read_bytes() == before
    for name in others.split():
        (place / "base" / name).unlink()
    resume(place)
    for name in ("additional_chat_templates/a.jinja", "model.safetensors.index.json"):  # read
        (place / "base" / name).parent.mkdir(exist_ok=True)
        (place / "base" / name).write_text('{"weight_map": {"x": "model.safetensors"}}')
        refused(place, f"{name} is new")
        (place / "base" / name).unlink()


def test_everything_that_has_changed_in_the_base_is_accepted_together_and_listed(place, caplog):
    """An accepted difference of a small file does not hide one of the weights."""
    edit(place / "base/generation_config.json", lambda content: content.update(temperature=0.5))
    weights = place / "base/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused(place, r"has changed: generation_config\.json")
    resume(place, accept="model")
    (line,) = Run(place / "run").directory.read_history()
    for name in ("generation_config.json", "model.safetensors"):
        assert line["changes"]["model"][1].count(name) == 1, line
        assert caplog.text.count(f"base has changed: {name}") == 1
    resume(place)


def test_a_base_of_other_shapes_cannot_be_accepted(place, tiny):
    other = tiny("llama", vocab_size=258, num_hidden_layers=2)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(other / name, place / "base" / name)
    refused(place, "has arrays of other names or shapes than that of the run", accept="model")


def test_a_base_with_other_unused_tensors_can_be_accepted(place):
    """Such as a tensor that another version of transformers stores."""
    weights = place / "base/model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(weights) | {name: np.ones(4, np.float32)}, weights)
    refused(place, r"model\.safetensors has")
    resume(place, accept="model")
    change = Run(place / "run").directory.read_history()[0]["changes"]["model"][1]
    assert "names or shapes of tensors differ" in change
    resume(place)


def test_an_edited_config_is_refused_by_name(place):
    path = place / "run/config.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text)))  # another layout
    resume(place)
    edit(path, lambda content: content["optimizer"].update(learning_rate=0.003))
    message = refused(
        place, r"config\.json was changed .*: optimizer\.learning_rate: 0\.001 → 0\.0"
    )
    assert "or accept with --accept-changes optimizer.learning_rate" in message
    edit(path, lambda content: content["logging"].update(every=2))  # free, but not by an edit
    refused(place, r"logging\.every: 1 → 2, optimizer")
    resume(place, accept="config")  # written again from the record
    assert Run(place / "run").config.optimizer.learning_rate == 0.001
    edit(path, lambda content: content["optimizer"].update(learning_rate=0.003))
    resume(place, accept="optimizer.learning_rate")
    resume(place)
    line = Run(place / "run").directory.read_history()[-1]
    assert line["changes"]["optimizer.learning_rate"] == [0.001, 0.003]
    assert line["accepted"] == ["optimizer.learning_rate"]
    edit(path, lambda content: content["derived"].update(devices=7))
    refused(place, r"config\.json was changed .*config: ")


def test_changed_options_are_accepted_by_name(place, capsys):
    config = sections(place / "base", place / "rows.jsonl", optimizer={"weight_decay": 0.5})
    message = refused(place, "contains a run with another config: optimizer.weight_decay", config)
    assert "or accept with --accept-changes optimizer.weight_decay" in message
    refused(place, 'unknown key "optimizer.weight"; did you mean', config, "optimizer.weight")
    keys = "optimizer.weight_decay,training.seed"
    refused(place, "--accept-changes training.seed: nothing to accept", config, keys)
    run = str(place / "run")
    flags = ["--config.optimizer.weight_decay=0.5", "--config.training.steps=3"]
    with pytest.raises(SystemExit):
        main(["train", "--workdir", run, *flags])
    assert "--accept-changes optimizer.weight_decay" in capsys.readouterr().err
    main(["train", "--workdir", run, *flags, "--accept-changes", "optimizer.weight_decay"])
    (line,) = Run(run).directory.read_history()
    assert set(line["changes"]) == {"optimizer.weight_decay", "training.steps"}
    assert line["accepted"] == ["optimizer.weight_decay"]
    record = read_record(place / "run/fingerprint.json")
    assert record.config == Run(run).config and record.config.optimizer.weight_decay == 0.5
    assert record.replaced is None


def test_what_the_checkpoints_do_not_fit_is_refused_before_anything_is_read(place):
    shutil.rmtree(place / "base")  # a later check would report that it is missing
    for changes, name in (
        ({"adapter": {"rank": 8}}, r"adapter\.rank"),
        ({"adapter": {"method": "full"}}, r"adapter\.method"),
        ({"optimizer": {"name": "lion"}}, r"optimizer\.name"),
        ({"optimizer": {"clip_norm": 0.0}}, r"optimizer\.clip_norm"),
        ({"training": {"dtype": "float16"}}, r"training\.dtype"),
    ):
        config = sections(place / "base", place / "rows.jsonl", **changes)
        key = name.replace("\\", "")
        for accept in ("", key):
            refused(place, rf"{name}: .*do not fit another .*cannot be accepted", config, accept)
    refused(
        place, r"model\.path=.*/base: no such file or directory; if it has moved, pass its new p"
    )


def test_a_shorter_length_is_refused_before_anything_is_read(place):
    config = sections(place / "base", place / "rows.jsonl", training={"steps": 1})
    (place / "base/config.json").write_text("no longer JSON")
    refused(place, r"training\.steps=1: the run has done 2 steps already; give at", config)


def test_a_moved_base_and_moved_data_are_accepted_by_their_content(place, capsys, caplog):
    run, base, rows = (str(place / name) for name in ("run", "elsewhere", "moved.jsonl"))
    (place / "base").rename(base)
    (place / "rows.jsonl").rename(rows)
    with pytest.raises(SystemExit):
        main(["train", "--workdir", run, f"--config.model.path={base}"])
    assert f"data.train={place}/rows.jsonl: no such file" in capsys.readouterr().err
    with caplog.at_level(logging.INFO, "jaxtune"):
        moved = (f"--config.model.path={base}", f"--config.data.train={rows}")
        main(["train", "--workdir", run, *moved])
    assert f"model.path: {place}/base → {base}" in caplog.text
    assert Run(run).config.data.train == rows
    resume(place)
    # Other content under another path is not.
    shutil.copytree(base, place / "other")
    flip(place / "other/model.safetensors", random.Random(SEED))
    with pytest.raises(SystemExit):
        main(["train", "--workdir", run, f"--config.model.path={place}/other"])
    assert "other has changed: model.safetensors" in capsys.readouterr().err
    content = Path(rows).read_text().splitlines(keepends=True)
    Path(rows).write_text("".join(content[1:]))
    message = refused(place, r"the inputs of the run have changed: data\.train: ")
    assert "continue_from" in message and message.endswith("--accept-changes data.train")


def test_accepted_data_goes_on_at_the_same_step_of_the_new_order(place):
    rows = place / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[::-1][:30]))
    longer = sections(place / "base", rows, training={"steps": 4})
    whole = jaxtune.train(longer, place / "whole", progress=False)

    class Interrupted(jaxtune.Callback):
        def on_step(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before the first checkpoint with the new data
        training.train(
            Run(place / "run").config.replace(training={"steps": 4}),
            place / "run",
            accept_changes=["data.train"],
            callbacks=[Interrupted()],
        )
    run = resume(place)
    batches = [[line["batch"] for line in each.metrics()] for each in (run, whole)]
    assert len(batches[0]) == 4 and batches[0][2:] == batches[1][2:]
    assert batches[0][:2] != batches[1][:2]


def test_a_refused_resume_leaves_the_run_as_it_was(place, monkeypatch):
    base, other, rows = place / "base", place / "other.jsonl", place / "rows.jsonl"
    ids = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}  # no end token
    other.write_text(f"{json.dumps(ids)}\n" * 8)
    before = {path: path.read_bytes() for path in (place / "run").iterdir() if path.is_file()}
    ends = json.loads((place / "run/chat.json").read_text())["eos_token_id"]
    assert ends

    def unchanged():
        resume(place)
        assert {path: path.read_bytes() for path in before} == before
        assert not (place / "run/chat.next.json").exists()

    refused(place, "the inputs of the run have changed: data.train", sections(base, other))
    unchanged()
    # The chat settings are made anew, and something else is refused.
    (place / "mine.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    template = sections(base, rows)
    template["data"]["chat_template"] = str(place / "mine.jinja")
    refused(place, "the inputs of the run", template, ["data.chat_template"])
    unchanged()

    # A kill before the record, and one between the record and chat.json.
    write = RunDirectory._write_record

    def killed_before(self, record):
        raise KeyboardInterrupt

    def killed_after(self, record):
        write(self, record)
        raise KeyboardInterrupt

    accepted = {"config": sections(base, other), "accept": "data.train"}
    for killed in (killed_before, killed_after):
        monkeypatch.setattr(RunDirectory, "_write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(place, **accepted)
        assert json.loads((place / "run/chat.json").read_text())["eos_token_id"] == ends
        monkeypatch.setattr(RunDirectory, "_write_record", write)
        if killed is killed_before:
            (place / "run/history.jsonl").unlink()
            unchanged()
    resume(place)
    assert json.loads((place / "run/chat.json").read_text())["eos_token_id"] == []
    resume(place)


def test_a_stray_file_in_the_only_checkpoint_is_no_damage_and_damage_is_no_fresh_start(place):
    checkpoint = place / "run/checkpoints/2"
    metrics = (place / "run/metrics.jsonl").read_bytes()
    for directory in (checkpoint, checkpoint / "state"):
        (directory / ".DS_Store").write_text("x")
    resume(place)
    assert (place / "run/metrics.jsonl").read_bytes() == metrics
    extra = checkpoint / "extra.json"
    content = extra.read_bytes()
    extra.write_bytes(content.replace(b"0", b"1"))
    for config in (None, sections(place / "base", place / "rows.jsonl")):
        refused(place, r"checkpoints: no checkpoint is undamaged \(2: extra\.json is dam", config)
    extra.write_bytes(content)
    resume(place)
    assert (place / "run/metrics.jsonl").read_bytes() == metrics
    assert not (place / "run/checkpoints/quarantine").exists()


LOST = {
    "fingerprint.json": ("record", "everything is recorded as it is now"),
    "config.json": ("config", "writes it again from the record"),
    "chat.json": ("chat", "writes it anew"),
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_or_damaged_file_of_a_trained_run_is_no_fresh_start(place, name):
    key, consequence = LOST[name]
    config, path = sections(place / "base", place / "rows.jsonl"), place / "run" / name
    content = path.read_bytes()
    for damage in (None, b"", content[:-9], b"[" * 100_000, b"[]", b"\xff" + content, b"{}"):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        for given in (None, config):
            message = refused(place, name, given)
            assert f"--accept-changes {key}" in message, message
            assert consequence in message or damage == b"{}", message
        assert path.exists() == (damage is not None)
    resume(place, accept=key)
    resume(place)
    assert (path.read_bytes() == content) == (name != "chat.json")  # the clock is new


def test_every_flipped_bit_of_the_record_is_damage_and_no_difference(place):
    path, draw = place / "run/fingerprint.json", random.Random(SEED)
    content = path.read_bytes()
    value = json.loads(content)
    for _ in range(40):
        flip(path, draw)
        try:
            same = json.loads(path.read_bytes()) == value  # a space became another
        except ValueError:
            same = False
        if not same:
            refused(place, r"fingerprint\.json.*--accept-changes record")
    path.write_bytes(content)
    resume(place)
    edit(place / "run/chat.json", lambda content: content.update(clock="2024-02-04"))
    refused(place, r"chat\.json has been changed: chat: .*--accept-changes chat")


def test_a_record_of_an_earlier_version_is_accepted_once(place):
    path = place / "run/fingerprint.json"
    record = read_record(path)
    old = {key: record.inputs[key] for key in ("model", "tokenizer", "data.train", "data.eval")}
    path.write_text(json.dumps(old))
    refused(place, "written by an earlier version .*, pass --accept-changes model to record it")
    path.write_text(json.dumps(old | {"tokenizer": "0" * 64}))
    refused(place, "the inputs of the run have changed: tokenizer: 0000", accept="model")
    path.write_text(json.dumps(old))
    resume(place, accept="model")
    assert read_record(path) == record
    resume(place)


def test_a_config_that_was_being_replaced_is_completed(place):
    """The process was killed between the record and config.json."""
    directory = Run(place / "run").directory
    record, before = read_record(directory.fingerprint), directory.config.read_bytes()
    main(["train", "--workdir", str(place / "run"), "--config.training.steps=3"])
    after = read_record(directory.fingerprint)
    directory.config.write_bytes(before)
    refused(place, r"config\.json was changed .*training\.steps: 3 → 2")
    from dataclasses import replace

    directory.fingerprint.write_text(replace(after, replaced=record.config).to_json())
    resume(place)
    assert directory.read_config().training.steps == 3


def test_a_record_with_a_valid_checksum_and_other_content_is_one_line(place):
    path = place / "run/fingerprint.json"
    content = json.loads(path.read_text())
    for change in (
        {"base": 5},
        {"base": {"files": 3}},
        {"config": []},
        {"config": content["config"] | {"optimizer": {"learning_rate": 3.0}}},
        {"config_sha256": "0" * 64},
        {"config": {"model": {"path": 5}}},
        {"chat": 5},
        {"replaced": "x"},
        {"base": content["base"] | {"files": {"config.json": {"size": "x"}}}},
    ):
        changed = {k: v for k, v in (content | change).items() if k != "checksum"}
        path.write_text(json.dumps(changed | {"checksum": hash_value(changed)}))
        refused(place, r"fingerprint\.json")


def test_readers_say_that_the_base_is_another_one(place, caplog):
    run = Run(place / "run")
    run.save_merged(place / "merged")
    assert "is not the one" not in caplog.text
    edit(place / "base/generation_config.json", lambda content: content.update(temperature=0.5))
    for read in (
        lambda: Run(run.path).save_merged(place / "again"),
        lambda: Run(run.path).save_adapter(place / "adapter"),
    ):
        caplog.clear()
        read()
        assert f"the base model {place}/base is not the one that the run has trained on" in (
            caplog.text
        )
        assert "generation_config.json" in caplog.text


def test_another_base_under_continue_from_is_refused(place):
    config = sections(
        place / "base", place / "rows.jsonl", training={"continue_from": str(place / "run")}
    )
    edit(place / "base/tokenizer_config.json", lambda content: content.update(other=1))
    with pytest.raises(
        JaxtuneError, match=r"continue_from=.*/run: the base model .*tokenizer_conf"
    ):
        jaxtune.train(config, place / "next", progress=False)
    assert not (place / "next/config.json").exists()
    run = jaxtune.train(config, place / "next", accept_changes="model", progress=False)
    (line,) = run.directory.read_history()
    assert line["accepted"] == ["model"] and "tokenizer_config" in line["changes"]["model"][1]
    jaxtune.train(None, run.path, progress=False)


def test_lost_lines_of_the_metrics_are_reported_once(place, caplog):
    for path in (place / "run/metrics.jsonl",):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[1:]))
    resume(place)
    assert caplog.text.count("metrics.jsonl lacks the lines of steps 1") == 1
    main(["train", "--workdir", str(place / "run"), "--config.training.steps=4"])
    caplog.clear()
    resume(place)
    assert "lacks" not in caplog.text
    np.testing.assert_equal([line["step"] for line in Run(place / "run").metrics()], [2, 3, 4])


def test_the_initial_adapter_may_move_and_go_on_but_not_change_before_a_checkpoint(place):
    start = place / "run/adapter/last"
    config = sections(place / "base", place / "rows.jsonl", adapter={"init_from": str(start)})

    class Interrupted(jaxtune.Callback):
        def on_step(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jaxtune.train(config, place / "second", callbacks=[Interrupted()], progress=False)
    moved = place / "moved"
    shutil.copytree(start, moved)
    shutil.rmtree(start)
    config["adapter"]["init_from"] = str(moved)
    weights = moved / "adapter_model.safetensors"
    content = weights.read_bytes()
    other = {name: value * 2 for name, value in load_file(weights).items()}
    save_file(other, weights)
    with pytest.raises(JaxtuneError, match=r"have changed: adapter\.init_from: "):
        jaxtune.train(config, place / "second", progress=False)
    weights.write_bytes(content)
    (moved / ".DS_Store").write_text("x")
    (moved / "LICENSE").write_text("x")
    jaxtune.train(config, place / "second", progress=False)
    before = (place / "second/fingerprint.json").read_bytes()
    save_file(other, weights)  # its run has been trained on
    jaxtune.train(None, place / "second", progress=False)
    assert (place / "second/fingerprint.json").read_bytes() == before
    edit(moved / "adapter_config.json", lambda content: content.update(lora_alpha=3))
    with pytest.raises(JaxtuneError, match=r"have changed: adapter\.init_from: "):
        jaxtune.train(None, place / "second", progress=False)
    del config["adapter"]["init_from"]
    with pytest.raises(JaxtuneError, match=r"do not fit another adapter\.init_from"):
        jaxtune.train(config, place / "second", progress=False)


def test_an_initial_adapter_with_constants_may_not_change_later(place):
    """VeRA's shared matrices are frozen, so no checkpoint has them."""
    method = {"method": "vera", "rank": 8}
    config = sections(place / "base", place / "rows.jsonl", adapter=method)
    first = jaxtune.train(config, place / "first", progress=False)
    start = first.path / "adapter/last"
    config["adapter"]["init_from"] = str(start)
    jaxtune.train(config, place / "second", progress=False)
    weights = start / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(JaxtuneError, match=r"have changed: adapter\.init_from: "):
        jaxtune.train(None, place / "second", progress=False)


def test_processes_compare_hashes_of_the_same_names_whatever_files_they_see(place):
    directory = Run(place / "run").directory
    review = Review(directory.path)
    with directory.start(None, review) as config:
        verification = Verification(directory, config, review)
        without = verification._own_hashes()
        directory.expert_scores.write_text('{"a": [1.5]}')
        assert [*verification._own_hashes()] == [*without]
    directory.expert_scores.unlink()
    assert "expert_scores" not in read_record(directory.fingerprint).inputs


def test_lost_or_changed_expert_scores_cannot_be_made_anew(tmp_path):
    files, review = RunFiles(tmp_path), Review(tmp_path)
    record = Record({"expert_scores": hash_value({"a": [1.5]})}, None, None)
    for content in ("", "{", '{"a": [1.6]}'):
        with pytest.raises(JaxtuneError, match=r"expert_scores\.json.*; restore it from a copy"):
            check_stored(files, record, review)
        files.expert_scores.write_text(content)
    files.expert_scores.write_text('{ "a" : [1.5] }')
    check_stored(files, record, review)
