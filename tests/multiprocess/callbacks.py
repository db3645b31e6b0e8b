"""Trains in one of several processes; process 0 alone asks to stop after its fourth step."""

import json
import os
import sys
from pathlib import Path

sys.modules["torch"] = None  # type: ignore[assignment]  # as on a machine with jaxtune alone

import jaxtune  # noqa: E402
from jaxtune.parallel import processes  # noqa: E402


class Stopping(jaxtune.Callback):
    def __init__(self):
        self.events = []

    def on_step(self, event):
        self.events.append(["step", event.step, event.metrics["loss"]])
        if event.step == 4 and processes.leads():
            event.stop()

    def on_checkpoint(self, event):
        self.events.append(["checkpoint", event.step, 0])

    def on_end(self, event):
        self.events.append(["end", event.step, event.metrics["loss"]])


processes.initialize(processes.find_addresses(None, None, None, os.environ))
config, rows, workdir, events = json.loads(sys.argv[1])
callback = Stopping()
jaxtune.train(config, workdir, train_data=rows, callbacks=[callback])
Path(f"{events}-{processes.jax.process_index()}.json").write_text(json.dumps(callback.events))
