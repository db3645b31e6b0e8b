"""Selection of experts by score, and the files of scores and of selected experts."""

import json

import pytest

from jaxtune.adapters import method_from_config, method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.esft.esft import Esft
from jaxtune.adapters.esft.expert_scores import ExpertScores, read_choice, read_scores
from jaxtune.adapters.method import StoredAdapter
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError

SCORES = ExpertScores(
    token={1: [0.1, 0.4, 0.2, 0.3], 2: [0.25, 0.25, 0.25, 0.25]},
    gate={1: [0.3, 0.05, 0.05, 0.1], 2: [0.1, 0.2, 0.1, 0.1]},
)
MODEL = {
    "model_type": "deepseek",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    ("kind", "threshold", "chosen"),
    [
        ("token", 0.2, ((1, (1,)), (2, (0,)))),
        ("token", 0.5, ((1, (1, 3)), (2, (0, 1)))),
        ("token", 1.0, ((1, (0, 1, 2, 3)), (2, (0, 1, 2, 3)))),
        ("gate", 0.1, ((1, (0,)), (2, (1,)))),
        ("gate", 0.4, ((1, (0, 3)), (2, (0, 1, 2)))),
    ],
)
def test_the_fewest_experts_are_chosen_that_reach_the_threshold(kind, threshold, chosen):
    assert SCORES.choose(kind, threshold) == chosen


def test_scores_that_do_not_reach_the_threshold_are_refused():
    with pytest.raises(JaxtuneError) as error:
        SCORES.choose("gate", 0.6)
    assert str(error.value) == (
        "adapter.expert_threshold=0.6 is out of reach: the scores of layer 1 sum to 0.5"
    )


def test_scores_come_back_from_their_file(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(SCORES.to_json())
    assert read_scores(path) == SCORES
    assert read_choice(path, "gate", 0.1) == SCORES.choose("gate", 0.1)


def test_an_expert_config_lists_the_experts_itself(tmp_path):
    path = tmp_path / "expert_cfg.json"
    path.write_text(json.dumps({"experts": {"2": [3, 0], "1": [2], "3": []}}))
    assert read_choice(path, "token", 0.2) == ((1, (2,)), (2, (0, 3)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": no such file of expert scores"),
        ("{", ":1: invalid JSON: "),
        ("[]", ": not a JSON object"),
        ('{"a": 1}', ": holds no scores of experts (token_scores and gate_scores by layer)"),
        ('{"experts": [1]}', ': "experts" is not a list of experts per layer'),
        (
            '{"experts": {}, "shared_experts": true}',
            ': "shared_experts"=True is not supported',
        ),
    ],
)
def test_a_file_of_unknown_kind_is_rejected(content, message, tmp_path):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    section = resolve({"adapter": {"method": "esft", "expert_scores": str(path)}}).adapter
    with pytest.raises(JaxtuneError) as error:
        method_from_config(section)
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Esft(), "adapter.expert_scores is empty: adapter.method=esft needs a file of expert"),
        (Esft(((0, (1,)),)), "adapter.expert_scores: layer 0 has no routed experts"),
        (Esft(((2, (1, 4)),)), "adapter.expert_scores: layer 2 has 4 experts, but no expert 4"),
    ],
)
def test_experts_that_the_model_lacks_are_refused(method, message):
    with pytest.raises(JaxtuneError) as error:
        define(MODEL, "float32", method)
    assert str(error.value).startswith(message)


def test_an_adapter_without_experts_is_refused():
    with pytest.raises(JaxtuneError, match=r'adapter_config\.json: "experts" is empty'):
        method_from_peft(StoredAdapter({"peft_type": "ESFT", "experts": {}}, {}))
