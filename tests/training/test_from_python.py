"""Training from Python: rows in memory, callbacks, progress and the run that is returned."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

import jaxtune
from jaxtune.errors import JaxtuneError
from jaxtune.runs.directory import RunDirectory


@pytest.fixture
def settings(tiny_chat):
    """Makes sections of a run of 4 steps without data."""

    def make(**changes):
        base = {
            "model": {"path": str(tiny_chat)},
            "data": {"max_length": 64, "overlap": "keep"},
            "adapter": {"rank": 4},
            "training": {"steps": 4, "batch_size": 2, "dtype": "float32"},
            "optimizer": {"learning_rate": 1e-2},
            "checkpoint": {"every": 2},
            "evaluation": {"every": 2, "batch_size": 4},
            "logging": {"tensorboard": False},
        }
        return {name: base.get(name, {}) | changes.get(name, {}) for name in base | changes}

    return make


@pytest.fixture(scope="module")
def rows(chats):
    return [json.loads(line) for line in chats.read_text().splitlines()]


@pytest.fixture
def unset(monkeypatch):
    """The logger of jaxtune as a program finds it; commands of other tests set its level."""
    logger = logging.getLogger("jaxtune")
    level = logger.level
    logger.setLevel(logging.NOTSET)  # also for the loggers below it, which remember the level
    monkeypatch.setattr(logger, "handlers", [])
    yield logger
    logger.setLevel(level)


def batches(run):
    return [(line["batch"], line["loss"]) for line in run.metrics()]


def test_rows_in_memory_train_like_those_of_a_file(settings, chats, rows, tmp_path):
    files = {"data": {"train": str(chats), "eval": str(chats)}}
    run = jaxtune.train(settings(**files), tmp_path / "file")
    listed = jaxtune.train(settings(), tmp_path / "list", train_data=rows, eval_data=rows)
    table = Dataset.from_list(rows)
    named = {"a": table.select(range(20)), "b": rows[20:]}
    tabled = jaxtune.train(settings(), tmp_path / "table", train_data=table, eval_data=named)
    assert batches(run) == batches(listed) == batches(tabled)
    assert run.evaluations() == listed.evaluations()
    assert {"loss", "a/loss", "b/loss"} <= tabled.evaluations()[0].keys()
    with pytest.raises(JaxtuneError, match="list: the run was given rows in memory; pass train_da"):
        jaxtune.train(None, tmp_path / "list")
    with pytest.raises(JaxtuneError, match=r"the inputs of the run have changed: data\.train"):
        jaxtune.train(None, tmp_path / "list", train_data=rows[1:], eval_data=rows)
    longer = listed.config.replace(training={"steps": 5})
    for config in (None, settings(), longer):
        jaxtune.train(config, tmp_path / "list", train_data=rows, eval_data=rows)
    assert batches(listed)[:4] == batches(run) and len(batches(listed)) == 5
    with pytest.raises(JaxtuneError, match="memory:eval: the run was given rows in memory"):
        from jaxtune.api.evaluate_run import evaluate

        evaluate(listed.directory)


def test_rows_that_cannot_be_used_are_named(settings, rows, tmp_path):
    splits = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows))
    for data, message in (
        (
            splits,
            r'one data set, such as train_data\["train"\] \(found: train, test\)',
        ),
        (iter(rows), "train_data is a list of dicts or a datasets.Dataset, not list_iterator"),
        ("rows.jsonl", "train_data is a list of dicts or a datasets.Dataset, not str"),
        ([*rows[:3], "text"], "memory:train row 3: expected a dict, found str"),
        ([{"messages": []}], "memory:train row 0: "),
    ):
        with pytest.raises(JaxtuneError, match=message):
            jaxtune.train(settings(), tmp_path, train_data=data)
    with pytest.raises(JaxtuneError, match=r"train_data and data\.train=x are both given"):
        jaxtune.train(settings(data={"train": "x"}), tmp_path, train_data=rows)
    with pytest.raises(JaxtuneError, match="eval_data: 'a b' is not a name"):
        jaxtune.train(settings(), tmp_path, train_data=rows, eval_data={"a b": rows})
    assert not RunDirectory(tmp_path).exists()


class Recorded(jaxtune.Callback):
    """Notes every event; stops the run at an event of `kind` after step `at`."""

    def __init__(self, kind="", at=0):
        self.events, self.kind, self.at = [], kind, at

    def note(self, kind, event):
        self.events.append((kind, event))
        if kind == self.kind and event.step >= self.at:
            event.stop()

    def on_step(self, event):
        self.note("step", event)

    def on_evaluation(self, event):
        self.note("evaluation", event)

    def on_checkpoint(self, event):
        assert (event.checkpoint / "manifest.json").is_file()
        self.note("checkpoint", event)

    def on_end(self, event):
        self.note("end", event)

    def steps(self, kind):
        return [event.step for each, event in self.events if each == kind]


def test_callbacks_see_the_events_of_a_run_and_of_its_resume(settings, rows, tmp_path):
    seen = Recorded()
    data = {"train_data": rows, "eval_data": rows}
    run = jaxtune.train(settings(), tmp_path / "run", callbacks=[seen], **data)
    assert seen.steps("step") == [1, 2, 3, 4]
    assert seen.steps("evaluation") == seen.steps("checkpoint") == [2, 4]
    assert seen.steps("end") == [4]
    steps = [event for kind, event in seen.events if kind == "step"]
    for event, line in zip(steps, run.metrics(), strict=True):
        assert event.metrics.items() <= line.items() and event.steps == 4
    scores = [event.metrics["loss"] for kind, event in seen.events if kind == "evaluation"]
    assert scores == [line["loss"] for line in run.evaluations()]
    again = Recorded()
    longer = run.config.replace(training={"steps": 6})
    jaxtune.train(longer, run.path, callbacks=[again], **data)
    assert again.steps("step") == [5, 6] and again.steps("end") == [6]
    with pytest.raises(JaxtuneError, match=r"callbacks\[0\] is <class .*Recorded'>, not an instan"):
        jaxtune.train(longer, run.path, callbacks=[Recorded], **data)


@pytest.mark.slow
def test_a_callback_stops_a_run_that_can_be_resumed(settings, rows, tmp_path):
    config = settings(training={"steps": 7}, evaluation={"every": 3}, checkpoint={"every": 3})
    data = {"train_data": rows, "eval_data": rows}
    whole = jaxtune.train(config, tmp_path / "whole", **data)
    # The metrics of a step are read during the next one; a checkpoint is complete a little later.
    for kind, at, expected in (
        ("step", 4, [5]),
        ("evaluation", 3, [3]),
        ("checkpoint", 3, [4, 5, 6]),
    ):
        stopping = Recorded(kind, at)
        run = jaxtune.train(config, tmp_path / kind, callbacks=[stopping], **data)
        done = run.directory.steps_done()
        assert done in expected and stopping.steps("end") == [done] == [len(run.metrics())]
        jaxtune.train(None, run.path, **data)
        assert batches(run) == batches(whole) and run.evaluations() == whole.evaluations()


def test_an_error_in_a_callback_ends_the_run_and_keeps_what_is_saved(settings, rows, tmp_path):
    class Broken(jaxtune.Callback):
        def on_step(self, event):
            if event.step == 3:
                raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        jaxtune.train(settings(), tmp_path, train_data=rows, callbacks=[Broken()])
    assert RunDirectory(tmp_path).steps_done() == 2
    assert len(jaxtune.train(None, tmp_path, train_data=rows).metrics()) == 4


def test_a_run_is_shown_with_its_state(settings, rows, tiny_chat, tmp_path, unset, caplog):
    data = {"train_data": rows, "eval_data": rows}
    jaxtune.train(settings(training={"steps": 1}), tmp_path / "one", progress=False, **data)
    assert not [record for record in caplog.records if record.levelno < logging.WARNING]
    run = jaxtune.train(settings(), tmp_path / "run", **data)
    assert "step 1/4: loss" in caplog.text
    best = min(run.evaluations(), key=lambda line: line["loss"])
    loss = run.metrics()[-1]["loss"]
    assert repr(run) == (
        f"Run({str(tmp_path / 'run')!r}, lora on {tiny_chat}, 4 of 4 steps, loss {loss:.4f}, "
        f"best loss {best['loss']:.4f} after step {best['step']})"
    )
    for path in (run.directory.metrics, run.directory.evaluations):  # a line in progress
        shown = repr(run), len(run.metrics()), len(run.evaluations())
        with path.open("a") as file:
            file.write('{"step": 5, "lo')
        assert shown == (repr(run), len(run.metrics()), len(run.evaluations()))
    fresh = RunDirectory(tmp_path / "fresh")
    with fresh.start(run.config):
        pass
    assert repr(jaxtune.Run(fresh.path)).endswith(f"lora on {tiny_chat}, not started)")


PREEMPTED = """
import json, os, signal, sys
import jaxtune
from jaxtune.parallel import processes
from jaxtune.training.loop.preemption import Preempted

class Noting(jaxtune.Callback):
    def on_step(self, event):
        if event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_checkpoint(self, event):
        print(event.step, (event.checkpoint / "manifest.json").is_file())

processes.initialize(None)
settings, rows, workdir = json.loads(sys.argv[1])
try:
    jaxtune.train(settings, workdir, train_data=rows, callbacks=[Noting()])
except Preempted:
    print("preempted")
"""


@pytest.mark.slow
def test_the_checkpoint_of_a_preemption_is_announced(settings, rows, tmp_path):
    config = settings(training={"steps": 100_000}, checkpoint={"every": 100_000})
    done = subprocess.run(
        [sys.executable, "-c", PREEMPTED, json.dumps([config, rows, str(tmp_path)])],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    saved = RunDirectory(tmp_path).steps_done()
    assert saved and done.stdout.splitlines() == [f"{saved} True", "preempted"]


SCRIPT = """
import json, sys
sys.modules["torch"] = None  # as on a machine with jaxtune alone
import jaxtune
from jaxtune import log_output
settings, rows, workdir = json.loads(sys.argv[1])
for how in ("silent", "default", "enabled"):
    if how == "enabled":
        jaxtune.enable_logging()
        jaxtune.enable_logging()
    print(how, file=sys.stderr, flush=True)
    jaxtune.train(settings, f"{workdir}/{how}", train_data=rows, progress=how != "silent")
    assert bool(log_output.LOGGER.handlers) == (how == "enabled")
"""


@pytest.mark.slow
def test_a_script_shows_what_the_command_line_shows(settings, rows, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([settings(), rows, str(tmp_path)])],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=True,
    )
    silent, default, enabled = (
        text.splitlines()
        for text in re.split("^(?:silent|default|enabled)$", done.stderr, flags=re.M)[1:]
    )
    assert not done.stdout and not [line for line in silent if line]
    for lines in (default, enabled):
        assert sum(line.startswith("step 1/4: loss ") for line in lines) == 1
        assert sum(line.startswith("training for 4 steps") for line in lines) == 1


def test_without_progress_a_terminal_has_no_bar(settings, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    config = settings(training={"steps": 1})
    shown = []
    for enabled in (True, False):
        jaxtune.train(config, tmp_path / str(enabled), train_data=rows, progress=enabled)
        shown.append("tokens/s" in capsys.readouterr().err)
    assert shown == [True, False]


def test_handlers_of_the_program_are_kept(unset):
    jaxtune.enable_logging("WARNING")
    assert unset.handlers == []  # pytest's handler at the root receives the messages
    assert unset.getEffectiveLevel() == logging.WARNING
