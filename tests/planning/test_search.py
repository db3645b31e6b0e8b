"""The search for the best way to run a config, and plans without a compiler."""

import json

import pytest

from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.devices import GPUS, TPUS
from jaxtune.planning import cuda, plan
from jaxtune.planning.search import Candidate, candidates, search
from jaxtune.planning.topology import find_topology
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    path = tmp_path / "run.py"
    path.write_text(
        "from jaxtune import config\n\n"
        "def get_config():\n"
        "    c = config.default()\n"
        f"    c.model.path = {str(tmp_path)!r}\n"
        "    c.data.max_length = 16\n"
        "    c.training.batch_size = 2\n"
        "    return c\n"
    )
    return path


@pytest.fixture
def config(tmp_path, config_file):
    sections = {"data": {"max_length": 16}, "training": {"batch_size": 2}}
    return resolve({"model": {"path": str(tmp_path)}, **sections})


def test_every_candidate_uses_all_devices_and_keeps_the_batch(config):
    found = list(candidates(config.training.batch_size, TINY, 8))
    assert not any(dict(c.mesh).get("expert") for c in found), "there are no experts"
    for candidate in found:
        chosen = candidate.apply(config)
        size = 1
        for n in chosen.mesh.to_dict().values():
            size *= n
        assert size == 8
        assert chosen.training.batch_size == 2
        assert 2 % (chosen.training.accumulation * chosen.mesh.data * chosen.mesh.fsdp) == 0
    mixture = candidates(config.training.batch_size, TINY | {"n_routed_experts": 8}, 8)
    assert any(dict(c.mesh).get("expert") == 2 for c in mixture)


def test_more_devices_than_rows_can_be_searched():
    dense = TINY | {"num_attention_heads": 16}
    assert not list(candidates(1, dense, 16)), "at most 8 devices along mesh.tensor"
    found = list(candidates(1, dense, 16, padded=True))
    assert {dict(candidate.mesh).get("data") for candidate in found} > {16}
    assert {candidate.accumulation for candidate in found} == {1}


def test_a_mesh_that_does_not_divide_the_experts_is_not_tried_as_another(config):
    mixture = TINY | {
        **{"model_type": "deepseek", "moe_intermediate_size": 32, "num_experts_per_tok": 2},
        **{"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0},
    }
    group = find_topology("mi300x:8").group

    def experts(size):
        candidate = Candidate((("data", 8 // size), ("expert", size)), "none", 1)
        chosen = candidate.apply(config)
        return set_up(chosen, mixture, choose_method(chosen.adapter)[0], group).mesh.shape["expert"]

    assert experts(2) == 2
    with pytest.raises(JaxtuneError, match=r"expert=4,.* cannot be used with .*6 routed"):
        experts(4)


def test_the_lines_of_a_candidate_reproduce_it(config):
    candidate = Candidate((("fsdp", 4), ("tensor", 2)), "save_qkv", 2)
    from ml_collections import ConfigDict

    c = ConfigDict(config.to_dict())
    exec("\n".join(candidate.lines()), {"c": c})
    assert resolve(c) == candidate.apply(config)


def test_a_search_ranks_what_fits(capsys, config_file):
    main(["plan", "--config", str(config_file), "--search", "--tries", "2", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["tried"] == 2 and content["left"] > 0
    totals = [row["per_device_bytes"]["total"] for row in content["ranked"]]
    assert len(totals) == 2 and totals == sorted(totals)
    assert all(row["fits"] for row in content["ranked"])


def test_a_search_without_candidates_is_an_error(config):
    with pytest.raises(JaxtuneError, match="--tries is at least 1"):
        search(config, "cpu", 0)


def test_without_its_compiler_an_h100_gets_an_estimate(monkeypatch, capsys, config_file):
    monkeypatch.setattr(cuda, "available", lambda: False)
    main(["plan", "--config", str(config_file), "--topology", "h100:2", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["memory"] == "estimated"
    assert content["mesh"]["data"] == 2 and content["fits"]
    # The gradients of the trained arrays, in float32, are summed over both devices.
    trained = content["bytes_by_kind"]["trainable"]
    assert content["collectives"]["all-reduce"]["bytes"] == trained
    assert content["time"]["tokens_per_second"] > 0
    assert any("gpu-plan" in note for note in content["notes"])
    main(["plan", "--config", str(config_file), "--topology", "h100:1"])
    text = capsys.readouterr().out
    assert "estimated, not compiled" in text and "gpu-plan" in text and "tokens/s" in text


def test_an_estimate_has_the_exact_size_of_the_arguments(monkeypatch, config):
    monkeypatch.setattr(cuda, "available", lambda: False)
    exact, estimated = plan(config, "cpu"), plan(config, "h100")
    for kind in ("base", "trainable", "optimizer", "constants", "batch"):
        assert estimated.arguments[kind] == exact.arguments[kind]
    split = resolve({**config.to_dict(), "mesh": {"data": 1, "fsdp": 2}})
    halves = plan(split, "h100:2").arguments
    assert halves["batch"] * 2 == exact.arguments["batch"]
    assert halves["base"] < exact.arguments["base"]


def test_a_plan_needs_a_config(capsys):
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "--config FILE is required" in capsys.readouterr().err


def test_an_unknown_gpu_is_reported_with_the_closest(capsys, config_file):
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(config_file), "--device", "rtx4009"])
    message = capsys.readouterr().err
    assert 'device="rtx4009" is unknown; did you mean "rtx4090"' in message
    assert "topology" not in message


def test_the_named_hardware_is_known():
    wanted = "h200 b200 l40s rtx5090 a6000 mi300x v4 v7x"
    assert set(wanted.split()) <= {*GPUS, *TPUS}


def test_a_number_of_gpus_may_stand_in_front(monkeypatch, config):
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert find_topology("8xh100") == find_topology("h100:8")
    assert plan(config, "2xh100").to_json() == plan(config, "h100:2").to_json()


def test_an_amd_gpu_is_estimated_and_the_plan_says_why(config):
    planned = plan(config, "mi300x")
    assert planned.estimated and planned.capacity > 180e9
    assert "AMD GPUs by formulas only" in " ".join(planned.notes)


def test_every_figure_of_a_chip_has_a_source():
    for chip in (*TPUS.values(), *GPUS.values()):
        assert chip.source
        assert 8e9 < chip.capacity_bytes < 210e9
        assert chip.flops > chip.memory_bandwidth > chip.link_bandwidth
