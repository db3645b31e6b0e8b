"""Standard error has only what jaxtune writes, on a machine without a TPU and without torch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.environment import has_tpu, silence_unused


def _run(program, **changes):
    """Runs a program without the variables that the suite sets; returns its stderr."""
    hidden = ("JAX_PLATFORMS", "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith("TPU_")
    }
    done = subprocess.run(
        [sys.executable, *changes.pop("flags", ()), "-c", program],
        env=environment | changes,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or has_tpu({}, Path("/")),
    reason="needs libtpu and no TPU",
)
def test_libtpu_is_silent_without_a_tpu():
    devices = "import jax; print(jax.devices()[0].platform)"
    out, err = _run(f"import jaxtune; {devices}")
    assert (out, err) == ("cpu\n", "")
    # Without jaxtune, it is not.
    assert _run(devices)[1]


def test_transformers_is_silent_without_torch(tmp_path):
    # The packages of this environment except torch.
    import transformers

    for entry in Path(transformers.__file__).parents[1].iterdir():
        if not entry.name.startswith("torch") and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    import jaxtune

    paths = [str(Path(jaxtune.__file__).parents[1]), str(tmp_path)]
    options = {"flags": ["-S"], "PYTHONPATH": os.pathsep.join(paths)}
    program = "from transformers import AutoTokenizer"
    assert "PyTorch was not found" in _run(program, **options)[1]
    assert _run(f"import jaxtune; {program}", **options)[1] == ""


@pytest.mark.parametrize(
    ("files", "variables", "expected"),
    [
        ({}, {}, False),
        ({"dev/accel0": ""}, {}, True),
        ({"dev/vfio/0": ""}, {}, True),
        ({"dev/vfio/vfio": ""}, {}, False),
        ({"vendor": "0x1ae0\n", "device": "0x0063\n"}, {}, True),  # v5e
        ({"vendor": "0x1ae0\n", "device": "0x9999\n"}, {}, True),  # one that is not known yet
        ({"vendor": "0x1ae0\n", "device": "0x0042\n"}, {}, False),  # a network card
        ({"vendor": "0x8086\n", "device": "0x0063\n"}, {}, False),
        ({}, {"TPU_NAME": "mine"}, True),
        ({}, {"JAX_PLATFORMS": "tpu,cpu"}, True),
        ({}, {"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_nothing_is_set_where_there_may_be_a_tpu(tmp_path, files, variables, expected):
    for name, content in files.items():
        slot = "sys/bus/pci/devices/0000:00:04.0/" if name in ("vendor", "device") else ""
        path = tmp_path / f"{slot}{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert has_tpu(variables, tmp_path) == expected
    changed = dict(variables)
    silence_unused(changed, tmp_path)
    assert ("TPU_WORKER_HOSTNAMES" in changed) == (not expected)


def test_what_the_user_sets_stays(tmp_path):
    changed = {"TPU_ACCELERATOR_TYPE": "v4-8"}
    silence_unused(changed, tmp_path)
    assert changed["TPU_ACCELERATOR_TYPE"] == "v4-8"
