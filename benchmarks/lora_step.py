"""Compares the speed and memory of a LoRA step of SmolLM2-135M in jaxtune and in PEFT on torch.

    python benchmarks/lora_step.py [--steps 6] [--rounds 2] [--batch 4] [--length 256]

Both train factors of the same rank on the same modules and random tokens, with AdamW and clipping.
The programs run alternately, in separate processes, so that changes in the speed of the machine
affect both. Each runs in float32 and in bfloat16, and the better result of each is compared. On a
CPU, only the ratios are meaningful. Requires `make install`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RANK, ALPHA, TARGETS = 16, 32, ["q_proj", "k_proj", "v_proj", "o_proj"]
SIDES = ("jaxtune-bfloat16", "jaxtune-float32", "peft-float32", "peft-bfloat16")


class PeakMemory:
    """The peak anonymous memory of this process within the block, in MiB, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(0.005):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) / 1024)


def tokens(batch: int, length: int):
    """Returns random token ids, int64[batch, length]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 49152, (batch, length))


def run_jaxtune(checkpoint: str, dtype: str, options: argparse.Namespace) -> dict:
    """Measures jaxtune: seconds per step, peak memory in MiB, losses, seconds of compilation."""
    import jax
    import numpy as np

    from jaxtune import config as config_module
    from jaxtune.adapters import method_from_config
    from jaxtune.checkpoints.huggingface import open_source
    from jaxtune.checkpoints.load_model import load_model
    from jaxtune.training.setup import set_up
    from jaxtune.training.step import CompiledStep

    batch, length = options.batch, options.length
    config = config_module.resolve(
        {
            "adapter": {"rank": RANK, "alpha": float(ALPHA), "targets": tuple(TARGETS)},
            "data": {"max_length": length},
            "training": {
                "batch_size": batch,
                "accumulation": 1,
                "dtype": dtype,
                "remat": options.remat,
            },
        }
    )
    source = open_source(Path(checkpoint))
    method = method_from_config(config.adapter)
    setup = set_up(config, source.config, method)
    parts = load_model(source, dtype, setup.mesh, method=method)
    ids = tokens(batch, length).astype(np.int32)
    targets = np.concatenate([ids[:, 1:], np.full((batch, 1), -100, np.int32)], axis=1)
    arrays = {
        "tokens": ids,
        "targets": targets,
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape),
    }
    with jax.set_mesh(setup.mesh):
        state = setup.initial_state(parts.trainable)
        step = CompiledStep(setup.train_step(), parts.base, parts.constants, setup.put_batch)
        begin = time.monotonic()
        state, metrics = step(state, arrays)
        losses = [float(metrics["loss"])]
        compiled = time.monotonic() - begin
        seconds = []
        with PeakMemory() as memory:
            for _ in range(options.steps):
                begin = time.monotonic()
                state, metrics = step(state, arrays)
                losses.append(float(metrics["loss"]))
                seconds.append(time.monotonic() - begin)
    return {"seconds": seconds, "peak": memory.peak, "losses": losses, "compile": compiled}


def run_peft(checkpoint: str, dtype: str, options: argparse.Namespace) -> dict:
    """Measures PEFT on torch; the results are those of `run_jaxtune`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.tensor(tokens(options.batch, options.length))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    losses, seconds = [step()], []
    with PeakMemory() as memory:
        for _ in range(options.steps):
            begin = time.monotonic()
            losses.append(step())
            seconds.append(time.monotonic() - begin)
    return {"seconds": seconds, "peak": memory.peak, "losses": losses, "compile": 0.0}


def spawn(side: str, checkpoint: str, options: argparse.Namespace) -> dict:
    """Runs one program in a separate process and returns its measurements."""
    command = [sys.executable, __file__, "--side", side, "--checkpoint", checkpoint]
    for name in ("batch", "length", "steps", "remat"):
        command += [f"--{name}", str(getattr(options, name))]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Runs all programs alternately and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--side", choices=SIDES, help="run one program only and print JSON")
    parser.add_argument("--checkpoint", default="")
    options = parser.parse_args()
    if options.side:
        program, dtype = options.side.split("-")
        run = {"jaxtune": run_jaxtune, "peft": run_peft}[program]
        measured = run(options.checkpoint, dtype, options)
        print(json.dumps(measured))
        return

    import jaxtune
    from jaxtune.config import load_file

    quickstart = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"

    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = f"{scratch}/smollm2"
        jaxtune.load(load_file(quickstart).model.path).save_pretrained(checkpoint)
        for _ in range(options.rounds):
            for side in SIDES:
                results[side].append(spawn(side, checkpoint, options))
    report(results, options.batch * options.length)


def report(results: dict[str, list[dict]], tokens_per_step: int) -> None:
    """Prints a row for each program and dtype, and the ratios."""
    print(f"{'':<18}{'s/step':>9}{'tokens/s':>10}{'peak MiB':>10}{'compile s':>11}{'loss':>9}")
    speed, memory = {}, {}
    for side, runs in results.items():
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        speed[side], memory[side] = tokens_per_step / seconds, max(run["peak"] for run in runs)
        print(
            f"{side:<18}{seconds:>9.2f}{speed[side]:>10.0f}{memory[side]:>10.0f}"
            f"{runs[0]['compile']:>11.1f}{runs[0]['losses'][-1]:>9.4f}"
        )
    ours, theirs = ([s for s in SIDES if s.startswith(p)] for p in ("jaxtune", "peft"))
    fastest = [max(sides, key=speed.__getitem__) for sides in (ours, theirs)]
    leanest = [min(sides, key=memory.__getitem__) for sides in (ours, theirs)]
    print(f"speed:  {' / '.join(fastest)} = {speed[fastest[0]] / speed[fastest[1]]:.2f}")
    print(f"memory: {' / '.join(leanest)} = {memory[leanest[0]] / memory[leanest[1]]:.2f}")


if __name__ == "__main__":
    main()
