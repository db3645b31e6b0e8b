"""From a checkpoint on disk to files that other tools load, through what users type."""

import json
import shutil

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.cli import main

# Logits of two programs in float32 on one machine: rounding, far below any error of substance.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def workdir(small_config, tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    main(["train", "--config", str(small_config), "--workdir", str(workdir)])
    return workdir


def close(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    return np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def test_a_run_writes_all_of_its_files(workdir):
    assert {path.name for path in workdir.iterdir()} >= {
        "config.json",
        "description.json",
        "fingerprint.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
    }
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    promised = {"loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert all(promised <= line.keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] / 2


def test_a_finished_run_is_unchanged(workdir, small_config, capsys):
    before = (workdir / "metrics.jsonl").read_text()
    main(["train", "--workdir", str(workdir)])
    main(["train", "--config", str(small_config), "--workdir", str(workdir)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("done: 30 steps")
    assert (workdir / "metrics.jsonl").read_text() == before
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--workdir", str(workdir), "--config.training.seed=40"])
    assert exit_.value.code == 65
    assert "training.seed: 0 → 40" in capsys.readouterr().err


def test_eval_gives_the_scores_of_the_run(workdir, chats, capsys):
    def scores(*flags):
        main(["eval", "--workdir", str(workdir), "--json", *flags])
        return json.loads(capsys.readouterr().out)

    trained, base = scores(), scores("--base-only")
    best = min(jaxtune.Run(workdir).evaluations(), key=lambda line: line["loss"])
    assert trained["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert trained["token_accuracy"] == best["token_accuracy"]
    assert trained["perplexity"] == pytest.approx(np.exp(trained["loss"]))
    assert base["loss"] > 2 * trained["loss"]
    assert scores("--data", str(chats)) == trained
    main(["eval", "--workdir", str(workdir)])
    assert f"loss            {trained['loss']:.4f}" in capsys.readouterr().out


def test_generate_gives_the_answers_of_the_python_interface(workdir, capsys):
    def answers(*flags):
        prompts = ["--prompt", "c2", "--prompt", "h31"]
        main(["generate", "--workdir", str(workdir), "--max-new-tokens", "6", *prompts, *flags])
        return capsys.readouterr().out

    chat = [[{"role": "user", "content": text}] for text in ("c2", "h31")]
    expected = jaxtune.Run(workdir).model().generate(chat, max_new_tokens=6)
    assert answers() == f">>> c2\n{expected[0]}\n>>> h31\n{expected[1]}\n"
    assert answers("--base-only") != answers("--raw")
    sampled = ["--temperature", "1", "--top-p", "0.9", "--seed"]
    assert answers(*sampled, "1") != answers(*sampled, "2")


def test_the_exported_adapter_loads_in_peft(workdir, tiny_chat, tmp_path, capsys):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    main(["export", "--workdir", str(workdir), "--format", "peft", "--to", str(tmp_path / "a")])
    base = AutoModelForCausalLM.from_pretrained(tiny_chat, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, tmp_path / "a")
    tokens = np.arange(24).reshape(2, 12)
    ours = jaxtune.Run(workdir).model("best").logits(tokens)
    assert close(ours, peft(torch.tensor(tokens)).logits)
    files = ["--model", str(tiny_chat), "--adapter", str(tmp_path / "a")]
    capsys.readouterr()
    main(["generate", *files, "--prompt", "c2", "--max-new-tokens", "6"])
    chat = [{"role": "user", "content": "c2"}]
    expected = jaxtune.Run(workdir).model().generate([chat], max_new_tokens=6)
    assert capsys.readouterr().out == f"{expected[0]}\n"


def test_the_adapter_for_vllm_has_the_same_edits(workdir, tiny_chat, tmp_path):
    main(["export", "--workdir", str(workdir), "--format", "vllm", "--to", str(tmp_path / "v")])
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["r"] % 8 == 0
    tokens = np.arange(24).reshape(2, 12)
    trained = np.asarray(jaxtune.Run(workdir).model("best").logits(tokens))
    loaded = jaxtune.load(tiny_chat, adapter=tmp_path / "v", dtype="float32", progress=False)
    exported = np.asarray(loaded.logits(tokens))
    assert np.abs(exported - trained).max() <= TOLERANCE * np.abs(trained).max()


def test_the_merged_checkpoint_loads_in_transformers(workdir, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["export", "--workdir", str(workdir), "--format", "merged", "--to", str(tmp_path / "m")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokens = np.arange(24).reshape(2, 12)
    ours = jaxtune.Run(workdir).model("best").logits(tokens)
    assert close(ours, merged(torch.tensor(tokens)).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.decode(tokenizer("a1").input_ids, skip_special_tokens=True) == "a1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_convert_writes_weights_in_the_requested_dtype(tiny_chat, tmp_path, dtype):
    from safetensors import safe_open

    main(["convert", "--from", str(tiny_chat), "--to", str(tmp_path / "hf"), "--dtype", dtype])
    name = "model.layers.0.self_attn.q_proj.weight"
    with safe_open(tiny_chat / "model.safetensors", "np") as file:
        original = file.get_tensor(name)
    with safe_open(tmp_path / "hf" / "model.safetensors", "flax") as file:
        converted = file.get_tensor(name)
    assert str(converted.dtype) == dtype
    assert (converted == jax.numpy.asarray(original, dtype)).all()


def test_plan_reports_the_memory_of_the_run(small_config, capsys):
    main(["plan", "--config", str(small_config), "--topology", "cpu", "--json"])
    needs = json.loads(capsys.readouterr().out)
    parts = needs["per_device_bytes"]
    assert parts["total"] > parts["temporaries"] > 0 and needs["fits"] is True
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--config", str(small_config), "--topology", "v5ee:1x1"])
    assert exit_.value.code == 65
    assert 'did you mean "v5e"' in capsys.readouterr().err


def in_pytorchs_files(source, directory):
    """Copies a model or an adapter with torch.save's files in place of safetensors."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, directory)
    names = {"model": "pytorch_model.bin", "adapter_model": "adapter_model.bin"}
    (weights,) = directory.glob("*.safetensors")
    torch.save(load_file(weights), directory / names[weights.stem])
    weights.unlink()
    return directory


def test_files_of_pytorch_are_checked_in_the_same_way(workdir, small_config, tiny_chat, tmp_path):
    """Training from an adapter over a base, merging and combining give the same bytes."""
    adapter = workdir / "adapter" / "best"
    forms = {
        "safetensors": (tiny_chat, adapter),
        "pytorch": (
            in_pytorchs_files(tiny_chat, tmp_path / "base"),
            in_pytorchs_files(adapter, tmp_path / "adapter"),
        ),
    }
    lines, written = {}, {}
    for form, (base, start) in forms.items():
        run, out = str(tmp_path / f"run-{form}"), tmp_path / form
        flags = [f"--config.model.path={base}", f"--config.adapter.init_from={start}"]
        short = ["--config.training.steps=2", "--config.evaluation.every=2"]
        main(["train", "--config", str(small_config), *flags, *short, "--workdir", run])
        main(["export", "--workdir", run, "--format", "merged", "--to", str(out / "merged")])
        named = [f"--adapter=a={start}", f"--adapter=b={tmp_path / f'run-{form}' / 'adapter/last'}"]
        main(["combine", *named, "--to", str(out / "both")])
        main(["convert", "--from", str(base), "--to", str(out / "converted")])
        lines[form] = [line["loss"] for line in jaxtune.Run(run).metrics()]
        files = sorted(out.rglob("*.safetensors"))
        written[form] = {path.relative_to(out): path.read_bytes() for path in files}
    assert len(written["pytorch"]) == 3 and written["pytorch"] == written["safetensors"]
    assert lines["pytorch"] == lines["safetensors"]


def changed(workdir, target, **sections):
    """A copy of a run with other options in its config."""
    copy = shutil.copytree(workdir, target)
    config = json.loads((copy / "config.json").read_text())
    config.pop("derived", None)
    for section, options in sections.items():
        config[section] |= options
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_run_of_eight_devices_is_used_on_one(workdir, tmp_path, capsys):
    copy = changed(workdir, tmp_path / "run", mesh={"fsdp": 4, "tensor": 2})
    tokens = np.arange(24).reshape(2, 12)
    ours, theirs = (jaxtune.Run(path).model() for path in (copy, workdir))
    assert ours.mesh.size == 1
    assert np.array_equal(ours.logits(tokens), theirs.logits(tokens))
    scores = []
    for path in (copy, workdir):
        main(["eval", "--workdir", str(path), "--json"])
        scores.append(json.loads(capsys.readouterr().out)["loss"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_eval_without_held_out_examples_fails_before_anything_is_read(workdir, tmp_path, capsys):
    absent = {"train": str(tmp_path / "absent.jsonl"), "eval": ""}
    copy = changed(workdir, tmp_path / "run", data=absent, model={"path": str(tmp_path / "no")})
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "--workdir", str(copy)])
    assert exit_.value.code == 65
    assert "the run has no held-out examples (data.eval and data.eval_split are empty)" in (
        capsys.readouterr().err
    )
