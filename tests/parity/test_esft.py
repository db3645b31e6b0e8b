"""ESFT selects experts by the scores of torch's routers and trains them as torch does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import reference
from oracles import (
    LOSS,
    Recipe,
    assert_same_logits,
    make_examples,
    random_tokens,
    relative,
    torch_logits,
    train_torch,
)
from parts import train_on_eight_devices
from safetensors.numpy import load_file, save_file
from test_training import FACTORS, LENGTH, assert_same_training, run_config, write_rows
from torch import nn
from torch.nn.utils import parametrize

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import flatten
from jaxtune.training.train import score_training_data

TOKENS = random_tokens(1, 2, 24)
SHOWS = 1e-3  # a change of the logits beyond any rounding error
FAMILIES = ["deepseek", "deepseek_v2", "deepseek_v3"]
# Experts by layer; their number differs between layers.
CHOICE = {1: [1, 4, 6], 2: [3]}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
    for layer, experts in CHOICE.items()
    for expert in experts
    for projection in PROJECTIONS
}
SIZE = 64 * 24  # number of values of each matrix


@pytest.fixture
def choice(tmp_path):
    path = tmp_path / "expert_cfg.json"
    content = {"experts": CHOICE, "shared_experts": False, "non_expert_modules": False}
    path.write_text(json.dumps(content))
    return {"method": "esft", "expert_scores": str(path)}


class Chosen(nn.Module):
    """A parametrization that trains some rows of an array and freezes the others."""

    def __init__(self, whole: torch.Tensor, rows: list[int]):
        super().__init__()
        self.register_buffer("whole", whole.detach().clone())
        self.rows = torch.tensor(rows)

    def forward(self, chosen: torch.Tensor) -> torch.Tensor:
        return self.whole.index_copy(0, self.rows, chosen)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.rows].clone()


def train_only(model, choice):
    """Freezes a torch model except for the chosen experts of each layer."""
    model.requires_grad_(False)
    for layer, chosen in choice.items():
        experts = model.model.layers[layer].mlp.experts
        if isinstance(experts, nn.ModuleList):
            for expert in chosen:
                experts[expert].requires_grad_(True)
            continue
        for name in ("gate_up_proj", "down_proj"):
            edit = Chosen(getattr(experts, name), chosen)
            parametrize.register_parametrization(experts, name, edit)
            experts.parametrizations[name].original.requires_grad_(True)
    return model


def expert_weights(model, choice):
    """Returns the weights of the chosen experts of a torch model by their names in a checkpoint."""
    found = {}
    for layer, chosen in choice.items():
        experts = model.model.layers[layer].mlp.experts
        for expert in chosen:
            if isinstance(experts, nn.ModuleList):
                values = [getattr(experts[expert], name).weight for name in PROJECTIONS]
            else:
                values = [*experts.gate_up_proj[expert].chunk(2), experts.down_proj[expert]]
            for name, value in zip(PROJECTIONS, values, strict=True):
                key = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                found[key] = value.detach().numpy()
    return found


@pytest.mark.parametrize(
    "family", ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[:2])]
)
def test_chosen_experts_train_as_torch_trains_them_with_all_else_frozen(
    family, families, choice, tmp_path
):
    # The gradients of these few weights are small, so clipping takes effect only at a lower norm.
    directory, recipe = families(family), Recipe(accumulation=2, clip_norm=0.05)
    examples = make_examples(60, longest=LENGTH)
    rows = write_rows(tmp_path / "rows.jsonl", examples)
    run = jaxtune.train(run_config(directory, rows, recipe, adapter=choice), tmp_path / "run")
    model = train_only(reference(directory), CHOICE)
    assert_same_training(run.metrics(), train_torch(model, examples, recipe), recipe)
    ours, theirs = (
        read_adapter(run.adapter_directory("last")).tensors,
        expert_weights(model, CHOICE),
    )
    assert set(ours) == set(theirs) == NAMES
    errors = {name: relative(ours[name], value) for name, value in theirs.items()}
    assert max(errors.values()) <= FACTORS, errors


@pytest.fixture(
    scope="module", params=["deepseek_v3", pytest.param("deepseek_v2", marks=pytest.mark.slow)]
)
def trained(request, families, tmp_path_factory):
    """Trains chosen experts on a plain and on an int8 base; (checkpoint, {format: run})."""
    directory, scratch = families(request.param), tmp_path_factory.mktemp(request.param)
    rows = write_rows(scratch / "rows.jsonl", make_examples(16, longest=LENGTH))
    (scratch / "choice.json").write_text(json.dumps({"experts": CHOICE}))
    adapter = {"method": "esft", "expert_scores": str(scratch / "choice.json")}
    runs = {}
    for form in ("", "int8"):
        recipe = Recipe(accumulation=1, learning_rate=1e-2)
        config = run_config(directory, rows, recipe, adapter=adapter, quantize={"format": form})
        runs[form] = jaxtune.train(config, scratch / f"run{form}")
    return directory, runs


@pytest.mark.parametrize("form", ["", "int8"])
def test_the_loss_falls(trained, form):
    losses = [line["loss"] for line in trained[1][form].metrics()]
    assert losses[-1] < 0.9 * losses[0]


def test_the_summary_counts_the_chosen_experts_once(trained):
    directory, runs = trained
    rows = parameter_summary(runs[""].model("last").definition)
    assert {row.group: (row.modules, row.parameters) for row in rows if row.kind == "trained"} == {
        f"mlp.experts.{name}": (4, 4 * SIZE) for name in PROJECTIONS
    }
    count, total, _ = trained_share(rows)
    assert count == len(NAMES) * SIZE
    assert total == trained_share(parameter_summary(jaxtune.load(directory).definition))[1]


def test_merging_changes_the_chosen_experts_and_no_other_bit(trained, tmp_path):
    directory, runs = trained
    model = runs[""].model("last")
    merged = model.save_pretrained(tmp_path / "merged")
    before, after = (load_file(place / "model.safetensors") for place in (directory, merged))
    assert before.keys() == after.keys()
    assert {name for name in before if not np.array_equal(before[name], after[name])} == NAMES
    expected = torch_logits(reference(merged), TOKENS)
    assert relative(torch_logits(reference(directory), TOKENS), expected) > SHOWS
    assert_same_logits(model.logits(TOKENS), expected)


def test_an_adapter_round_trips_bit_for_bit_with_either_config(trained, tmp_path):
    directory, runs = trained
    saved = runs[""].adapter_directory("last")
    method, before = method_from_peft(read_adapter(saved)), read_adapter(saved).tensors
    assert set(before) == NAMES
    model = jaxtune.load(directory, adapter=saved, dtype="float32", progress=False)
    again = write_adapter(
        tmp_path / "again", method.store(model.definition, model.trainable, model.constants)
    )
    (again / "adapter_config.json").unlink()  # ESFT's programs write only expert_cfg.json
    after = read_adapter(again)
    assert method_from_peft(after) == method
    assert all(before[name].tobytes() == after.tensors[name].tobytes() for name in NAMES)


def test_the_files_of_esfts_programs(tmp_path):
    names = [f"layers.1.mlp.experts.1.{name}.weight" for name in PROJECTIONS]
    tensors = {name: torch.randn(24, 64) for name in names}
    (tmp_path / "expert_cfg.json").write_text(json.dumps({"experts": {"1": [1]}}))
    with pytest.raises(
        JaxtuneError, match=r"expert_cfg.json but no \*.safetensors or pytorch_model"
    ):
        read_adapter(tmp_path)
    torch.save(object, tmp_path / "training_args.bin")  # a file that is not a state dict
    for number, name in enumerate(names):
        torch.save({name: tensors[name]}, tmp_path / f"pytorch_model-{number}.bin")
    read = read_adapter(tmp_path).tensors
    assert read.keys() == {f"model.{name}" for name in names}
    assert all((read[f"model.{name}"] == tensors[name].numpy()).all() for name in names)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(JaxtuneError, match=r'model.bin: tensor "layers.*" is also in another file'):
        read_adapter(tmp_path)
    save_file(
        {name: value.numpy() + 1 for name, value in tensors.items()}, tmp_path / "x.safetensors"
    )
    value = read_adapter(tmp_path).tensors[f"model.{names[0]}"]
    assert (value == tensors[names[0]].numpy() + 1).all()


@pytest.mark.parametrize(("form", "dtype"), [(None, "bfloat16"), ("int8", "float32")])
def test_before_the_first_step_the_model_is_the_base_bit_for_bit(
    form, dtype, families, choice, tmp_path
):
    directory = families("deepseek_v3")
    recipe = Recipe(steps=0, batch_size=2, accumulation=1, warmup_steps=0)
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(2, longest=LENGTH))
    config = run_config(directory, rows, recipe, adapter=choice, quantize={"format": form or ""})
    config["training"]["dtype"] = dtype
    model = jaxtune.train(config, tmp_path / "run").model("last")
    base = jaxtune.load(directory, quantize=form, dtype=dtype, progress=False)
    assert np.array_equal(model.logits(TOKENS), base.logits(TOKENS))


def test_the_padding_of_a_layer_stays_zero(trained):
    model = trained[1][""].model("last")
    chosen = dict(flatten(model.trainable))
    assert len(chosen) == len(PROJECTIONS)
    for value in chosen.values():
        assert value.shape[:2] == (2, 3)
        assert not np.any(value[1, 1:])
        assert np.all(np.any(value[0], axis=(1, 2))) and np.any(value[1, 0])


def torch_scores(model, examples, experts, scale):
    """Scores experts by the equations of the paper, which assume samples of equal length."""
    tables = [
        {i: np.zeros(experts) for i, layer in enumerate(model.model.layers) if is_mixture(layer)}
        for _ in range(2)
    ]
    hooks = []

    def record(layer):
        def hook(module, inputs, output):
            if isinstance(module, nn.Linear):  # the router of deepseek_moe.py
                mixture = model.model.layers[layer].mlp
                weights, indices = output.softmax(-1).topk(mixture.top_k)
                if mixture.normalize:
                    weights = weights / weights.sum(-1, keepdim=True)
            else:
                _, weights, indices = output
            indices = indices.reshape(-1, indices.shape[-1])
            weights = weights.detach().numpy().reshape(indices.shape).astype(np.float64)
            for row, gates in zip(indices.numpy(), weights, strict=True):
                tables[0][layer][row] += 1 / len(row)
                tables[1][layer][row] += gates / scale

        return hook

    for layer in tables[0]:
        hooks.append(model.model.layers[layer].mlp.gate.register_forward_hook(record(layer)))
    tokens = 0
    for example in examples:
        torch_logits(model, np.asarray([example.input_ids]))
        tokens += len(example.input_ids)
    for hook in hooks:
        hook.remove()
    return ExpertScores(
        *({i: (row / tokens).tolist() for i, row in table.items()} for table in tables)
    )


def is_mixture(layer):
    return hasattr(layer.mlp, "experts")


@pytest.mark.parametrize(
    "family", ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[:2])]
)
def test_scores_are_those_of_the_paper_and_of_torch(family, families, tmp_path):
    directory = families(family)
    examples = make_examples(13, longest=LENGTH)
    rows = write_rows(tmp_path / "rows.jsonl", examples)
    config = run_config(directory, rows, Recipe(batch_size=4, accumulation=2))
    # Rows are packed and padded, and the last batch is not full.
    config["data"]["packing"] = True
    ours = score_training_data(resolve(config))
    scale = json.loads((directory / "config.json").read_text()).get("routed_scaling_factor", 1.0)
    theirs = torch_scores(reference(directory), examples, 8, scale)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() == {1, 2}
        for layer in mine:
            assert relative(mine[layer], other[layer]) <= LOSS
    assert ours.choose("gate", 0.3) == theirs.choose("gate", 0.3)
    assert ours.token != ours.gate


@pytest.mark.slow
def test_a_new_run_scores_its_data_and_a_resumed_run_keeps_the_scores(families, tmp_path):
    directory = families("deepseek_v3")
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(13, longest=LENGTH))
    recipe = Recipe(steps=2, accumulation=1, warmup_steps=0)
    config = run_config(directory, rows, recipe, adapter={"method": "esft"})
    config["data"] |= {"eval": str(rows), "overlap": "keep"}
    run = jaxtune.train(config, tmp_path / "run")
    scores = score_training_data(resolve(config))
    written = (tmp_path / "run" / "expert_scores.json").read_text()
    assert json.loads(written) == json.loads(scores.to_json())
    chosen = method_from_peft(read_adapter(run.adapter_directory("last"))).experts
    assert chosen == scores.choose("token", 0.2)
    # A run uses the scores that its directory contains already.
    swapped = ExpertScores(*({i: row[::-1] for i, row in table.items()} for table in scores))
    assert swapped.choose("token", 0.2) != chosen
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "expert_scores.json").write_text(swapped.to_json())
    again = jaxtune.train(config, tmp_path / "again")
    other = method_from_peft(read_adapter(again.adapter_directory("last"))).experts
    assert other == swapped.choose("token", 0.2)


@pytest.mark.slow
def test_eight_devices_train_as_one_does(families, choice, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(16, longest=LENGTH))
    recipe = Recipe(steps=3, accumulation=1, warmup_steps=1, learning_rate=1e-3)
    config = run_config(families("deepseek_v3"), rows, recipe, adapter=choice)
    expected = jaxtune.train(config, tmp_path / "one").metrics()
    config["mesh"] = {"data": 2, "tensor": 2, "expert": 2}
    train_on_eight_devices({tmp_path / "eight": config})
    ours = jaxtune.Run(tmp_path / "eight").metrics()
    assert len(ours) == len(expected) == 3
    for line, other in zip(ours, expected, strict=True):
        assert relative(line["loss"], other["loss"]) <= LOSS, line
