"""The README's memory table agrees with the compiler.

Without ``JAXTUNE_TEST_FULL``, which `make test-plans` sets, one row is compiled; of the others the
arrays that a step is given are counted, and what the README adds to them is bounded.
"""

import os
import re
from pathlib import Path

import pytest

from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.config import resolve
from jaxtune.demos.memory_table import DEEPSEEK_7B, ROWS_OF_TABLE, row_cells, row_config
from jaxtune.planning.arguments import step_arguments
from jaxtune.planning.topology import find_topology
from jaxtune.training.placement.memory import bytes_per_device
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

README = Path(__file__).parents[2] / "README.md"
FULL = "JAXTUNE_TEST_FULL" in os.environ
COMPILED = [row for row in ROWS_OF_TABLE if FULL or row.method.startswith("LoRA")]
# GB that the guide allows at most; full fine-tuning with float32 masters cannot meet its figure.
# P-Tuning of four rows at a time takes 16.1: a layer's input is kept for each of them.
MOST = {"LoRA, r = 8": 20, "P-Tuning, 20 tokens": 15, "QLoRA (NF4), r = 8": 15}


def written(row):
    """Returns the cells of a row of the README."""
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if row.method in line]
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def total(cells):
    """Returns the GB over all devices, from the cells of a row."""
    return float(re.match(r"[\d.]+", cells[2])[0])


@pytest.mark.parametrize("row", COMPILED, ids=lambda row: row.method)
def test_a_row_is_what_compiles_today(row):
    assert written(row) == row_cells(row)


@pytest.mark.parametrize("row", ROWS_OF_TABLE, ids=lambda row: row.method)
def test_a_row_is_within_what_the_guide_or_the_weights_allow(row):
    gigabytes = total(written(row))
    if row.method in MOST:
        assert gigabytes <= MOST[row.method]
    else:
        # With Adam 12 to 16 bytes for each of 6.9 billion weights, whatever activations take; with
        # Adafactor's factored moments 4 to 8.
        least, most = (83, 140) if row.optimizer == "adamw" else (28, 83)
        assert least <= gigabytes <= most


@pytest.mark.parametrize("row", ROWS_OF_TABLE, ids=lambda row: row.method)
def test_a_row_is_the_arrays_of_its_step_and_little_else(row):
    config, hardware = resolve(row_config(row)), find_topology(row.chips)
    setup = set_up(config, DEEPSEEK_7B, choose_method(config.adapter)[0], hardware.devices)
    _, published, _, published_share, share = cells = written(row)
    assert (published, published_share) == (row.published, row.published_share)
    trained = trained_share(parameter_summary(setup.definition))[2]
    assert share == ("100 %" if trained == 1 else f"{100 * trained:.2f} %")
    # Layers are computed anew in the backward pass, so the input of each is kept: 8 MiB. Where all
    # weights are trained, the rest is their gradients in float32 and the weights in bfloat16.
    resident = bytes_per_device(step_arguments(setup)) * hardware.count / 1e9
    least, most = (4 * 6.9, 7 * 6.9) if trained == 1 else (30 * 2**23 / 1e9, 1.2)
    assert least <= total(cells) - resident <= most
