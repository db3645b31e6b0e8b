"""Lengths and intervals in every unit."""

import re
import time

import numpy as np
import pytest

from jaxtune.config import resolve
from jaxtune.data import DataOrder, Examples
from jaxtune.errors import JaxtuneError
from jaxtune.intervals import Interval, parse_interval
from jaxtune.training import durations as length
from jaxtune.training.durations import Due, Timeline


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        (50, Interval(50)),
        ("50", Interval(50)),
        ("50 steps", Interval(50)),
        ("0.5 epochs", Interval(0.5, "epochs")),
        ("1 epoch", Interval(1, "epochs")),
        ("10 minutes", Interval(10, "minutes")),
        ("10minutes", Interval(10, "minutes")),
        ("1M tokens", Interval(1e6, "tokens")),
        ("1.5 B tokens", Interval(1.5e9, "tokens")),
        (0, Interval(0)),
    ],
)
def test_an_interval_is_read(text, interval):
    assert parse_interval("checkpoint.every", text) == interval


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 epocs", 'checkpoint.every=\'5 epocs\': unknown unit "epocs"; did you mean "epochs"?'),
        ("3 k steps", 'unknown unit "k steps"'),
        ("often", "checkpoint.every must be a number of steps, or a number and a unit"),
        ("-3", "checkpoint.every must be a number of steps"),
        ("1.5 steps", "the number of steps must be an integer"),
    ],
)
def test_another_form_is_refused_by_name(text, message):
    with pytest.raises(JaxtuneError) as error:
        resolve({}, [f"checkpoint.every={text}"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_has_one_length():
    with pytest.raises(
        JaxtuneError, match=r"training\.epochs=2\.0 and training\.tokens=5: a run has"
    ):
        resolve({"training": {"epochs": 2.0, "tokens": 5}})
    with pytest.raises(
        JaxtuneError, match=r"training\.steps=7 and training\.epochs=2\.0: a run has"
    ):
        resolve({"training": {"steps": 7, "epochs": 2.0}})


def test_a_length_on_the_command_line_replaces_that_of_the_config():
    def lengths(config, *overrides):
        training = resolve({"training": config}, overrides).training
        return training.steps, training.epochs, training.tokens

    assert lengths({"steps": 7}, "training.epochs=2") == (100, 2.0, 0)
    assert lengths({"epochs": 2.0}, "training.steps=7") == (7, 0.0, 0)
    assert lengths({"epochs": 2.0}, "training.steps=100") == (100, 0.0, 0)
    assert lengths({"tokens": 9}, "training.epochs=0.5") == (100, 0.5, 0)
    assert lengths({"steps": 7}, "training.epochs=0") == (7, 0.0, 0)
    with pytest.raises(JaxtuneError, match="a run has one length"):
        resolve({}, ["training.steps=7", "training.epochs=2"])


def updates(due, last):
    return [number for number in range(1, last + 1) if due(number)]


def timeline(lengths=(4,) * 30, **settings):
    """Passes over examples of these lengths; by default 15 steps of two, 8 tokens each."""
    tokens = [np.zeros(length, np.int32) for length in lengths]
    examples = Examples(tokens, tokens, ["x"] * len(tokens))
    defaults = {"batch_size": 2, "length": 8, "packing": False, "shuffle": True, "seed": 0}
    return Timeline(DataOrder(examples, **(defaults | settings)))


def test_what_is_due_when():
    passes = timeline()
    assert updates(Due("k", 4), 13) == [4, 8, 12]
    assert updates(Due("k", 0), 13) == []
    assert updates(Due("k", "1 epoch", passes), 46) == [15, 30, 45]
    assert updates(Due("k", "0.5 epochs", passes), 32) == [8, 15, 23, 30]
    assert updates(Due("k", "0.1 epochs", passes), 15) == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]
    assert updates(Due("k", "80 tokens", passes), 31) == [10, 20, 30]
    # More often than every update there is nothing.
    assert updates(Due("k", "1 tokens", passes), 3) == [1, 2, 3]
    # It is asked about later steps alone after a run was resumed.
    assert [n for n in range(29, 46) if Due("k", "1 epoch", timeline())(n)] == [30, 45]


def test_passes_of_other_lengths_end_where_they_end():
    """Each pass is packed anew, and not into the same number of rows."""
    lengths = np.random.default_rng(0).integers(1, 9, 60)
    passes = timeline(lengths, packing=True, batch_size=1)
    each = [passes.order.plan(number).steps for number in range(12)]
    assert len(set(each)) > 1
    ends = np.cumsum(each).tolist()
    assert updates(Due("k", "1 epoch", passes), ends[-1]) == ends
    shares = [(n + 1) / steps for steps in each for n in range(steps)]
    middle = [n for n, share in enumerate(shares, 1) if share - 1 / each[0] < 0.5 <= share]
    halves = [n for n in updates(Due("k", "0.5 epochs", passes), ends[-1]) if n not in ends]
    assert len(halves) == 12 and set(halves) <= set(middle)
    tokens = np.concatenate([np.diff(passes.order.plan(number).tokens) for number in range(12)])
    due = [n for n, (a, b) in enumerate(counted(tokens), 1) if b // 100 > a // 100]
    assert updates(Due("k", "100 tokens", passes), ends[-1]) == due
    for epochs in (1, 3, 12):
        assert steps(passes, epochs=float(epochs)) == ends[epochs - 1]
    assert steps(passes, epochs=2.5) == ends[1] + -(-each[2] // 2)
    for amount in (1, 777, int(lengths.sum()), int(lengths.sum()) + 1):
        assert steps(passes, tokens=amount) == int(np.argmax(np.cumsum(tokens) >= amount)) + 1


def counted(tokens):
    ends = np.cumsum(tokens).tolist()
    return zip([0, *ends], ends, strict=False)


def steps(passes, **training):
    return passes.total_steps(resolve({"training": training}).training)


def test_minutes_are_those_of_a_clock(monkeypatch):
    now = iter([0.0, 20.0, 61.0, 61.0, 100.0, 122.0, 122.0])
    monkeypatch.setattr(length.time, "monotonic", lambda: next(now))
    assert updates(Due("k", "1 minute"), 4) == [2, 4]


def test_a_length_in_epochs_or_tokens_is_rounded_up_to_updates():
    passes = timeline()
    assert steps(passes, epochs=2.0) == 30 and steps(passes, epochs=2.5) == 38
    assert steps(passes, epochs=0.01) == 1 and steps(passes, epochs=0.2) == 3
    assert steps(passes, tokens=80) == 10 and steps(passes, tokens=81) == 11
    assert steps(passes, tokens=8 * 15) == 15 and steps(passes, tokens=8 * 15 + 1) == 16
    assert steps(passes) == 100 and steps(passes, steps=0) == 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 steps: 0 passes over 30 rows"),
        (1, "1 step: 1 of the 15 steps of a pass over 30 rows, so it ends in the middle of a pass"),
        (15, "15 steps: 1 pass over 30 rows"),
        (
            19,
            "19 steps: 1 pass over 30 rows and 4 of the 15 steps of the next, so it ends in the "
            "middle of a pass",
        ),
        (45, "45 steps: 3 passes over 30 rows"),
    ],
)
def test_a_length_is_said_in_passes(count, text):
    assert timeline().describe(count) == text


def test_a_run_without_an_end_is_not_planned_to_its_end():
    begin = time.process_time()
    text = timeline().describe(10**12)
    assert re.fullmatch(r"10{12} steps: more than \d+ passes over 30 rows", text)
    assert time.process_time() - begin < 60
