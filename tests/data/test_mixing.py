"""Weights and noise: exact, a function of the seed, and resumable at every batch."""

from __future__ import annotations

import collections
import itertools
import json

import numpy as np
import pytest

from jaxtune.data import IGNORE, BatchLoader, Examples, SourceSlice
from jaxtune.errors import JaxtuneError

LENGTH = 12


def make(*parts):
    """Examples of parts ``(count, weight)``; every token says which example it is in."""
    total = sum(count for count, _ in parts)
    lengths = np.random.default_rng(0).integers(2, LENGTH // 2, total)
    return Examples(
        [np.full(n, 100 + i, np.int32) for i, n in enumerate(lengths)],
        [np.append(np.arange(n - 1), IGNORE).astype(np.int32) for n in lengths],
        [f"x:{i}" for i in range(total)],
        parts=tuple(SourceSlice(f"p{i}", "text", *part) for i, part in enumerate(parts)),
        special=(100,),
    )


def loader(examples, **settings):
    defaults = {"batch_size": 1, "length": LENGTH, "packing": False, "shuffle": True, "seed": 0}
    return BatchLoader(examples, **(defaults | settings))


def stream(examples, count, **settings):
    """Which examples come, one after the other."""
    batches = itertools.islice(loader(examples, **settings), count)
    return [int(batch["tokens"][0, 0]) - 100 for batch in batches]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_shows_each_source_by_its_weight(shuffle):
    parts = ((10, 2.0), (20, 0.25), (4, 1.0))
    examples, epoch = make(*parts), 20 + 5 + 4
    seen = stream(examples, 4 * epoch, shuffle=shuffle)
    for start in range(0, 4 * epoch, epoch):
        counts = collections.Counter(seen[start : start + epoch])
        assert [counts[i] for i in range(10)] == [2] * 10
        assert sum(counts[i] for i in range(10, 30)) == 5
        assert [counts[i] for i in range(30, 34)] == [1] * 4
    # Four quarters make a whole: every example of a part comes as often as any other.
    whole = collections.Counter(seen)
    assert [whole[i] for i in range(34)] == [8] * 10 + [1] * 20 + [4] * 4


def test_the_order_is_that_of_the_seed():
    examples = make((10, 1.5), (7, 0.5))
    assert stream(examples, 60) == stream(examples, 60)
    assert stream(examples, 60) != stream(examples, 60, seed=1)
    assert stream(examples, 60)[:18] != stream(examples, 60)[18:36]


def test_weights_of_one_change_nothing():
    plain, weighted = make((9, 1.0), (4, 1.0)), make((13, 1.0))
    assert stream(plain, 40) == stream(weighted, 40)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_mixture_resumes_bitwise_after_every_batch(packing, noise):
    examples = make((10, 2.0), (20, 0.25))

    def fresh():
        return loader(examples, packing=packing, batch_size=2, mask_tokens=noise)

    unbroken = list(itertools.islice(fresh(), 16))
    current = fresh()
    for done in range(9):
        if done in (0, 1, 4, 8):
            state = json.loads(json.dumps(current.state()))
            resumed = fresh()
            resumed.restore(state)
            for batch, expected in zip(resumed, unbroken[done : done + 8], strict=False):
                for name in expected:
                    np.testing.assert_array_equal(batch[name], expected[name])
        next(current)


def test_other_weights_and_noise_are_refused_on_resuming():
    state = json.loads(json.dumps(loader(make((10, 2.0), (5, 1.0))).state()))
    with pytest.raises(JaxtuneError, match=r"weights was \[2\.0, 1\.0\] and is \[3\.0, 1\.0\]"):
        loader(make((10, 3.0), (5, 1.0))).restore(state)
    with pytest.raises(JaxtuneError, match=r"mask_tokens was None and is 0\.1"):
        loader(make((10, 2.0), (5, 1.0)), mask_tokens=0.1).restore(state)
    noisy = loader(make((10, 1.0)), mask_tokens=0.1).state()
    with pytest.raises(JaxtuneError, match=r"mask_tokens was 0\.1 and is None"):
        loader(make((10, 1.0))).restore(noisy)


def test_noise_replaces_a_share_of_the_inputs_and_no_target():
    examples = make((150, 1.0))
    plain, noisy = (
        list(itertools.islice(loader(examples, mask_tokens=share), 300)) for share in (0.0, 0.25)
    )
    changed = total = 0
    for batch, other in zip(plain, noisy, strict=True):
        for name in ("targets", "segment_ids", "positions"):
            np.testing.assert_array_equal(batch[name], other[name])
        inside = (batch["segment_ids"] > 0) & (batch["tokens"] != 100)  # 100 is a special token
        differs = batch["tokens"] != other["tokens"]
        assert not differs[~inside].any()
        assert np.isin(other["tokens"][inside], np.arange(101, 250)).all()
        changed, total = changed + int(differs.sum()), total + int(inside.sum())
    assert 0.2 < changed / total < 0.3
    # The second epoch draws anew: the same example is not spoilt the same way.
    first, second = ({row["tokens"][0].tobytes() for row in noisy[i : i + 150]} for i in (0, 150))
    assert len(first & second) < 75


def test_nothing_but_special_tokens_cannot_be_drawn_from():
    examples = Examples([np.full(4, 7, np.int32)], [np.full(4, 7, np.int32)], ["x:1"], special=(7,))
    with pytest.raises(JaxtuneError, match="only special tokens"):
        loader(examples, mask_tokens=0.1)
