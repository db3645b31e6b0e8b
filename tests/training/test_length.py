"""Lengths and intervals in every unit."""

import numpy as np
import pytest

from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.intervals import Interval, parse_interval
from jaxtune.training import length
from jaxtune.training.length import Due, Rates, measure_rates, needs_rates, total_steps


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
        ("5 epocs", 'checkpoint.every=\'5 epocs\': "epocs" is no unit; did you mean "epochs"?'),
        ("3 k steps", '"k steps" is no unit'),
        ("often", "checkpoint.every takes a number of updates, or a number with steps, epochs"),
        ("-3", "checkpoint.every takes a number of updates"),
        ("1.5 steps", "there are no parts of steps"),
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


def updates(due, last):
    return [number for number in range(1, last + 1) if due(number)]


def test_what_is_due_when():
    rates = Rates(steps_per_epoch=7.5, tokens_per_step=100.0)
    assert updates(Due("k", 4), 13) == [4, 8, 12]
    assert updates(Due("k", 0), 13) == []
    assert updates(Due("k", "0.5 epochs", rates), 16) == [4, 8, 12, 15]
    assert updates(Due("k", "1k tokens", rates), 31) == [10, 20, 30]
    # More often than every update there is nothing.
    assert updates(Due("k", "1 tokens", rates), 3) == [1, 2, 3]


def test_minutes_are_those_of_a_clock(monkeypatch):
    now = iter([0.0, 20.0, 61.0, 61.0, 100.0, 122.0, 122.0])
    monkeypatch.setattr(length.time, "monotonic", lambda: next(now))
    assert updates(Due("k", "1 minute"), 4) == [2, 4]


def batches(rows):
    """Yields batches whose rows hold segments of these lengths, in rows of 8."""
    while True:
        for lengths in rows:
            segments = np.zeros((len(lengths), 8), np.int32)
            for row, sizes in zip(segments, lengths, strict=True):
                ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
                row[: len(ids)] = ids
            yield {"segment_ids": segments}


def test_rates_are_those_of_the_first_pass_over_the_data():
    stream = batches([[[3, 4], [5]], [[2], [1, 1, 1]]])
    assert measure_rates(stream, 7) == Rates(7 * 2 / 7, (12 + 5) / 2)
    assert measure_rates(batches([[[8], [8]]]), 5) == Rates(5 / 2, 16.0)


def test_a_length_in_epochs_or_tokens_is_rounded_up_to_updates():
    rates = Rates(steps_per_epoch=12.5, tokens_per_step=100.0)

    def steps(**training):
        return total_steps(resolve({"training": training}).training, rates)

    assert steps(epochs=2.0) == 25 and steps(epochs=3.0) == 38 and steps(epochs=0.01) == 1
    assert steps(tokens=1000) == 10 and steps(tokens=1001) == 11
    assert steps() == 100 and steps(steps=0) == 0


def test_only_what_counts_in_epochs_or_tokens_reads_the_data_for_it():
    assert not needs_rates(resolve({"checkpoint": {"every": "5 minutes"}}))
    assert needs_rates(resolve({"logging": {"every": "1k tokens"}}))
    assert needs_rates(resolve({"training": {"epochs": 1.0}}))
