"""The sample that experts are scored on, and the command that scores them."""

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.adapters.esft.expert_scores import read_scores
from jaxtune.cli import main
from jaxtune.data import Examples
from jaxtune.training.score_experts import take_sample

LENGTHS = [3, 5, 7, 4, 6, 2, 8, 5]


def make(lengths):
    tokens = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    return Examples(tokens, tokens, [f"rows:{i}" for i in range(len(lengths))])


@pytest.mark.parametrize("tokens", [1, 11, 20, 40])
def test_a_sample_is_whole_examples_and_no_more_than_needed(tokens):
    sample = take_sample(make(LENGTHS), tokens, 0)
    assert sample.token_count >= tokens
    assert [len(tokens) for tokens in sample.tokens] == [LENGTHS[t[0]] for t in sample.tokens]
    assert len({int(t[0]) for t in sample.tokens}) == len(sample)
    # Without one of its examples it would be too small.
    assert sample.token_count - max(map(len, sample.tokens)) < tokens


def test_a_sample_of_all_is_all():
    assert take_sample(make(LENGTHS), 1000, 0).fingerprint() == make(LENGTHS).fingerprint()


def test_a_sample_depends_on_the_seed_alone():
    prints = [take_sample(make(LENGTHS), 15, seed).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


@pytest.fixture
def config(tmp_path, tiny):
    directory = tiny(
        "deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=28,
        qk_nope_head_dim=12,
        qk_rope_head_dim=16,
        v_head_dim=10,
    )
    rows = [
        {"input_ids": list(range(3 + i, 20)), "labels": list(range(3 + i, 20))} for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"path": str(directory)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32},
        "adapter": {"method": "esft", "expert_threshold": 0.5},
        "training": {"batch_size": 4, "steps": 1, "dtype": "float32"},
        "evaluation": {"every": 0},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "config.py"
    path.write_text(f"def get_config():\n    return {sections!r}\n")
    return path


def test_the_command_writes_scores_that_a_run_takes(config, tmp_path, capsys):
    target = tmp_path / "scores.json"
    command = ["experts", "score", "--config", str(config), "--to", str(target)]
    main(command)
    printed = capsys.readouterr().out
    assert "layer 1 " in printed and " of 8: " in printed and f"written: {target}" in printed
    scores = read_scores(target)
    assert np.allclose([sum(row) for table in scores for row in table.values()], 1, atol=1e-5)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 65
    assert "scores.json: already exists" in capsys.readouterr().err
    main([*command[:-1], str(tmp_path / "few.json"), "--config.adapter.expert_sample=20"])
    assert read_scores(tmp_path / "few.json") != scores
    main(
        [
            *("train", "--config", str(config), "--workdir", str(tmp_path / "run")),
            f"--config.adapter.expert_scores={target}",
        ]
    )
    config_file = jaxtune.Run(tmp_path / "run").adapter_directory("last") / "adapter_config.json"
    chosen = {int(k): tuple(v) for k, v in json.loads(config_file.read_text())["experts"].items()}
    assert chosen == dict(scores.choose("token", 0.5))
    assert not (tmp_path / "run" / "expert_scores.json").exists()


def test_a_model_without_routed_experts_is_refused(config, tiny, tmp_path, capsys):
    command = ["train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main([*command, f"--config.model.path={tiny('llama')}"])
    message = "adapter.method=esft trains routed experts, and llama has none"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
