"""One of two processes that continue from another run; process 1 or process 0 is late.

Process 0 chooses the checkpoint although process 1 has seen an older one, and process 1 asks for
the expert scores when process 0 has written them.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from jaxtune.config import resolve
from jaxtune.parallel import processes
from jaxtune.runs.directory import RunDirectory
from jaxtune.training import train


def main(source, workdir, result):
    config = resolve({"training": {"continue_from": source}})
    if processes.leads():
        time.sleep(2)
        later = Path(source, "checkpoints", "20")
        later.mkdir()
        (later / "manifest.json").write_text("{}")
    run = RunDirectory(workdir)
    with run.start(config) as config:
        if not processes.leads():
            time.sleep(2)
        scores = train._expert_scores(run, config, None, None)  # type: ignore[arg-type]
        processes.barrier("the scores are read")
    chosen = Path(config.training.continue_from).name
    Path(f"{result}-{processes.jax.process_index()}.json").write_text(
        json.dumps([chosen, scores.to_json()])
    )


processes.initialize(processes.find_addresses(None, None, None, os.environ))
try:
    main(*sys.argv[1:])
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # without waiting for the other process
