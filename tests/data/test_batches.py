"""Batches hold every example whole, and a stream resumes exactly where it stood."""

import ast
import importlib
import inspect
import itertools
import json

import numpy as np
import pytest

from jaxtune.data import IGNORE, BatchLoader, Examples, eval_batches
from jaxtune.errors import JaxtuneError

LENGTH = 24
ORDERS = list(itertools.product([True, False], [True, False]))


def make(count, *, seed=0, longest=LENGTH):
    """Examples of unequal length; every token says which example it is in."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    tokens = [np.full(n, 100 + i, np.int32) for i, n in enumerate(lengths)]
    targets = [np.append(np.arange(n - 1), IGNORE).astype(np.int32) for n in lengths]
    return Examples(tokens, targets, [f"rows.jsonl:{i + 1}" for i in range(count)])


def loader(examples, **settings):
    defaults = {"batch_size": 3, "length": LENGTH, "packing": True, "shuffle": True, "seed": 0}
    return BatchLoader(examples, **(defaults | settings))


def take(batches, count):
    return list(itertools.islice(batches, count))


def contents(batches):
    """The examples in batches, as (tokens, targets), row after row."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                assert np.all(np.diff(np.flatnonzero(inside)) == 1)
                assert batch["positions"][row][inside].tolist() == list(range(inside.sum()))
                found.append(
                    (tuple(batch["tokens"][row][inside]), tuple(batch["targets"][row][inside]))
                )
    return found


def expected(examples):
    return [(tuple(t), tuple(y)) for t, y in zip(examples.tokens, examples.targets, strict=True)]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(("packing", "shuffle"), ORDERS)
def test_batches_have_one_shape_and_padding_says_nothing(packing, shuffle):
    for batch in take(loader(make(17), packing=packing, shuffle=shuffle), 30):
        assert set(batch) == {"tokens", "targets", "segment_ids", "positions"}
        for value in batch.values():
            assert value.shape == (3, LENGTH)
            assert value.dtype == np.int32
        padding = batch["segment_ids"] == 0
        assert np.all(batch["targets"][padding] == IGNORE)
        assert np.all(batch["tokens"][padding] == 0)
        assert np.all(batch["positions"][padding] == 0)


def test_a_packed_row_by_hand():
    tokens = [np.asarray(t, np.int32) for t in ([1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11])]
    targets = [np.append(t[1:], IGNORE).astype(np.int32) for t in tokens]
    examples = Examples(tokens, targets, ["a", "b", "c", "d"])
    (batch,) = eval_batches(examples, batch_size=3, length=6, packing=True)
    n = IGNORE
    # [8, 9] fills the second row, though the first has room as well; the third row is empty.
    empty = [0, 0, 0, 0, 0, 0]
    assert batch["tokens"].tolist() == [[1, 2, 3, 10, 11, 0], [4, 5, 6, 7, 8, 9], empty]
    assert batch["targets"].tolist() == [[2, 3, n, 11, n, n], [5, 6, 7, n, 9, n], [n] * 6]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2], empty]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1], empty]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_evaluation_sees_every_example_once(packing, count):
    examples = make(count)
    batches = list(eval_batches(examples, batch_size=3, length=LENGTH, packing=packing))
    assert all(batch["tokens"].shape == (3, LENGTH) for batch in batches)
    assert sorted(contents(batches)) == sorted(expected(examples))
    if not packing:
        assert contents(batches) == expected(examples)
        assert len(batches) == -(-count // 3)


def test_file_order_begins_again_with_a_new_batch():
    examples = make(5)
    batches = take(loader(examples, packing=False, shuffle=False), 10)
    assert contents(batches) == expected(examples) * 5
    assert [int((batch["segment_ids"][:, 0] > 0).sum()) for batch in batches] == [3, 2] * 5


def test_packing_in_file_order_keeps_neighbours_together():
    """An example shares a row with none that is as many rows away as a batch has."""
    examples = make(300, longest=LENGTH // 2)
    numbers = [
        [
            int(tokens[0]) - 100
            for tokens, _ in contents([{k: v[row : row + 1] for k, v in b.items()}])
        ]
        for b in take(loader(examples, shuffle=False), 30)
        for row in range(3)
    ]
    firsts = [row[0] for row in numbers]
    assert firsts == sorted(firsts)
    for at, row in enumerate(numbers):
        assert row == sorted(row)
        assert at + 3 >= len(numbers) or row[-1] < firsts[at + 3]


def filled(examples, **settings):
    """The share of a pass that holds tokens, by its plan and by its batches."""
    stream = loader(examples, **settings)
    plan = stream.order.plan(0)
    positions = np.stack([batch["segment_ids"] > 0 for batch in take(stream, plan.steps)])
    assert positions.mean() == pytest.approx(stream.order.filled(plan), rel=1e-12)
    return positions.mean()


def test_packing_fills_rows():
    assert filled(make(400, longest=LENGTH // 2)) > 0.95  # one example a row fills 0.29


def test_packing_fills_rows_of_real_lengths():
    """Docstrings of Python's own library: a few long ones among many short ones."""
    lengths = []
    for name in ("argparse", "collections", "calendar", "inspect", "logging", "random", "typing"):
        source = inspect.getsource(importlib.import_module(name))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                lengths.append(len(ast.get_docstring(node) or "") // 4)  # as many tokens, about
    # Sixteen times, or the empty rows of the last batch would decide.
    lengths = [length for length in lengths * 16 if 8 <= length <= 512]
    tokens = [np.full(length, 7, np.int32) for length in lengths]
    examples = Examples(tokens, tokens, [f"x:{i}" for i in range(len(tokens))])
    assert filled(examples, batch_size=8, length=512) > 0.97


def test_packing_fills_rows_of_lengths_from_a_log_normal_distribution():
    lengths = np.exp(np.random.default_rng(0).normal(np.log(300), 0.8, 5000)).astype(int)
    tokens = [np.full(length, 7, np.int32) for length in np.clip(lengths, 2, 1024)]
    examples = Examples(tokens, tokens, [f"x:{i}" for i in range(len(tokens))])
    assert filled(examples, batch_size=8, length=1024) > 0.96
    assert filled(examples, batch_size=8, length=1024, shuffle=False) > 0.94


def test_every_epoch_is_a_new_order_of_all_examples():
    examples = make(30)

    def epochs(seed, count=4):
        stream = contents(take(loader(examples, packing=False, seed=seed), 10 * count))
        return [tuple(stream[i : i + 30]) for i in range(0, 30 * count, 30)]

    ours = epochs(0)
    assert all(sorted(epoch) == sorted(expected(examples)) for epoch in ours)
    assert len({*ours, tuple(expected(examples))}) == 5
    assert epochs(0) == ours
    assert not set(epochs(1)) & set(ours)
    assert not set(epochs(2**40)) & set(ours)


@pytest.mark.parametrize(("packing", "shuffle"), ORDERS)
def test_a_stream_resumes_bitwise_after_every_batch(packing, shuffle):
    examples = make(50, longest=LENGTH // 2)  # rows are filled 8 or more at a time

    def fresh():
        return loader(examples, packing=packing, shuffle=shuffle)

    unbroken = take(fresh(), 40)
    stream = fresh()
    for done in range(30):
        state = json.loads(json.dumps(stream.state()))
        resumed = fresh()
        resumed.restore(state)
        assert_same(take(resumed, 10), unbroken[done : done + 10])
        assert_same([next(stream)], [unbroken[done]])


def test_a_resumed_stream_can_be_resumed_and_a_used_one_rewound():
    examples = make(50)
    unbroken = take(loader(examples), 20)
    stream = loader(examples)
    start = stream.state()
    take(stream, 7)
    first = loader(examples)
    first.restore(stream.state())
    take(first, 5)
    second = loader(examples)
    second.restore(first.state())
    assert_same(take(second, 8), unbroken[12:])
    second.restore(start)
    assert_same(take(second, 20), unbroken)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 4}, "batch_size was 3 and is 4"),
        ({"length": 32}, "length was 24 and is 32"),
        ({"packing": False}, "packing was True and is False"),
        ({"shuffle": False, "seed": 2}, "shuffle was True and is False; seed was 0 and is 2"),
    ],
)
def test_a_state_of_other_settings_is_refused(changed, message):
    examples = make(9)
    stream = loader(examples)
    next(stream)
    with pytest.raises(JaxtuneError, match=message):
        loader(examples, **changed).restore(json.loads(json.dumps(stream.state())))


def test_a_state_of_other_data_is_refused():
    with pytest.raises(JaxtuneError, match=r"data was [0-9a-f]{12}… and is [0-9a-f]{12}…"):
        loader(make(9, seed=1)).restore(loader(make(9)).state())


@pytest.mark.parametrize(
    "damage",
    [{}, {"made_from": 1}, {"pass": None}, {"pass": -1}, {"step": True}, {"step": 99}],
)
def test_a_damaged_state_is_refused(damage):
    stream = loader(make(9))
    state = stream.state() | damage if damage else {}
    with pytest.raises(JaxtuneError, match="position in the data is damaged"):
        stream.restore(state)


def test_a_state_of_another_version_is_refused():
    """Up to now states had an iterator of their own."""
    stream = loader(make(9))
    state = {"made_from": stream.state()["made_from"], "iterator": {"next_index_in_buffer": 3}}
    with pytest.raises(JaxtuneError, match="a version of jaxtune that orders") as error:
        stream.restore(state)
    assert "\n" not in str(error.value)


def test_rows_too_short_and_no_examples_are_refused():
    examples = make(9)
    longest = max(len(tokens) for tokens in examples.tokens)
    with pytest.raises(JaxtuneError, match=r"rows.jsonl:\d+: \d+ tokens do not fit into a row of"):
        loader(examples, length=longest - 1)
    with pytest.raises(JaxtuneError, match="do not fit"):
        eval_batches(examples, batch_size=2, length=longest - 1, packing=True)
    with pytest.raises(JaxtuneError, match="no examples"):
        loader(Examples([], [], []))


@pytest.mark.parametrize("packing", [True, False])
def test_room_is_reserved_at_the_head_of_every_example(packing):
    examples, reserved = make(17), 5
    settings = {"packing": packing, "reserved": reserved}
    batches = list(eval_batches(examples, batch_size=3, length=LENGTH, **settings))
    stream = take(loader(examples, shuffle=False, **settings), 1)
    for batch in (*batches, *stream):
        assert batch["tokens"].shape == (3, LENGTH + reserved)
        heads = (batch["positions"] < reserved) & (batch["segment_ids"] != 0)
        assert np.all(batch["tokens"][heads] == 0)
        assert np.all(batch["targets"][heads] == IGNORE)
    found = contents(batches)
    assert all(not any(tokens[:reserved]) for tokens, _ in found)
    without = [(tokens[reserved:], targets[reserved:]) for tokens, targets in found]
    assert sorted(without) == sorted(expected(examples))


def test_the_length_of_an_example_is_that_of_its_text():
    examples = make(3)
    longest = max(map(len, examples.tokens))
    list(eval_batches(examples, batch_size=2, length=longest, packing=True, reserved=9))
    with pytest.raises(JaxtuneError, match=f"do not fit into a row of {longest - 1}"):
        eval_batches(examples, batch_size=2, length=longest - 1, packing=True, reserved=9)
