"""The tables in the documentation are those that the benchmarks print."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_trained_shares_is_what_the_benchmark_prints():
    script = ROOT / "benchmarks" / "trainable_shares.py"
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert ran.stdout.count("\n") > 20
    assert ran.stdout in (ROOT / "docs" / "methods" / "shares.md").read_text(encoding="utf-8")
