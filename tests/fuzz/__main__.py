"""Runs generated malformed inputs: ``python -m tests.fuzz --seed 5 --cases 1000 --kind runs``.

An input is one line on standard error and exit code 65, or is accepted; a traceback, another exit
code, more than 20 s, more than 1 GB of memory, a file outside its directory or executed code fails.
Inputs depend only on seed, kind and number. Those that fail are kept.
"""

import argparse
import collections
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import server
from kinds import KINDS, controls


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100, help="number of inputs of all kinds")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one input of the kind")
    parser.add_argument("--root", type=Path, help="directory of inputs and compiled functions")
    parser.add_argument("--verbose", action="store_true", help="print every input and its output")
    return parser.parse_args()


def _numbers(kinds, cases):
    """Yields kind and number of each input; kinds alternate according to their shares."""
    total = sum(KINDS[kind][1] for kind in kinds)
    due = dict.fromkeys(kinds, 0.0)
    counts = collections.Counter()
    for _ in range(cases):
        for kind in kinds:
            due[kind] += KINDS[kind][1] / total
        kind = max(due, key=lambda kind: due[kind])
        due[kind] -= 1
        yield kind, counts[kind]
        counts[kind] += 1


def _prepare(root):
    """Returns the directory of well-formed files, after checking that each of them is accepted."""
    seeds = root / "seeds"
    if not seeds.is_dir():
        program = [sys.executable, str(Path(__file__).with_name("seeds.py")), str(seeds)]
        subprocess.run(program, check=True, capture_output=True, timeout=300)
    server.warm_up(root / "cache")
    for number, case in enumerate(controls(seeds)):
        directory = root / f"control-{number}"
        directory.mkdir(exist_ok=True)
        outcome = server.run(case, directory, root, root / "marker")
        assert outcome.verdict == "accepted", f"{case.about}: {outcome.output}"
        shutil.rmtree(directory)
    return seeds


def main():
    """Runs the inputs and prints a table; the exit code is 1 if one failed."""
    arguments = _arguments()
    root = arguments.root or Path(tempfile.mkdtemp(prefix="jaxtune-fuzz-"))
    root.mkdir(parents=True, exist_ok=True)
    root = root.resolve()
    seeds = _prepare(root)
    chosen = arguments.kind or list(KINDS)
    numbers = list(_numbers(chosen, arguments.cases))
    if arguments.only is not None:
        numbers = [(kind, arguments.only) for kind in chosen]
    print(f"seed {arguments.seed}: {len(numbers)} inputs", flush=True)
    found = collections.defaultdict(list)
    begin = time.monotonic()
    for kind, number in numbers:
        directory = root / f"{kind}-{arguments.seed}-{number}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        rng = random.Random(f"{arguments.seed} {kind} {number}")
        case = KINDS[kind][0](rng, seeds, directory)
        outcome = server.run(case, directory, root, root / "marker")
        found[kind].append(outcome)
        if arguments.verbose or not outcome.passed:
            _describe(case, outcome, 12 if arguments.verbose else 3)
            how = f"--seed {arguments.seed} --kind {kind} --only {number} --verbose"
            print(f"  {directory}\n  python -m tests.fuzz {how}", flush=True)
        if outcome.passed:
            shutil.rmtree(directory)
    _summarize(found, time.monotonic() - begin)
    failed = any(not outcome.passed for outcomes in found.values() for outcome in outcomes)
    if arguments.root is None and not failed:
        shutil.rmtree(root)
    os._exit(int(failed))  # without waiting for threads of libraries


def _describe(case, outcome, lines):
    last = outcome.output.strip().splitlines()[-lines:]
    print(f"{outcome.verdict} ({outcome.seconds:.1f} s): {case.about!a:.300}")
    print("\n".join(f"  | {ascii(line)[1:-1]:.300}" for line in last))


def _summarize(found, seconds):
    columns = "{:<14} {:>6} {:>9} {:>9} {:>7} {:>6} {:>6}"
    print(columns.format("kind", "cases", "one line", "accepted", "failed", "s", "MiB"))
    for kind, outcomes in found.items():
        count = collections.Counter(outcome.verdict for outcome in outcomes)
        failed = len(outcomes) - count["refused"] - count["accepted"]
        slowest = max(outcome.seconds for outcome in outcomes)
        most = max(outcome.memory for outcome in outcomes) >> 20
        numbers = (len(outcomes), count["refused"], count["accepted"], failed)
        print(columns.format(kind, *numbers, f"{slowest:.1f}", most))
    print(f"{seconds:.0f} s; s and MiB are the largest of one input", flush=True)


if __name__ == "__main__":
    main()
