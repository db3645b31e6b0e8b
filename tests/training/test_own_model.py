"""What a run measures while it trains is what its model gives afterwards, however it is loaded."""

import json

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.api.evaluate_run import evaluate
from jaxtune.runs.directory import RunDirectory

# Sums of one float32 program in another order: a loss averages the errors of its tokens.
SAME = 1e-6
METHODS = {
    "lora": {"targets": "all-linear"},
    "dora": {"targets": "q_proj,down_proj"},
    "pissa": {"targets": "all-linear"},
    "vera": {"targets": "o_proj,up_proj"},
    "ia3": {"targets": "k_proj,v_proj,down_proj"},
    "bitfit": {"targets": "o_proj,down_proj"},
    "prefix": {"virtual_tokens": 3},
    "prompt": {"virtual_tokens": 3},
    "ptuning": {"virtual_tokens": 3},
    "bottleneck": {"reduction_factor": 4.0},
    "esft": {"expert_threshold": 0.5},
    "full": {"freeze": r"model\.layers\.0,model\.embed_tokens"},
}
QUICK = {("pissa", "nf4")}
CASES = [
    pytest.param(method, form, marks=() if (method, form) in QUICK else pytest.mark.slow)
    for method in METHODS
    for form in ("", "nf4")
    if form or method in ("pissa", "prefix", "esft", "full")
]


def write_rows(path, seed):
    """Rows of one length, so that an evaluation and one batch of logits see the same tokens."""
    drawn = np.random.default_rng(seed).integers(3, 160, (4, 12)).tolist()
    path.write_text("".join(json.dumps({"input_ids": r, "labels": r}) + "\n" for r in drawn))
    return str(path), np.array(drawn)


def loss_of(model, tokens):
    """The mean cross-entropy of each token given those before it, in nats."""
    logits = model.logits(tokens)[:, :-1]
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], -1)
    return -float(np.mean(chosen, dtype=np.float64))


@pytest.mark.parametrize(("method", "form"), CASES)
def test_a_run_is_loaded_as_it_was_trained(method, form, tiny, deepseek, tmp_path):
    train, _ = write_rows(tmp_path / "train.jsonl", 0)
    held_out, tokens = write_rows(tmp_path / "eval.jsonl", 1)
    model = deepseek if method == "esft" else tiny("llama", num_hidden_layers=2)
    config = {
        "model": {"path": str(model)},
        "data": {"train": train, "eval": held_out, "max_length": 16, "packing": False},
        "adapter": {"method": method, "rank": 4, "alpha": 4.0, **METHODS[method]},
        "quantize": {"format": form},
        "training": {"steps": 4, "batch_size": 4, "dtype": "float32"},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        "evaluation": {"every": 4, "batch_size": 4},
        "logging": {"tensorboard": False},
    }
    run = jaxtune.train(config, tmp_path / "run")
    logged = run.evaluations()[-1]
    assert logged["step"] == 4
    again = evaluate(RunDirectory(run.path), "last")
    assert again["loss"] == pytest.approx(logged["loss"], rel=SAME)
    loaded = run.model("last")
    assert loss_of(loaded, tokens) == pytest.approx(logged["loss"], rel=SAME)
    if method == "pissa":
        with pytest.raises(jaxtune.JaxtuneError, match="pissa has edited the base for the adapter"):
            loaded.use(None)
    # The base alone is something else, and the same to both.
    base = evaluate(RunDirectory(run.path), "none")["loss"]
    assert abs(base - logged["loss"]) > 1e-3
    assert loss_of(run.model("none"), tokens) == pytest.approx(base, rel=SAME)


@pytest.fixture(scope="session")
def deepseek(tiny, tmp_path_factory):
    """A tiny mixture of experts."""
    experts = {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 24}
    latent = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    routing = {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_group": 1, "n_group": 1}
    return tiny(
        "deepseek_v3",
        **experts,
        **latent,
        **routing,
        qk_nope_head_dim=16,
        head_dim=8,
        num_hidden_layers=2,
        num_key_value_heads=4,
    )
