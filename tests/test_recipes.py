"""The ready-made configs: their documented settings, and that they train."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.adapter_files import refused_exports
from jaxtune.adapters.define import define
from jaxtune.config import load_file, resolve
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.devices import TPUS, DeviceGroup
from jaxtune.planning.arguments import step_arguments
from jaxtune.planning.topology import find_topology
from jaxtune.training.optimizer import make_schedule
from jaxtune.training.placement.memory import bytes_per_device
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).parent / "models" / "configs"
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "quickstart")
LENGTHENED = [*RECIPES, "quickstart"]
ONE_DEVICE = ["mesh.data=1", "mesh.fsdp=1", "mesh.expert=1"]
# The config.json of each checkpoint that a recipe trains.
CHECKPOINTS = {
    "deepseek-ai/deepseek-llm-7b-chat": "deepseek-llm-7b",
    "deepseek-ai/deepseek-coder-6.7b-instruct": "deepseek-coder-6.7b",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek-v2-lite",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "deepseek-r1-distill-qwen-7b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "deepseek-r1-distill-llama-8b",
}
# What the guide says of its recipes.
GUIDE = {
    "domain_expert": {
        "adapter.method": "lora",
        "adapter.rank": 16,
        "adapter.targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "optimizer.learning_rate": 1e-4,
    },
    "dialogue": {
        "adapter.method": "lora",
        "adapter.rank": 8,
        "adapter.alpha": 32.0,
        "training.remat": "full",
    },
    "low_resource": {
        "adapter.method": "lora",
        "adapter.rank": 4,
        "adapter.alpha": 8.0,
        "quantize.format": "nf4",
        "training.batch_size": 16,
    },
    "full": {
        "adapter.method": "full",
        "optimizer.learning_rate": 2e-5,
        "optimizer.warmup_steps": 100 / 2000,
        "training.batch_size": 4 * 8,
    },
}
EPOCHS = {"dialogue": (1, 2), "full": (3, 3), "quickstart": (0.7, 0.7)}
# Rows, rows per step and micro-batches of the runs below: no sample has as few rows.
ROWS, BATCH, MICRO_BATCHES = 8, 2, 2


def file_of(name):
    return ROOT / "configs" / f"{name}.py"


def read(name, overrides=()):
    return resolve(load_file(file_of(name)), overrides)


def model_config(config):
    return json.loads((MODELS / f"{CHECKPOINTS[config.model.path]}.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_can_be_set_up_with_it_on_any_number_of_devices(name):
    config = read(name)
    assert config.training.accumulation == 0, "derived from the devices"
    method, _ = choose_method(config.adapter)
    for devices in (1, 4, 8, 16, 32, 256, 512):
        group = DeviceGroup(devices, "v5p", "tpu", TPUS["v5p"].capacity_bytes)
        setup = set_up(config, model_config(config), method, group)
        assert jax.tree.leaves(setup.like.trainable)
        formats = {leaf.format.name for leaf in setup.definition.leaves.values() if leaf.format}
        assert formats == ({config.quantize.format} if config.quantize.format else set())
        split = setup.split
        assert setup.mesh.size == devices and split.padded_rows >= split.rows
        # Rows are missing only where there are more devices than rows.
        assert (split.padded_rows > split.rows) == bool(split.warning()) == (devices > split.rows)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_hardware_that_it_names(name):
    config, where = read(name), re.search(r"--topology (\S+)", file_of(name).read_text())
    assert where is not None
    hardware = find_topology(where[1])
    setup = set_up(config, model_config(config), choose_method(config.adapter)[0], hardware.group)
    arguments = bytes_per_device(step_arguments(setup))
    assert arguments + setup.temporaries() < hardware.capacity_bytes


@pytest.mark.parametrize("name", ["deepseek_v2_lite", "deepseek_v3"])
def test_vllm_loads_what_the_recipes_for_latent_attention_train(name):
    config = read(name)
    method, _ = choose_method(config.adapter)
    definition = define(model_config(config), "bfloat16", method)
    assert refused_exports(method, definition) == {}
    # Every other projection of attention is trained.
    attention = [path[-1] for path in definition.projections() if "self_attn" in path]
    assert set(config.adapter.targets) == set(attention) - {"kv_b_proj"}


@pytest.mark.parametrize("name", RECIPES)
def test_the_data_and_commands_of_a_recipe_exist(name):
    config = read(name)
    for path in filter(None, (config.data.train, config.data.eval)):
        assert Path(path).parent == ROOT / "configs" / "data"
        assert len(Path(path).read_text(encoding="utf-8").splitlines()) >= 4
    head = file_of(name).read_text().split('"""')[1]
    assert f"jaxtune train --config configs/{name}.py" in head
    assert f"jaxtune plan --config configs/{name}.py" in head


@pytest.mark.parametrize("name", LENGTHENED)
def test_the_length_of_a_recipe_is_in_epochs(name):
    least, most = EPOCHS.get(name, (1, 5))
    assert least <= read(name).training.epochs <= most
    # A length on the command line takes its place.
    assert read(name, ["training.steps=7"]).training.epochs == 0


@pytest.mark.parametrize("steps", [200, 2000])
@pytest.mark.parametrize("name", LENGTHENED)
def test_its_warmup_grows_with_the_run(name, steps):
    optimizer = read(name).optimizer
    warmup = steps // (8 if name == "quickstart" else 20)
    rates = make_schedule(optimizer, steps)(np.array([0, warmup - 1, warmup]))
    assert rates[0] == 0 and rates[1] < rates[2] == np.float32(optimizer.learning_rate)


def test_a_base_is_found_next_to_its_recipe(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "mine" / "bases" / "lora.py"
    base.write_text(base.read_text().replace("adapter.rank = 16", "adapter.rank = 24"))
    assert load_file("mine/deepseek_llm_7b.py").adapter.rank == 24
    assert load_file("mine/r1_distill_qwen_7b.py").adapter.rank == 24  # by a second base

    base.write_text(base.read_text().replace("adapter.rank = 24", "adapter.rnak = 24"))
    line = base.read_text().split("adapter.rnak")[0].count("\n") + 1
    with pytest.raises(JaxtuneError, match=rf'^\S+/mine/bases/lora\.py:{line}: .*"adapter.rnak"'):
        load_file("mine/deepseek_llm_7b.py")
    base.unlink()
    with pytest.raises(JaxtuneError, match=r"^\S+/mine/bases/lora\.py: no such config file"):
        load_file("mine/deepseek_llm_7b.py")


@pytest.mark.parametrize("name", GUIDE)
def test_the_table_has_the_published_numbers(name):
    config = read(name).to_dict()
    for key, wanted in GUIDE[name].items():
        section, knob = key.split(".")
        assert config[section][knob] == wanted, key


def test_the_recipe_for_small_data_is_regularized():
    small, usual = read("small_data"), read("domain_expert")
    assert small.adapter.rank < usual.adapter.rank
    assert small.adapter.dropout > usual.adapter.dropout > 0
    assert small.optimizer.weight_decay > 0
    assert small.evaluation.stop_patience > 0 and usual.evaluation.stop_patience > 0


def test_every_config_is_in_the_table():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\(\.\./configs/(\w+)\.py\) \|(.*)$", text, re.MULTILINE)
    assert sorted(name for name, _, _ in listed) == RECIPES
    for name, file, row in listed:
        config = read(name)
        assert file == name
        assert f"[{Path(config.data.train).name}](../configs/data/" in row
        assert CHECKPOINTS[config.model.path].lower() in row.lower()
        adapter, training = config.adapter, config.training
        lora = adapter.method == "lora"
        scale = f"{adapter.rank} / {adapter.alpha:g}" if lora else "–"
        rate = config.optimizer.learning_rate
        assert f"| {scale} |" in row and f"| {rate} | {training.batch_size} |" in row


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny, tiny_chat, tmp_path_factory):
    """Makes a tiny model of a recipe's family, with the tokenizer of `tiny_chat`."""

    def make(config):
        real = model_config(config) if config.model.path in CHECKPOINTS else {}
        family = real.get("model_type", "llama")
        changes = {"max_position_embeddings": 4096}
        if family.startswith("deepseek"):
            mixture = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2}
            latent = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
            changes |= (
                mixture
                | latent
                | {
                    "q_lora_rank": 40 if real["q_lora_rank"] else None,
                    "v_head_dim": 16,
                    "topk_group": 1,
                    "moe_intermediate_size": 32,
                    "first_k_dense_replace": 1,
                    "num_key_value_heads": 4,
                    "head_dim": 8,
                }
            )
        directory = tmp_path_factory.mktemp("recipe") / "model"
        vocabulary = json.loads((tiny_chat / "config.json").read_text())["vocab_size"]
        shutil.copytree(tiny(family, vocab_size=vocabulary, **changes), directory)
        for file in tiny_chat.iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                shutil.copy(file, directory)
        return directory

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", LENGTHENED)
def test_it_trains_for_its_epochs_of_other_data(name, tiny_checkpoint, tmp_path):
    config = read(name, ONE_DEVICE)
    rows = Path(config.data.train).read_bytes().splitlines(keepends=True)[:ROWS]
    mine, few = tmp_path / "mine.jsonl", tmp_path / "few.jsonl"
    mine.write_bytes(b"".join(rows))
    few.write_bytes(b"".join(rows[:2]))
    overrides = [
        *ONE_DEVICE,
        f"model.path={tiny_checkpoint(config)}",
        f"data.train={mine}",
        "data.packing=false",  # a row of the file is a row of a batch
        "data.max_length=256",  # a token is a byte here: this keeps the ends of the answers
        "data.too_long=truncate_start",
        f"training.batch_size={BATCH}",  # of a recipe for many devices as well
        f"training.accumulation={MICRO_BATCHES}",
        # Batches differ, and regularization adds noise: evaluation has neither.
        f"data.eval={few}",
        "data.overlap=keep",
        "evaluation.every=1",
        "evaluation.batch_size=2",
        "evaluation.stop_patience=0",
    ]
    run = jaxtune.train(read(name, overrides), tmp_path / "run")
    lines = list(run.metrics())
    assert len(lines) == math.ceil(config.training.epochs * ROWS / BATCH)
    assert all(math.isfinite(line["loss"]) for line in lines)
    # A share of 5 % of at most 20 steps: the first step is the warm-up.
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and rates[1] == max(rates) == pytest.approx(config.optimizer.learning_rate)
    first, *_, last = (line["loss"] for line in run.evaluations())
    assert last < first
