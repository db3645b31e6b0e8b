"""Kills of runs at random moments, and what must be the same afterwards."""

from __future__ import annotations

import collections
import itertools
import json
import random
import re
import shutil
import time
from pathlib import Path

EPOCHS, STEPS, EVERY = 12, 60, 9
# Dropout, noise, shuffling, packing, spikes and the best score all have a state to lose.
FLAGS = (
    f"--config.training.epochs={EPOCHS}",
    "--config.checkpoint.every=2",
    f"--config.evaluation.every={EVERY}",
    "--config.evaluation.generate=4",
    "--config.adapter.dropout=0.1",
    "--config.training.accumulation=2",
    "--config.training.neftune_alpha=5",
    "--config.training.spike_factor=1.15",
    f"--config.training.max_bad_steps={STEPS}",
    "--config.logging.tensorboard=false",
)
# When a process is killed: before its first step, at any time after it, while files of a checkpoint
# exist that is not complete, and between a step and the end of its evaluation.
BEFORE, LATER, SAVING, EVALUATING = MOMENTS = (
    "before the first step",
    "in the loop",
    "during a save",
    "during an evaluation",
)


def comparable(workdir, name="metrics.jsonl"):
    """Returns the lines without what a clock has measured; ``batch`` is a hash of the data."""
    path = Path(workdir) / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    clocked = ("tokens_per_second", "data_wait")
    return [{k: v for k, v in entry.items() if k not in clocked} for entry in entries]


def checkpoints(workdir):
    """Returns the numbers of the complete and of the other checkpoints."""
    complete, partial = set(), set()
    for step in (Path(workdir) / "checkpoints").glob("[0-9]*"):
        # A step that is being deleted loses its manifest first, and is older than complete ones.
        (complete if (step / "manifest.json").exists() else partial).add(int(step.name))
    return complete, {step for step in partial if step > max(complete, default=0)}


def steps_logged(workdir):
    """Returns the number of lines of the log of a run."""
    path = Path(workdir) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def evaluating(workdir):
    """Returns whether a step is done whose evaluation is not."""
    return steps_logged(workdir) // EVERY > len(comparable(workdir, "evaluations.jsonl"))


class Killer:
    """Starts a run again and again, and kills it each time.

    Attributes:
      unbroken: directory of the run that is not killed.
      counts: number of kills by the moment at which they came.
    """

    def __init__(self, server, config, directory, seed):
        self._server, self._config = server, config
        self._directory = Path(directory)
        self._random = random.Random(seed)
        self.counts = collections.Counter()
        self.unbroken = self._directory / "unbroken"
        # A cache that is empty, beside one that is warm from the second start on.
        cold = {"JAX_COMPILATION_CACHE_DIR": str(self._directory / "cold")}
        self._finish(self._start(self.unbroken, cold))
        begin = time.monotonic()
        process = self._start(self._directory / "warm")
        process.until(lambda: steps_logged(self._directory / "warm"))
        self._span = time.monotonic() - begin  # seconds from the start to the first step
        process.kill()

    def _start(self, workdir, environ=None):
        """Starts a run, or resumes it. Some losses of it are NaN, and there are spikes."""
        command = ("train", "--config", self._config, *FLAGS, "--workdir", workdir)
        return self._server.start(*command, fault="nan_losses", environ=environ)

    @staticmethod
    def _finish(process):
        assert process.wait() == 0, process.output()

    def kill(self, count):
        """Kills runs until there have been `count` kills, and compares each run that ends."""
        moments = (list(MOMENTS) * count)[:count]
        self._random.shuffle(moments)
        number = 0
        while moments:
            workdir = self._directory / f"run-{number}"
            number += 1
            while moments and self._start_and_kill(workdir, moments[-1]):
                moments.pop()
            if steps_logged(workdir) < STEPS or not checkpoints(workdir)[0] >= {STEPS}:
                self._finish(self._start(workdir))
            self._compare(workdir)
            shutil.rmtree(workdir)

    def _start_and_kill(self, workdir, moment):
        """Returns whether a process was killed before its end."""
        complete, partial = checkpoints(workdir)
        before = steps_logged(workdir)
        process = self._start(workdir)
        if moment == BEFORE:
            self._wait(process, self._random.uniform(0, self._span))
        elif moment == LATER:
            self._until(process, lambda: steps_logged(workdir) > before)
            self._wait(process, self._random.uniform(0, 0.4))
        elif moment == SAVING:
            self._until(process, lambda: checkpoints(workdir)[1] - partial)
            self._wait(process, self._random.uniform(0, 0.02))
        else:
            self._until(process, lambda: steps_logged(workdir) > before and evaluating(workdir))
            self._wait(process, self._random.uniform(0, 0.02))
        killed = process.poll() is None
        if killed:
            process.kill()
            self.counts[self._moment(workdir, before, partial)] += 1
        else:
            assert process.returncode == 0, process.output()
        if not killed or steps_logged(workdir) > before:
            self._check_start(process.output(), complete, partial)
        return killed

    @staticmethod
    def _moment(workdir, before, partial):
        """Returns when a process was killed."""
        if checkpoints(workdir)[1] - partial:
            return SAVING
        if steps_logged(workdir) <= before:
            return BEFORE
        return EVALUATING if evaluating(workdir) else LATER

    @staticmethod
    def _check_start(output, complete, partial):
        """Checks that a process resumed after the newest complete step, and moved the others."""
        resumed = re.search(r"resuming after step (\d+)", output)
        assert (int(resumed[1]) if resumed else 0) == max(complete, default=0), output
        for step in partial:
            assert re.search(rf"checkpoints/{step}: unfinished.*moved to", output), output

    def _wait(self, process, seconds):
        end = time.monotonic() + seconds
        self._until(process, lambda: time.monotonic() >= end)

    @staticmethod
    def _until(process, condition):
        """Waits for a condition or for the end of the process."""
        while process.poll() is None and not condition():
            time.sleep(0.0005)

    def _compare(self, workdir):
        """Compares a run that has ended with the one that was never killed."""
        for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
            assert comparable(workdir, name) == comparable(self.unbroken, name)
        for name in ("last", "best"):
            ours, theirs = (
                (path / "adapter" / name / "adapter_model.safetensors").read_bytes()
                for path in (workdir, self.unbroken)
            )
            assert ours == theirs
        left = {path.name for path in (workdir / "checkpoints").iterdir()} - {"quarantine"}
        assert left == {str(STEPS - 2), str(STEPS)}

    def check_order(self):
        """Checks that a run shows each row once per pass, in the order of `data order`."""
        output = self._server.run("data", "order", "--config", self._config, *FLAGS)
        shown = [json.loads(line)["rows"] for line in output.splitlines() if line[0] == "{"]
        rows = itertools.chain(*shown)
        assert collections.Counter(rows) == dict.fromkeys(range(40), EPOCHS)
        metrics = comparable(self.unbroken)
        assert [line["rows"] for line in metrics] == [*itertools.accumulate(map(len, shown))]
        assert len({line["batch"] for line in metrics}) > STEPS // 2
        assert len(metrics) == STEPS
