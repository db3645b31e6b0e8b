"""The README's memory table agrees with the compiler."""

import re
from pathlib import Path

import pytest

from jaxtune.demos.memory_table import ROWS_OF_TABLE, row_cells

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

README = Path(__file__).parents[2] / "README.md"
# GB that the guide allows at most; full fine-tuning with float32 masters cannot meet its figure.
# P-Tuning of four rows at a time takes 16.1: a layer's input is kept for each of them.
MOST = {"LoRA, r = 8": 20, "P-Tuning, 20 tokens": 15, "QLoRA (NF4), r = 8": 15}


@pytest.mark.parametrize("row", ROWS_OF_TABLE, ids=lambda row: row.method)
def test_a_row_is_what_compiles_today(row):
    found = row_cells(row)
    written = [
        line for line in README.read_text(encoding="utf-8").splitlines() if row.method in line
    ]
    assert [cell.strip() for cell in written[0].strip("|").split("|")] == found
    total = float(re.match(r"[\d.]+", found[2])[0])
    if row.method in MOST:
        assert total <= MOST[row.method]
    else:
        # With Adam 12 to 16 bytes for each of 6.9 billion weights, whatever activations take; with
        # Adafactor's factored moments 4 to 8.
        least, most = (83, 140) if row.optimizer == "adamw" else (28, 83)
        assert least <= total <= most
