"""Faults that a process injects into itself before it runs a command; `Server.start` names one."""

from __future__ import annotations


def nan_losses():
    """Makes the loss NaN in each batch of training with the row whose question is ``b17``."""
    import jax.numpy as jnp
    from tokenizers import pre_tokenizers

    from jaxtune.training import setup

    plain = setup.sft_loss
    # The tokenizer of `tiny_chat` numbers the bytes in this order.
    one, seven = map(sorted(pre_tokenizers.ByteLevel.alphabet()).index, "17")

    def poisoned(model, batch, options, key, *arguments, **options_of_loss):
        sums = plain(model, batch, options, key, *arguments, **options_of_loss)
        tokens = batch["tokens"]
        found = ((tokens[:, :-1] == one) & (tokens[:, 1:] == seven)).any()
        # Evaluations have no key.
        factor = jnp.where(found & (key is not None), jnp.nan, 1.0)
        return sums._replace(loss=sums.loss * factor, nll=sums.nll * factor)

    setup.sft_loss = poisoned


def stalled_save():
    """Makes the file system wait for ever when step 4 is saved: a file of it becomes a pipe."""
    import os
    import sys

    def audit(event, arguments):
        # Called before the thread that completes a save opens the file, which then waits for a
        # reader of the pipe.
        if event == "open" and str(arguments[0]).endswith("/checkpoints/4/.extra.json.partial"):
            os.mkfifo(arguments[0])

    sys.addaudithook(audit)


def stalled_export():
    """Makes the file system wait for ever when the adapter is exported for the second time."""
    import os
    import sys

    seen = []

    def audit(event, arguments):
        name = "/adapter/.last.partial/adapter_config.json"
        if event == "open" and str(arguments[0]).endswith(name):
            seen.append(name)
            if len(seen) == 2:
                os.mkfifo(arguments[0])

    sys.addaudithook(audit)


def enlarged_disk():
    """Makes the disk at JAXTUNE_DISK, which is full, larger."""
    import os
    import subprocess

    mount = ["mount", "-o", "remount,size=64m", os.environ["JAXTUNE_DISK"]]
    subprocess.run(mount, check=True)


def hashed_state():
    """Prints a hash of the state that a resumed run restores, array by array, and ends it."""
    import hashlib

    import jax
    import numpy as np

    from jaxtune.parallel.processes import fetch
    from jaxtune.runs.checkpoints import Checkpoints

    plain = Checkpoints.restore

    def restored(self, step, like):
        state, _ = plain(self, step, like)
        leaves, _ = jax.tree_util.tree_flatten_with_path(fetch(state))
        content = hashlib.sha256()
        for path, leaf in leaves:
            array = np.asarray(leaf)
            content.update(f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}".encode())
            content.update(array.tobytes())
        print("state", step, len(leaves), content.hexdigest(), flush=True)
        raise KeyboardInterrupt

    Checkpoints.restore = restored


def slow_evaluation():
    """Makes each evaluation take longer than SIGTERM gives to a process with nothing to save."""
    import time

    from jaxtune.parallel.termination import GRACE_SECONDS
    from jaxtune.training.loop.actions import Actions

    plain = Actions._evaluate

    def evaluate(self, number, state):
        print("evaluating step", number, flush=True)
        time.sleep(GRACE_SECONDS + 1)
        return plain(self, number, state)

    Actions._evaluate = evaluate


def failing_save():
    """Raises an exception that is a bug, with everything that is local in its traceback."""
    from jaxtune.training.loop.actions import Actions

    def save(self, number, state):
        raise RuntimeError("a bug")

    Actions._save = save


def little_memory():
    """Limits the memory of the process when the first step begins to 300 MB more than it has."""
    import resource
    from pathlib import Path

    from jaxtune.training.step import CompiledStep

    plain = CompiledStep.__call__

    def step(self, state, batch):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300_000_000, hard))
        CompiledStep.__call__ = plain
        return plain(self, state, batch)

    CompiledStep.__call__ = step
