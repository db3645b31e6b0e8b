"""One config on any number of devices: recipes, and the launches that the documentation shows.

Run as a program, this file takes first steps of tiny models on some of the devices that there are.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# Mixtures of experts; the other recipes train dense models, of which one stands for all.
MIXTURES = {
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {}),
}
OVERRIDES = ["training.dtype=float32", "data.max_length=32"]


def commands(page):
    """Returns the commands in the code blocks of a page, without continuation lines."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def launches(page):
    """Yields the config and the number of devices of every launch on a page."""
    chips = 0
    for line in commands(page):
        words = shlex.split(line, comments=True)
        options = dict(re.findall(r"--([\w-]+)[ =](\S+)", line))
        if "type" in options:  # creates the slice of the commands that follow
            chips = int(options["type"].rpartition("-")[2])
        if options.get("config", "FILE") == "FILE" or {"plan", "export", "data"} & set(words):
            continue
        if "launch/slurm/train.sbatch" in words:
            yield options["config"], int(options["nodes"]) * int(options["gpus-per-node"])
        elif "launch/local.py" in words:
            yield options["config"], int(options["processes"])
        elif "$pod" in words:
            yield options["config"], chips
        elif words[:2] == ["jaxtune", "train"]:
            yield options["config"], 1


LAUNCHES = sorted({launch for page in PAGES for launch in launches(page)})


def take_first_step(case):
    """Returns loss and gradient norm of the first step of a case on its devices."""
    import jax
    import numpy as np

    from jaxtune.checkpoints.load_model import load_model
    from jaxtune.checkpoints.open_model import open_model
    from jaxtune.config import load_file, resolve
    from jaxtune.parallel.processes import put
    from jaxtune.training.setup import set_up
    from jaxtune.training.step import CompiledStep
    from jaxtune.training.train import choose_method

    config = resolve(load_file(case["config"]), case["overrides"])
    source = open_model(config.model.path, "").source
    method, _ = choose_method(config.adapter)
    setup = set_up(config, source.config, method, jax.devices()[: case["devices"]])
    model = load_model(
        source, "float32", setup.mesh, method=method, quantization=setup.quantization
    )
    draw, shape = np.random.default_rng(0), (config.training.batch_size, config.data.max_length)
    tokens = draw.integers(3, source.config["vocab_size"], shape, dtype=np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=1)}
    batch["segment_ids"] = np.ones_like(tokens)
    batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    like = setup.definition.abstract("constants", setup.mesh)
    constants = jax.tree.map(lambda x, like: put(x, like.sharding), model.constants, like)
    with jax.set_mesh(setup.mesh):
        step = CompiledStep(setup.train_step(), model.base, constants, setup.put_batch)
        _, metrics = step(setup.initial_state(model.trainable), batch)
    return {name: float(metrics[name]) for name in ("loss", "grad_norm", "tokens")}


@pytest.fixture(scope="module")
def first_steps(tiny, families, tmp_path_factory):
    """The first step of every recipe on one device and on eight, and of the documented launches."""
    models = {name: families(kind, **changes) for name, (kind, changes) in MIXTURES.items()}
    dense = tiny("llama", num_hidden_layers=2, num_key_value_heads=4)
    starts = [(f"configs/{name}.py", count) for name in RECIPES for count in (1, 8)]
    cases = list(dict.fromkeys([*starts, *LAUNCHES]))
    content = [
        {
            "config": str(ROOT / config),
            "devices": devices,
            "overrides": [*OVERRIDES, f"model.path={models.get(Path(config).stem, dense)}"],
        }
        for config, devices in cases
    ]
    directory = tmp_path_factory.mktemp("first_steps")
    (directory / "cases.json").write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(max(devices for _, devices in cases)),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(cases, json.loads((directory / "steps.json").read_text()), strict=True))


def test_the_launches_are_found():
    assert {
        ("configs/deepseek_llm_7b.py", 32),  # SLURM, 4 nodes of 8
        ("configs/deepseek_llm_7b.py", 16),  # v5litepod-16
        ("configs/quickstart.py", 2),
        ("configs/quickstart.py", 1),
    } <= set(LAUNCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_first_step_of_a_recipe_is_the_same_on_one_device_and_on_eight(first_steps, name):
    one, eight = (first_steps[f"configs/{name}.py", count] for count in (1, 8))
    assert eight["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert eight["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)  # a sum over rows
    assert eight["tokens"] == one["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("config, devices", LAUNCHES)
def test_a_documented_launch_takes_its_first_step(first_steps, config, devices):
    assert math.isfinite(first_steps[config, devices]["loss"])
    alone = first_steps[config, 1]["loss"]
    assert first_steps[config, devices]["loss"] == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
def test_a_run_resumes_on_other_devices(tiny, tmp_path):
    """A mesh of a config file shrinks when the run is resumed, and the losses stay the same."""
    rows = [{"input_ids": [3 + i, 9, 5, 7 + i], "labels": [3 + i, 9, 5, 7 + i]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny("llama", num_hidden_layers=2, num_key_value_heads=4)
    (tmp_path / "run.py").write_text(
        "from jaxtune import config\n\n"
        "def get_config():\n"
        "    c = config.default()\n"
        f"    c.model.path = {str(model)!r}\n"
        f"    c.data.train = {str(tmp_path / 'rows.jsonl')!r}\n"
        f"    c.data.eval = {str(tmp_path / 'rows.jsonl')!r}\n"
        "    c.data.max_length, c.data.packing, c.data.overlap = 8, False, 'keep'\n"
        "    c.evaluation.every, c.evaluation.batch_size = 2, 5  # in pieces, padded\n"
        "    c.training.batch_size, c.training.steps, c.training.dtype = 8, 4, 'float32'\n"
        "    c.optimizer.learning_rate, c.optimizer.schedule = 1e-2, 'constant'\n"
        "    c.logging.tensorboard, c.mesh.fsdp = False, 4\n"
        "    return c\n"
    )

    def train(name, devices, *options):
        done = subprocess.run(
            [sys.executable, "-m", "jaxtune", "train", "--workdir", tmp_path / name, *options],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        config = json.loads((tmp_path / name / "config.json").read_text())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines += (tmp_path / name / "evaluations.jsonl").read_text().splitlines()
        return done.stderr, config, [json.loads(line)["loss"] for line in lines]

    start = ("--config", tmp_path / "run.py")
    _, _, expected = train("alone", 1, *start)
    _, config, _ = train("moved", 4, *start, "--config.training.steps=2")
    assert (config["mesh"]["data"], config["mesh"]["fsdp"]) == (1, 4)
    log, config, losses = train("moved", 6, "--config.training.steps=4")
    assert (config["mesh"]["data"], config["mesh"]["fsdp"]) == (2, 3)
    assert config["derived"]["devices"] == 6 and config["derived"]["requested"]["mesh.fsdp"] == 4
    assert "the run was fitted to 4 × cpu and continues on 6 × cpu" in log
    assert "training.batch_size=8 does not fill 6 devices: 33% of each step is padding" in log
    assert losses == pytest.approx(expected, rel=1e-5)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    steps = [take_first_step(case) for case in json.loads((here / "cases.json").read_text())]
    (here / "steps.json").write_text(json.dumps(steps))
