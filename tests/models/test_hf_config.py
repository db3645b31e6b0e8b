"""Settings of config.json: each is read, or rejected in one line that names it."""

import json
import math
import re

import pytest

from jaxtune.errors import JaxtuneError
from jaxtune.models import build_model
from jaxtune.models.hf_config import read, require, size

GOOD = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
NEEDED = [key for key in GOOD if key != "max_position_embeddings"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_a_valid_config_builds():
    build_model(GOOD)


@pytest.mark.parametrize("key", NEEDED)
@pytest.mark.parametrize("value", ["absent", None])
def test_a_required_key(key, value):
    config = {k: v for k, v in GOOD.items() if k != key} | ({} if value else {key: None})
    with pytest.raises(JaxtuneError, match=f'^config.json lacks "{key}"$'):
        build_model(config)


@pytest.mark.parametrize("key", [k for k in NEEDED if k != "model_type"])
@pytest.mark.parametrize("value", ["16", 16.0, True, [16], {}, 0, -1, 10**12])
def test_a_size_is_a_positive_integer(key, value):
    with pytest.raises(JaxtuneError, match=f'^config.json: "{key}" is .*{re.escape(str(value))}'):
        build_model(GOOD | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, 'model_type="lama" is unknown; did you mean "llama"?'),
        ({"model_type": "gpt2"}, "(known: deepseek, deepseek_v2, deepseek_v3, llama, qwen2, qwen3"),
        ({"model_type": 3}, '"model_type" is 3, not of type str'),
        ({"hidden_act": "gelu"}, "\"hidden_act\"='gelu' is not supported (only 'silu', 'swish')"),
        ({"hidden_act": ["silu"]}, "\"hidden_act\"=['silu'] is not supported"),
        (
            {"use_sliding_window": True, "max_window_layers": 1},
            '"use_sliding_window"=True is not supported where layers have the window: '
            '"max_window_layers" is 1 of 2 layers',
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has 'sliding_attention'; only"),
        ({"num_key_value_heads": 3}, "4 attention heads do not divide into 3 key-value heads"),
        ({"head_dim": 5}, "heads of 5 dimensions do not split into pairs"),
        ({"tie_word_embeddings": "yes"}, "\"tie_word_embeddings\" is 'yes', not of type bool"),
        ({"rms_norm_eps": "1e-5"}, "\"rms_norm_eps\" is '1e-5', not of type float"),
        ({"attention_bias": 1}, '"attention_bias" is 1, not of type bool'),
        ({"rms_norm_eps": None}, '"rms_norm_eps" is null, not of type float'),
        ({"hidden_act": None}, '"hidden_act"=null is not supported'),
        ({"is_causal": False}, '"is_causal"=False is not supported (only True)'),
        ({"is_causal": None}, '"is_causal"=null is not supported (only True)'),
        ({"attention_dropout": 0.1}, '"attention_dropout"=0.1 is not supported (only null, 0)'),
        ({"partial_rotary_factor": 0.5}, '"partial_rotary_factor"=0.5 is not supported'),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, '"per_layer_config"={'),
        ({"logits_scaling": 8.0}, '"logits_scaling"=8.0 is not supported (only null, 1)'),
        ({"final_logit_softcapping": 30.0}, '"final_logit_softcapping"=30.0 is not supported'),
        ({"rope_theta": None}, "rope_theta is null"),
        ({"rope_theta": 0}, '"rope_theta" is 0, not a positive number'),
    ],
)
def test_a_setting_that_is_not_supported(changes, message):
    with pytest.raises(JaxtuneError, match=re.escape(message)) as raised:
        build_model(GOOD | changes)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("config.json: ")


MIXTURE = GOOD | {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
}
# Values of JSON that no number of a model has. Python reads 1e999 as infinity.
NONSENSE = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**400, 1e300, True, "1", [1], {}]
NUMBERS = {
    "rms_norm_eps": {},
    "routed_scaling_factor": {},
    "rope_theta": {},
    "factor": YARN,
    "original_max_position_embeddings": YARN,
    "attention_factor": YARN,
    "beta_fast": YARN,
    "beta_slow": YARN,
    "mscale": YARN,
    "mscale_all_dim": YARN,
    "low_freq_factor": LLAMA3,
    "high_freq_factor": LLAMA3,
}
ZERO_IS_NONE = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_no_model_has(key):
    build_model(MIXTURE | {"rope_parameters": LLAMA3})
    for value in NONSENSE:
        if value == 0 and key in ZERO_IS_NONE:
            continue
        rope = NUMBERS[key]
        changes = {"rope_parameters": rope | {key: value}} if rope else {key: value}
        with pytest.raises(JaxtuneError, match=f'"{key}"') as raised:
            build_model(MIXTURE | changes)
        assert str(raised.value).startswith("config.json: ")
        assert len(str(raised.value)) < 200
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn lacks 'factor'"),
        ({"rope_parameters": YARN | {"truncate": 1}}, '"truncate" is 1, not true or false'),
        (
            {"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 2}},
            '"beta_fast"=1 is less than "beta_slow"=2',
        ),
        ({"rope_parameters": 0}, "rope_parameters is 0, not an object"),
        ({"rope_parameters": []}, "rope_parameters is [], not an object"),
        ({"rope_parameters": ""}, "rope_parameters is '', not an object"),
        ({"rope_scaling": False}, "rope_scaling is False, not an object"),
        ({"n_group": None}, '"n_group" is null, not of type int'),
        ({"n_group": 0}, '"n_group" is 0, not within 1 and'),
        ({"topk_group": 5}, '"topk_group" is 5, more than "n_group"=4'),
        ({"num_experts_per_tok": 9}, '"num_experts_per_tok" is 9; "n_routed_experts" is 8'),
        ({"n_shared_experts": -1}, '"n_shared_experts" is -1, not within 0 and 10000'),
        ({"num_key_value_heads": 2}, '"num_key_value_heads"=2 is not supported (only null, 4)'),
        ({"head_dim": 6}, '"head_dim"=6 is not supported (only null, 8)'),
        ({"num_hidden_layers": 1001}, '"num_hidden_layers" is 1001, not within 1 and 1000'),
        (
            {"num_hidden_layers": 1000, "n_routed_experts": 10_000},
            '"num_hidden_layers"=1000 times "n_routed_experts"=10000 is more than 262,144',
        ),
        (
            {"model_type": "llama", "num_attention_heads": 3},
            '"hidden_size" is 16, not a multiple of "num_attention_heads"=3',
        ),
        (
            {"model_type": "deepseek", "num_key_value_heads": 3},
            '"num_attention_heads" is 4, not a multiple of "num_key_value_heads"=3',
        ),
        ({"vocab_size": 10**5000}, '"vocab_size" is an integer of 16610 bits, not within'),
        ({"tie_word_embeddings": "x" * 10**6}, '"tie_word_embeddings" is \'xxx'),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(JaxtuneError, match=re.escape(message)) as raised:
        build_model(MIXTURE | changes)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 'rope_type="dynamic" is unknown (known: default'),
        ({"type": "longrope"}, 'rope_type="longrope" is unknown'),
        ({"rope_type": "lama3"}, 'rope_type="lama3" is unknown; did you mean "llama3"?'),
        ({"rope_type": 7}, 'rope_type="7" is unknown'),
        ([1], "is [1], not an object"),
        ("linear", "is 'linear', not an object"),
        ({"rope_type": "linear"}, "rope_type linear lacks 'factor'"),
        ({"rope_type": "linear", "factor": "two"}, "rope_type linear has"),
        ({"rope_type": "linear", "factor": 0}, '"factor" is 0, not a positive number'),
        (YARN | {"attention_factor": 1e999}, '"attention_factor" is inf, not a positive number'),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type llama3 lacks 'low_freq_factor'"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            '"low_freq_factor"=4.0 is more than "high_freq_factor"=1.0',
        ),
        (
            YARN | {"original_max_position_embeddings": None},
            "max_position_embeddings is null",
        ),
        ({"full_attention": YARN}, 'settings of its own for "full_attention"'),
        ({"rope_type": "default", "rope_theta": 0}, "rope_type default has"),
        ({"rope_type": "default", "rope_theta": -1.0}, "rope_type default has"),
        ({"rope_type": "default", "rope_theta": "big"}, "rope_type default has"),
        (YARN | {"original_max_position_embeddings": "16"}, "rope_type yarn has"),
        (YARN | {"beta_fast": -3}, "rope_type yarn has"),
        (YARN | {"rope_theta": 1}, "rope_type yarn has"),
        (YARN | {"factor": None, "original_max_position_embeddings": -4}, "rope_type yarn has"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_a_rope_that_is_not_one(place, scaling, message):
    with pytest.raises(JaxtuneError, match=re.escape(message)) as raised:
        build_model(GOOD | {place: scaling})
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("config.json: ")


def test_settings_without_new_information_are_accepted():
    config = GOOD | {
        "hidden_act": "silu",
        "use_sliding_window": True,
        "sliding_window": 4096,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * 2,
        "rope_scaling": None,
        "num_key_value_heads": None,
        "unknown_to_us": {"a": 1},
    }
    build_model(json.loads(json.dumps(config)))


class TestRead:
    def test_an_integer_is_accepted_as_a_float(self):
        assert read({"eps": 1}, "eps", float) == 1.0
        assert isinstance(read({"eps": 1}, "eps", float), float)

    def test_an_absent_key_takes_the_default(self):
        assert read({}, "a", int, 3) == 3
        assert size({}, "a", 3) == 3

    def test_null_is_not_an_absent_key(self):
        assert read({"a": None}, "a", bool, True) is False
        assert read({"a": None}, "a", int, 3, null=0) == 0
        with pytest.raises(JaxtuneError, match='"a" is null, not of type int'):
            read({"a": None}, "a", int, 3)

    def test_a_bool_is_not_a_number(self):
        with pytest.raises(JaxtuneError, match='"a" is True, not of type int'):
            read({"a": True}, "a", int)

    def test_an_absent_key_is_supported(self):
        require({}, "a", (1,))
