"""Resuming with another config: a new length, other options, and other directories."""

import json
import logging
import shutil
from pathlib import Path

import pytest

import jaxtune
from jaxtune.api.run import Run
from jaxtune.cli import main
from jaxtune.config import load_file, resolve
from jaxtune.errors import JaxtuneError
from jaxtune.runs.directory import RunDirectory

FAST = ["logging.tensorboard=false", "data.eval=", "checkpoint.every=4"]


@pytest.fixture
def config(small_config):
    """Resolves the small config with overrides; its schedule is constant."""

    def make(*overrides):
        tree = load_file(small_config)
        tree["training"]["steps"] = 6
        return resolve(tree, [*FAST, "optimizer.schedule=constant", *overrides])

    return make


def lengthen(run, *overrides):
    main(["train", "--workdir", str(run), *(f"--config.{override}" for override in overrides)])
    return Run(run)


def comparable(run):
    """Returns the metrics without what a clock has measured."""
    clocked = {"tokens_per_second", "data_wait"}
    return [{k: v for k, v in line.items() if k not in clocked} for line in run.metrics()]


def test_a_lengthened_run_equals_one_of_that_length(config, tmp_path, caplog):
    whole = jaxtune.train(config("training.steps=11"), tmp_path / "whole")
    run = jaxtune.train(config(), tmp_path / "run")
    assert comparable(run) == comparable(whole)[:6]
    with caplog.at_level(logging.INFO, "jaxtune"):
        lengthen(run.path, "training.steps=11")
    assert comparable(run) == comparable(whole)
    ours, theirs = (r.adapter_directory("last") / "adapter_model.safetensors" for r in (run, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert (
        "lengthened from 6 to 11 steps; optimizer.schedule=constant now spans 11 steps: the "
        "learning rate of step 7 stays 0.01"
    ) in caplog.text
    assert "training.steps: 6 → 11" in caplog.text
    assert Run(run.path).config.training.steps == 11
    history = [json.loads(line) for line in run.directory.history.read_text().splitlines()]
    assert history == [{"step": 6, "changes": {"training.steps": [6, 11]}}]
    lengthen(run.path)  # nothing is left to do, and nothing changes
    assert comparable(run) == comparable(whole)
    with pytest.raises(SystemExit):
        lengthen(run.path, "training.steps=10")
    assert Run(run.path).config.training.steps == 11


def test_a_schedule_spans_the_new_length_and_the_warm_up_stays(config, tmp_path, caplog):
    cosine = ["optimizer.schedule=cosine", "optimizer.warmup_steps=0.5", "training.epochs=0.4"]
    run = jaxtune.train(config("training.batch_size=1", "data.packing=false", *cosine), tmp_path)
    rates = [line["learning_rate"] for line in run.metrics()]
    assert len(rates) == 16 and rates[8] == pytest.approx(1e-2)  # 40 rows, warm-up over 8 steps
    with caplog.at_level(logging.INFO, "jaxtune"):
        lengthen(run.path, "training.epochs=0.5")
    assert "lengthened from 16 to 20 steps" in caplog.text
    assert "the learning rate of step 17 is 0.0025 instead of 0" in caplog.text
    longer = [line["learning_rate"] for line in run.metrics()]
    assert longer[:16] == rates
    from optax import cosine_decay_schedule

    schedule = cosine_decay_schedule(1e-2, 12)
    assert longer[16:] == pytest.approx([float(schedule(step)) for step in (8, 9, 10, 11)])


def test_a_length_in_another_unit_or_below_what_is_done_is_refused(config, tmp_path, capsys):
    run = jaxtune.train(config("training.steps=4"), tmp_path / "run").path
    for override, message in {
        "training.epochs=2": "training.epochs=2.0: the length of this run is in steps "
        "(training.steps=4); change training.steps",
        "training.steps=3": "training.steps=3: the run has done 4 steps already; give at least as",
        "training.seed=1": "contains a run with another config: training.seed: 0 → 1; resume it",
    }.items():
        with pytest.raises(SystemExit):
            lengthen(run, override)
        assert message in capsys.readouterr().err
    assert not RunDirectory(run).history.exists()
    assert Run(run).config.requested() == config("training.steps=4")


def test_a_planned_length_that_is_not_reached_can_be_shortened(config, tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with run.start(config("training.steps=100")):
        pass
    with caplog.at_level(logging.INFO, "jaxtune"):
        lengthen(tmp_path, "training.steps=2")
    assert run.steps_done() == 2 and "shortened from 100 to 2 steps" in caplog.text


def test_options_that_change_nothing_learned_may_differ(config, tmp_path, caplog):
    run = jaxtune.train(config(), tmp_path / "run")
    changes = {"logging.every": "3", "checkpoint.keep": "3", "training.max_bad_steps": "9"}
    with caplog.at_level(logging.INFO, "jaxtune"):
        lengthen(run.path, "training.steps=9", *(f"{k}={v}" for k, v in changes.items()))
    assert "logging.every: 1 → 3" in caplog.text
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5, 6, 9]
    changed = Run(run.path).config.flat()
    assert {key: str(changed[key]) for key in changes} == changes
    jaxtune.train(config("training.steps=9", *(f"{k}={v}" for k, v in changes.items())), run.path)


def test_a_run_works_from_any_directory(config, tiny_chat, chats, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("model").symlink_to(tiny_chat)
    shutil.copy(chats, "rows.jsonl")
    shutil.copy(chats, "other.jsonl")
    relative = ["model.path=model", "data.train=rows.jsonl@1,./ot*.jsonl", "training.steps=2"]
    relative += ["data.eval=a=rows.jsonl,b=other.jsonl", "data.overlap=keep"]
    jaxtune.train(config(*relative), "run")
    jaxtune.train(config(*relative), "run")  # as a launcher repeats it
    work = tmp_path / "work"
    stored = json.loads(Path("run/config.json").read_text())
    assert stored["model"]["path"] == str(work / "model")
    assert stored["data"]["train"] == f"{work}/rows.jsonl@1,{work}/ot*.jsonl"
    assert stored["data"]["eval"] == f"a={work}/rows.jsonl,b={work}/other.jsonl"
    monkeypatch.chdir(tmp_path)
    lengthen("work/run", "training.steps=3")
    assert Run("work/run").model().generate(["a1"], max_new_tokens=1)
    Path("work/model").unlink()
    with pytest.raises(JaxtuneError, match=r"config\.json: model\.path=.*/model: no such file"):
        jaxtune.train(None, "work/run")


@pytest.mark.parametrize("name", ["someone/model", "a/b:test", "no such file.jsonl", "x@2"])
def test_what_is_not_here_keeps_its_name(name):
    from jaxtune.runs.paths import with_absolute_paths

    config = resolve({"model": {"path": name}, "data": {"train": name, "eval": f"a={name}"}})
    assert with_absolute_paths(config) == config


@pytest.mark.slow
def test_prepared_data_is_found_by_a_relative_and_an_absolute_path(
    config, small_config, chats, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(chats.parent)
    data = ["data.train=chats.jsonl", f"data.cache={tmp_path / 'cache'}", "data.eval="]
    overrides = [f"--config.{override}" for override in data]
    main(["data", "prepare", "--config", str(small_config), *overrides])
    with caplog.at_level(logging.INFO, "jaxtune"):
        jaxtune.train(config(*data, "training.steps=1"), tmp_path / "run")
    assert "using the tokenized data in" in caplog.text
