"""The combine command gives the combinations of PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.adapter_files.combine import COMBINATIONS
from jaxtune.cli import main

TOKENS = np.random.default_rng(1).integers(3, 160, (2, 12))
# Two float32 programs that sum in another order; see tests/parity/oracles.py.
LOGITS = 2e-5
WEIGHTS = {"law": 0.7, "chat": 0.3}
SETTINGS = {
    "law": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
    "chat": {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "o_proj"]},
}
OPTIONS = {
    "ties": (
        ["--density", "0.6", "--majority", "frequency"],
        {"majority_sign_method": "frequency"},
    ),
    "magnitude_prune": (["--density", "0.6"], {}),
    "svd": (["--rank", "3"], {"svd_rank": 3}),
}


def base_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.numpy()


def same(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() <= LOGITS * np.abs(theirs).max()


@pytest.fixture(scope="module")
def directories(tiny_chat, tmp_path_factory):
    place = tmp_path_factory.mktemp("combined")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        get_peft_model(base_model(tiny_chat), config).save_pretrained(place / name)
    return {name: place / name for name in SETTINGS}


@pytest.fixture
def flags(directories):
    named = [f"--adapter={name}={directory}" for name, directory in directories.items()]
    return [*named, "--weights", ",".join(f"{name}={w}" for name, w in WEIGHTS.items())]


@pytest.mark.parametrize("method", ["cat", "linear", *OPTIONS])
def test_peft_loads_the_combination_that_it_would_make(
    method, tiny_chat, directories, flags, tmp_path
):
    ours, theirs = OPTIONS.get(method, ([], {}))
    main(["combine", *flags, "--combine", method, *ours, "--to", str(tmp_path / "both")])
    loaded = PeftModel.from_pretrained(base_model(tiny_chat), tmp_path / "both")
    reference = PeftModel.from_pretrained(base_model(tiny_chat), directories["law"], "law")
    reference.load_adapter(directories["chat"], "chat")
    density = {"density": 0.6} if "--density" in ours else {}
    reference.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "both", method, **density, **theirs
    )
    reference.set_adapter("both")
    assert same(logits(loaded), logits(reference))
    ours = jaxtune.load(tiny_chat, adapter=tmp_path / "both", dtype="float32", progress=False)
    assert same(ours.logits(TOKENS), logits(loaded))


def test_random_pruning_follows_the_seed(flags, tmp_path):
    def tensors(name, seed):
        options = ["--combine", "dare_ties", "--density", "0.5", "--drop-seed", str(seed)]
        main(["combine", *flags, *options, "--to", str(tmp_path / name)])
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert tensors("one", 1) == tensors("again", 1) != tensors("two", 2)


@pytest.mark.slow
def test_generate_answers_with_a_combination(tiny_chat, directories, flags, tmp_path, capsys):
    prompt = ["--prompt", "c2", "--max-new-tokens", "6"]

    def answer(*arguments):
        capsys.readouterr()
        main(["generate", "--model", str(tiny_chat), *prompt, *map(str, arguments)])
        return capsys.readouterr().out

    main(["combine", *flags, "--combine", "ties", "--to", str(tmp_path / "both")])
    combined = answer("--adapter", tmp_path / "both")
    assert combined == answer(*flags, "--combine", "ties")
    alone = answer("--adapter", directories["law"])
    assert alone == answer("--adapter", f"law={directories['law']}") != combined


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weights", "lwa=1"],
            '--weights="lwa" is unknown; did you mean "law"? (known: chat, law)',
        ),
        (
            ["--weights", "law=much"],
            '--weights: "law=much" is not of the form NAME=WEIGHT, e.g. law=0.5',
        ),
        (["--weights", "law=1,law=2"], '--weights: duplicate name "law"'),
        (["--combine", "tie"], '--combine="tie" is unknown; did you mean "ties"?'),
        (
            ["--combine", "ties", "--rank", "4"],
            "--combine=ties does not use --rank (used by: svd,",
        ),
        (["--combine", "svd", "--rank", "-1"], "rank=-1 of a combination is negative"),
        (
            ["--combine", "ties", "--majority", "totl"],
            'invalid choice "totl"; did you mean "total"?',
        ),
        (["--adapter", "law=x"], '--adapter: duplicate name "law"'),
        (["--adapter", "./x"], '--adapter: "./x" has no name; use NAME=DIR'),
    ],
)
@pytest.mark.parametrize("command", ["combine", "generate"])
def test_a_mistake_is_one_line_that_names_the_flag(
    command, arguments, message, directories, tiny_chat, tmp_path, capsys
):
    named = [f"--adapter={name}={directory}" for name, directory in directories.items()]
    rest = {
        "combine": ["--to", str(tmp_path / "out")],
        "generate": ["--model", str(tiny_chat), "--prompt", "x"],
    }
    with pytest.raises(SystemExit) as exit_:
        main([command, *named, *arguments, *rest[command]])
    assert exit_.value.code == 65 and not (tmp_path / "out").exists()
    assert message in capsys.readouterr().err


def test_a_run_or_an_adapter_without_a_name_cannot_be_combined(tiny_chat, directories, capsys):
    for arguments in (
        ["--workdir", "run", "--combine", "ties"],
        ["--model", str(tiny_chat), "--adapter", str(directories["law"]), "--weights", "law=1"],
    ):
        with pytest.raises(SystemExit):
            main(["generate", *arguments, "--prompt", "x"])
        assert "--adapter NAME=DIR for each" in capsys.readouterr().err


def test_every_method_is_reached(flags, tmp_path):
    for method in COMBINATIONS:
        main(["combine", *flags, "--combine", method, "--to", str(tmp_path / method)])
        assert (tmp_path / method / "adapter_config.json").is_file()
