"""What an export will refuse is known before the training, by the checks of the export itself."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune.adapter_files import EXPORTS, refused_exports
from jaxtune.adapters import method_from_config
from jaxtune.adapters.define import define
from jaxtune.adapters.esft.esft import Esft
from jaxtune.config import AdapterConfig, resolve
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import read_object
from jaxtune.training.setup import set_up
from jaxtune.training.train import _log_setup

CASES = {
    "lora": ("llama", {}),
    "lora, rslora, patterns": ("qwen2", {"rslora": True, "rank_pattern": ("q_proj=9",)}),
    "rank": ("llama", {"rank": 600}),
    "head": ("llama", {"modules_to_save": ("lm_head",)}),
    "biases": ("qwen2", {"bias": "all"}),
    "latent": ("deepseek_v3", {}),
    "latent, all": ("deepseek_v2", {"targets": ("all",)}),
    "latent, as the recipes": ("deepseek_v3", {"targets": ("q_a_proj", "q_b_proj", "o_proj")}),
    "experts": ("deepseek_v3", {"targets": ("experts",)}),
    "router": ("deepseek_v2", {"targets": ("mlp.gate", "o_proj")}),
    "pissa": ("llama", {"method": "pissa"}),
    "dora": ("llama", {"method": "dora"}),
    "vera": ("llama", {"method": "vera"}),
    "ia3": ("llama", {"method": "ia3"}),
    "bitfit": ("qwen2", {"method": "bitfit"}),
    "prompt": ("llama", {"method": "prompt"}),
    "ptuning": ("llama", {"method": "ptuning"}),
    "prefix": ("deepseek_v3", {"method": "prefix"}),
    "bottleneck": ("llama", {"method": "bottleneck"}),
}
REFUSED = {
    **{"rank": "ranks up to 512, not 600", "head": "modules_to_save", "biases": 'bias="all"'},
    **{
        "latent": "leave it out of adapter.targets",
        "latent, all": "leave it out",
        "router": "gate",
    },
    **{"dora": "this one is DoRA", "vera": "VERA", "ia3": "IA3", "bitfit": "BITFIT"},
    **{"prompt": "--format peft", "ptuning": "--format peft", "prefix": "--format peft"},
    "bottleneck": "--format peft",
}


def _stored(method, definition):
    """Returns an adapter with real arrays."""
    zeros = [
        jax.tree.map(lambda like: np.zeros(like.shape, np.float32), definition.abstract(kind))
        for kind in ("trainable", "constants")
    ]
    return method.store(definition, *zeros)


@pytest.mark.parametrize("case", CASES)
def test_the_announced_refusals_are_those_of_the_exports(case, tiny, families):
    family, settings = CASES[case]
    checkpoint = (families if family.startswith("deepseek") else tiny)(family)
    method = method_from_config(AdapterConfig(**{"rank": 2, **settings}))
    definition = define(read_object(checkpoint / "config.json"), "float32", method)
    announced = refused_exports(method, definition)
    assert ("merged" in announced) == (not method.can_merge)
    stored = _stored(method, definition)
    for target, export in EXPORTS.items():
        try:
            export(stored, definition)
        except JaxtuneError as error:
            assert announced[target] == str(error)
        else:
            assert target not in announced
    assert (REFUSED[case] in announced["vllm"]) if case in REFUSED else "vllm" not in announced


@pytest.mark.parametrize("case", ["lora", "biases", "head", "experts", "pissa", "vera", "prefix"])
def test_an_outline_has_the_shapes_of_the_stored_adapter(case, tiny, families):
    family, settings = CASES[case]
    checkpoint = (families if family.startswith("deepseek") else tiny)(family)
    method = method_from_config(AdapterConfig(**{"rank": 2, **settings}))
    definition = define(read_object(checkpoint / "config.json"), "float32", method)
    outline = method.outline(definition)
    stored = _stored(method, definition)
    assert outline.config == stored.config
    assert {k: (v.shape, v.dtype) for k, v in outline.tensors.items()} == {
        k: (v.shape, v.dtype) for k, v in stored.tensors.items()
    }


def test_an_outline_takes_no_memory(tiny):
    method = method_from_config(AdapterConfig(rank=400_000_000, targets=("all",)))
    settings = read_object(tiny("llama") / "config.json")
    outline = method.outline(define(settings, "float32", method))
    assert sum(value.size for value in outline.tensors.values()) > 10**12
    assert all(np.shares_memory(value, value.base) for value in outline.tensors.values())
    assert "ranks up to 512" in refused_exports(method, define(settings, "float32", method))["vllm"]


def test_esft_is_announced_for_a_large_model():
    path = Path(__file__).parents[1] / "models" / "configs" / "deepseek-v3.json"
    method = Esft(experts=tuple((layer, tuple(range(64))) for layer in range(3, 61)))
    refused = refused_exports(method, define(read_object(path), "float32", method))
    assert "ESFT" in refused["vllm"] and "merged" not in refused


def test_training_announces_them_at_the_start(families, caplog):
    checkpoint = families("deepseek_v3")
    config = resolve({"model": {"path": str(checkpoint)}, "training": {"dtype": "float32"}})
    method = method_from_config(config.adapter)
    with caplog.at_level("INFO"):
        _log_setup(
            set_up(config, read_object(checkpoint / "config.json"), method, jax.devices()[:1])
        )
    (line,) = [record.message for record in caplog.records if "jaxtune export" in record.message]
    assert line.startswith("jaxtune export --format vllm will not be possible: vLLM absorbs kv_b_p")
    assert line.endswith("or leave it out of adapter.targets")
