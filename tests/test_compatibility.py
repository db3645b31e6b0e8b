"""Newer releases of JAX and Flax: a warning, and a line for each missing private name."""

import logging
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from jaxtune.compatibility import TESTED, check_versions, newer_than_tested, private_module
from jaxtune.layers.attention_kernels import cudnn
from jaxtune.parallel.failures import distributed


@pytest.mark.parametrize(
    "installed, newer",
    [
        ({"jax": "0.10.2", "flax": "0.12.8"}, {}),
        ({"jax": "0.9.10", "flax": "0.12.8.dev1"}, {}),
        ({"jax": "0.10.10", "flax": "0.12.7"}, {"jax": "0.10.10"}),
        ({"jax": "1.0", "flax": "0.13.0rc1"}, {"jax": "1.0", "flax": "0.13.0rc1"}),
        ({"numpy": "9.9"}, {}),
    ],
)
def test_only_newer_releases_are_named(installed, newer):
    assert newer_than_tested(installed, {"jax": "0.10.2", "flax": "0.12.8"}) == newer


def test_the_oldest_versions_are_not_newer_than_the_tested_ones():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    oldest = dict(line.split(">=") for line in project["dependencies"] if ">=" in line)
    assert {"jax", "flax"} <= oldest.keys()
    assert newer_than_tested(oldest) == {}


def test_a_newer_release_is_logged_once(monkeypatch, caplog):
    monkeypatch.setitem(TESTED, "jax", "0.1.0")
    check_versions.cache_clear()
    for _ in range(2):
        check_versions()
    check_versions.cache_clear()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"jax {version('jax')}: newer than the tested versions (jax 0.1.0)"
    assert caplog.records[0].levelno == logging.WARNING


def test_this_jax_has_the_private_names_that_are_used():
    assert cudnn() is not None
    assert distributed() is not None


@pytest.mark.parametrize(
    "module, names, missing",
    [
        ("jax._src.no_such_module", ("x",), "jax._src.no_such_module"),
        ("jax._src.distributed", ("global_state", "gone"), "jax._src.distributed.gone"),
    ],
)
def test_a_missing_private_name_is_logged_once_with_its_consequence(module, names, missing, caplog):
    for _ in range(2):
        assert private_module(module, names, "a feature is slower") is None
    (line,) = [record.getMessage() for record in caplog.records]
    expected = f"jax {version('jax')} has no {missing} (a private name): a feature is slower"
    assert line == expected


def test_versions_are_checked_where_devices_are_used_and_not_for_help():
    program = (
        "import jaxtune.compatibility as c\n"
        "from jaxtune.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert c.check_versions.cache_info().currsize == 0\n"
        "from jaxtune.parallel.mesh import single_device_mesh\n"
        "single_device_mesh()\n"
        "assert c.check_versions.cache_info().currsize == 1\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
