"""Runs that are killed at random moments end like one that is not."""

import os
import time

import pytest
from killing import EVALUATING, SAVING, Killer, comparable

# One hundred with `make test-kills`.
KILLS = 100 if os.environ.get("JAXTUNE_TEST_FULL") else 10
SEED = int(os.environ.get("JAXTUNE_TEST_SEED", "0"))


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_bit_for_bit_like_one_that_is_not(
    server, plain_config, tmp_path
):
    """The same losses, batches, skipped steps, scores, answers and adapters."""
    killer = Killer(server, plain_config, tmp_path, SEED)
    killer.check_order()
    skipped = {line.get("skipped") for line in comparable(killer.unbroken)}
    assert skipped == {None, "not finite", "spike"}
    begin = time.monotonic()
    killer.kill(KILLS)
    took = time.monotonic() - begin
    print(f"\n{KILLS} kills with seed {SEED} in {took:.0f} s: {dict(killer.counts)}")
    assert sum(killer.counts.values()) == KILLS
    assert killer.counts.keys() >= {SAVING, EVALUATING}
