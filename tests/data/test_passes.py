"""A pass shows each row exactly once, whatever the batch, the packing and the order."""

from __future__ import annotations

import collections
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loading import load_examples

from jaxtune import progress
from jaxtune.cli import main
from jaxtune.config import load_file, resolve
from jaxtune.data import BatchLoader, DataOrder, Examples, SourceSlice
from jaxtune.data.packing import pack_rows
from jaxtune.training.durations import Timeline
from jaxtune.training.train import make_loader

LENGTH = 24


def make(count, weights=((1.0, None),)):
    """Examples of 2 to 24 tokens, all of them the number of the example."""
    lengths = np.random.default_rng(count).integers(2, LENGTH + 1, count)
    tokens = [np.full(n, i, np.int32) for i, n in enumerate(lengths, 1)]
    counts = [part or count for _, part in weights]
    parts = [SourceSlice("", "", n, weight) for (weight, _), n in zip(weights, counts, strict=True)]
    return Examples(tokens, tokens, [f"x:{i}" for i in range(count)], parts=tuple(parts))


def shown(batch):
    """The numbers of the examples in a batch, row by row, each of which is whole."""
    numbers = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            (number,) = set(tokens[segments == segment].tolist())
            numbers.append(number - 1)
    return numbers


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (57, 8), (200, 4), (1000, 7)])
def test_each_pass_gives_each_example_once(packing, shuffle, count, batch_size):
    examples = make(count)
    loader = BatchLoader(
        examples, batch_size=batch_size, length=LENGTH, packing=packing, shuffle=shuffle, seed=3
    )
    timeline, rows, tokens, step = Timeline(loader.order), 0, 0, 0
    for number in range(3):
        plan, found = loader.order.plan(number), []
        for within in range(plan.steps):
            batch = next(loader)
            assert batch["tokens"].shape == (batch_size, LENGTH)
            numbers = shown(batch)
            assert numbers == plan.examples[plan.shown[within] : plan.shown[within + 1]].tolist()
            found += numbers
            step, rows = step + 1, rows + len(numbers)
            tokens += int((batch["segment_ids"] > 0).sum())
            assert loader.rows == rows
            seen = timeline.after(step)
            assert (seen.rows, seen.tokens) == (rows, tokens)
            assert seen.passes == pytest.approx(number + (within + 1) / plan.steps, rel=1e-12)
        assert sorted(found) == list(range(count))
        assert seen.passes == number + 1
        if not packing:
            assert plan.steps == -(-count // batch_size)
            assert shuffle or found == sorted(found)


def test_weights_that_do_not_divide_the_rows_add_up_over_passes():
    """Half of 25 rows is 12.5: two passes show 25. A part of less than a row shows one."""
    examples = make(29, weights=((0.5, 25), (2.5, 3), (0.1, 1)))
    loader = BatchLoader(examples, batch_size=4, length=LENGTH, packing=True, shuffle=True, seed=0)
    timeline, steps, counts = Timeline(loader.order), 0, collections.Counter()
    for number in range(1, 5):
        for _ in range(loader.order.plan(number - 1).steps):
            counts.update(shown(next(loader)))
            steps += 1
            assert timeline.after(steps).rows == loader.rows == counts.total()
        assert counts.total() == loader.order.rows_before(number) == 21 * number + number % 2
    assert [counts[i] for i in range(29)] == [2] * 25 + [10] * 3 + [4]
    assert timeline.describe(steps).endswith("4 passes over 21 rows")


def test_weights_show_each_example_of_a_part_as_often_as_any_other():
    examples = make(60, weights=((2.0, 10), (0.25, 40), (1.0, 10)))
    loader = BatchLoader(examples, batch_size=3, length=LENGTH, packing=True, shuffle=True, seed=0)
    counts = collections.Counter()
    for number in range(1, 9):
        for _ in range(loader.order.plan(number - 1).steps):
            counts.update(shown(next(loader)))
        assert counts.total() == 40 * number
        each = [counts[i] for i in range(60)]
        assert each[:10] == [2 * number] * 10 and each[50:] == [number] * 10
        assert sum(each[10:50]) == 10 * number
        assert set(each[10:50]) <= {number // 4, -(-number // 4)}


def test_a_row_of_a_batch_has_room_for_what_is_in_it():
    lengths = np.random.default_rng(0).integers(1, 101, 3000)
    for open_rows in (1, 2, 16, 10**6):
        told = []
        rows = pack_rows(lengths, 100, open_rows, told.append)
        assert np.bincount(rows, weights=lengths).max() <= 100
        assert sum(told) == 3000
        first = [int(np.flatnonzero(rows == row)[0]) for row in range(rows.max() + 1)]
        assert first == sorted(first)
    # With every row open, no two rows could have been one.
    left = 100 - np.bincount(rows, weights=lengths)
    assert np.sort(100 - left)[:2].sum() > 100


def settings(**changes):
    defaults = {"batch_size": 4, "length": LENGTH, "packing": True, "shuffle": True, "seed": 0}
    return defaults | changes


def test_the_order_is_that_of_earlier_runs():
    """A checkpoint outlives versions of this program and of NumPy."""
    tokens = [np.zeros(n, np.int32) for n in (5, 24, 3, 11, 7, 7, 19, 2, 13, 8)]
    plan = DataOrder(Examples(tokens, tokens, [""] * 10), **settings()).plan(1)
    rows = [plan.examples[inside].tolist() for inside in (*plan.rows(0), *plan.rows(1))]
    assert rows == [[1], [6, 7], [0, 4, 3], [9], [2, 5, 8]]


def test_passes_seeds_and_parts_are_drawn_apart():
    orders = [
        tuple(DataOrder(make(50), **settings(seed=seed, packing=False)).plan(number).examples)
        for seed, number in itertools.product((0, 1, 2, 2**32, 2**40), range(5))
    ]
    assert len(set(orders)) == len(orders)


@pytest.fixture
def command(tiny_chat, tmp_path, capsys):
    """Runs `jaxtune data` on rows of text: ``command(action, files, *overrides)``."""

    def run(action, data, *overrides, more=()):
        config = tmp_path / "config.py"
        config.write_text(
            "from jaxtune import config\n\n"
            "def get_config():\n"
            "    c = config.default()\n"
            f"    c.model.path = {str(tiny_chat)!r}\n"
            f"    c.data.train = {data!r}\n"
            f"    c.data.cache = {str(tmp_path / 'cache')!r}\n"
            "    c.data.max_length = 24\n"
            "    c.training.batch_size = 4\n"
            "    c.training.epochs = 2.0\n"
            "    return c\n"
        )
        flags = [f"--config.{override}" for override in overrides]
        main(["data", action, "--config", str(config), *more, *flags])
        resolved = resolve(load_file(config), list(overrides))
        return capsys.readouterr().out, resolved

    return run


def steps_of(output):
    return [json.loads(line) for line in output.splitlines()]


def texts(tmp_path, name, words):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return str(path)


def test_the_printed_order_is_that_of_the_batches(command, tmp_path, tiny_chat):
    """Duplicates, a blank line, a file named twice, long rows in windows and dropped ones."""
    from jaxtune.checkpoints.tokenizer import load_tokenizer

    words = [chr(97 + i % 26) * (1 + i % 19) for i in range(30)]
    words[7] = words[8]  # a duplicate
    words[3] = "0123456789" * 6  # of more than a row
    first, second = texts(tmp_path, "a.jsonl", words), texts(tmp_path, "b.jsonl", ["A", "B", "C"])
    with Path(second).open("a") as file:
        file.write("\n" + json.dumps({"text": "D"}) + "\n")
    data, count = f"{first},{second},{first}", 64
    tokenizer = load_tokenizer(tiny_chat)
    all_words = [*words, *"ABCD", *words]
    for flags in (
        ["data.too_long=windows"],
        ["data.too_long=drop", "data.packing=False"],
        ["data.too_long=windows", "data.shuffle=False", "training.epochs=3"],
        ["data.too_long=drop", "training.epochs=1.5", "training.seed=5"],
    ):
        output, config = command("order", data, *flags)
        lines = steps_of(output)
        windows = "data.too_long=windows" in flags
        examples = load_examples(
            data, tokenizer=tokenizer, max_length=24, too_long=config.data.too_long
        )
        loader = make_loader(config, examples)
        passes = collections.defaultdict(list)
        for step, (line, batch) in enumerate(zip(lines, loader, strict=False), 1):
            assert line["step"] == step
            passes[line["pass"]] += line["rows"]
            # The text of each example is that of the row, or of a window of it.
            found = []
            for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
                for segment in range(1, segments.max() + 1):
                    ids = tokens[segments == segment]
                    found.append(tokenizer.decode(ids, skip_special_tokens=True))
            for text, row in zip(found, line["rows"], strict=True):
                assert text in all_words[row] and (row % 34 == 3 or text == all_words[row])
        once = collections.Counter(range(count))
        for long in (3, 37):
            once[long] = 3 if windows else 0
        whole, part = divmod(config.training.epochs, 1)
        for number in range(1, int(whole) + 1):
            assert collections.Counter(passes[number]) == +once
        if part:
            steps = [line for line in lines if line["pass"] == 2]
            plan = loader.order.plan(1)
            assert len(steps) == -(-plan.steps // 2) < plan.steps
            assert max(collections.Counter(passes[2]).values()) == 1
        assert max(passes) == -(-config.training.epochs // 1)


def test_rows_that_are_held_out_keep_their_numbers(command, tmp_path):
    data = texts(tmp_path, "a.jsonl", [str(i) for i in range(20)])
    output, _ = command("order", data, "data.eval_split=5", "data.packing=False")
    counts = collections.Counter(row for line in steps_of(output) for row in line["rows"])
    assert len(counts) == 15 and set(counts.values()) == {2}
    inspected, _ = command("inspect", data, "data.eval_split=5", "data.packing=False")
    assert min(counts) == int(inspected.split(":")[1]) - 1
    held_out = texts(tmp_path, "b.jsonl", ["3", "18"])
    output, _ = command("order", data, f"data.eval={held_out}", "data.overlap=drop")
    counts = collections.Counter(row for line in steps_of(output) for row in line["rows"])
    assert sorted(counts) == [i for i in range(20) if i not in (3, 18)]
    assert set(counts.values()) == {2}


def test_statistics_say_what_a_pass_and_the_run_are(command, tmp_path):
    data = texts(tmp_path, "a.jsonl", [chr(97 + i) * 10 for i in range(10)])
    twice = f"{data},{data}@3"
    output, _ = command("stats", twice, "training.epochs=1.25", more=["--json"])
    numbers = json.loads(output)["train"]
    assert (numbers["rows"], numbers["examples"], numbers["duplicates"]) == (20, 20, 10)
    # Two examples of 11 tokens fit a row of 24, and four rows a batch: 40 shown make 5 batches.
    assert numbers["pass"] == {"rows": 40, "steps": 5, "tokens": 440}
    assert numbers["packing_efficiency"] == pytest.approx(440 / (5 * 4 * 24))
    assert numbers["run"]["steps"] == 7
    text = (
        "7 steps: 1 pass over 40 rows and 2 of the 5 steps of the next, so it ends in the middle "
        "of a pass"
    )
    assert numbers["run"]["text"] == text
    output, _ = command("stats", twice, "training.epochs=1.25")
    assert text in output and "40 in 5 batches" in output


def test_a_bar_appears_once_planning_takes_over_two_seconds(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    order = DataOrder(make(20), **settings())
    for passes, shown in ((1, False), (3, True)):
        section = resolve({"training": {"epochs": float(passes)}}).training
        Timeline(order).total_steps(section)
        assert ("planning passes" in capsys.readouterr().err) == shown
