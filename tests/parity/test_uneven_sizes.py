"""Logits, loss and gradients equal those of one device for sizes that the mesh does not divide.

Run as a program with four devices, this file computes them on each mesh.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import LOGITS, LOSS, load_torch, make_examples, random_tokens, relative, torch_logits
from parts import as_batch
from test_training import keep_gradient

import jaxtune
from jaxtune.adapters.projections.lora import Lora
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.checkpoints.load_model import load_model
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.generation.sampling import Sampling
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import flatten
from jaxtune.models.definition import undivided
from jaxtune.objectives.sft import sft_loss
from jaxtune.parallel.mesh import make_mesh, named_sharding
from jaxtune.planning.plan import plan
from jaxtune.training.state import initial_state, state_like
from jaxtune.training.step import StepSettings, make_train_step

# All sizes are odd, except for layers and the head size, which rotary embeddings halve.
ODD = {
    "vocab_size": 161,
    "hidden_size": 45,
    "intermediate_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
}
MODELS = {
    "odd": ("llama", ODD | {"tie_word_embeddings": True}),
    "one key-value head": ("qwen2", ODD | {"hidden_size": 48, "num_key_value_heads": 1}),
    "mixture": ("deepseek_v3", {"vocab_size": 161, "moe_intermediate_size": 25}),
}
MESHES = {
    "odd": {"fsdp": 2, "tensor": 2},
    "one key-value head": {"tensor": 4},
    "mixture": {"expert": 2, "tensor": 2},
}
TOKENS = random_tokens(1, 3, 13)


def compute(name, directory):
    """Yields the name, results (logits, new tokens, loss, gradient) and undivided sizes by mesh."""
    for which, sizes in {"one": {}, "mesh": MESHES[name]}.items():
        devices = jax.devices()[: 4 if sizes else 1]
        mesh = make_mesh({**resolve({}).mesh.to_dict(), "data": 1, **sizes}, devices)
        model = jaxtune.load(directory, dtype="float32", mesh=mesh, progress=False)
        results = {"logits": model.logits(TOKENS)}
        if name != "mixture":  # which compiles slowly
            prompts = [row[:5].tolist() for row in TOKENS]
            new = model.generate_tokens(prompts, 4, Sampling())
            results["new"] = np.array([(row + [-1] * 4)[:4] for row in new])
            results |= train(directory, mesh)
        yield which, results, undivided(model.definition, mesh.shape)


def train(directory, mesh):
    """Returns the loss and the gradient of the LoRA factors, by path."""
    method = Lora(4, 8.0, targets=("all-linear",))
    parts = load_model(open_source(directory), "float32", mesh, method=method, progress=False)
    optimizer = keep_gradient()
    like = state_like(parts.definition, optimizer, mesh)
    step = make_train_step(
        parts.definition,
        sft_loss,
        optimizer,
        optax.constant_schedule(1.0),
        ForwardOptions(jnp.float32, "xla", "full"),
        StepSettings(1, 0, False),
        like,
    )
    rows = make_examples(4, longest=16, seed=4, vocabulary=161)
    batch = {
        key: jax.device_put(value, named_sharding(mesh, ("batch", "sequence"), value.shape))
        for key, value in as_batch(rows, 4, length=16, packing=False).items()
    }
    with jax.set_mesh(mesh):
        state = initial_state(jax.tree.map(jnp.copy, parts.trainable), optimizer, like)
        state, metrics = step(state, parts.base, parts.constants, batch)
    return {"loss": metrics["loss"]} | {
        ".".join(path): leaf for path, leaf in flatten(state.opt_state)
    }


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_a_mesh_does_not_divide_give_the_same_result(name, tiny, families, tmp_path):
    model_type, changes = MODELS[name]
    make = families if model_type == "deepseek_v3" else tiny
    directory = make(model_type, **changes)
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, __file__, name, str(directory), str(tmp_path)],
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        check=True,
    )
    one, mesh = (dict(np.load(tmp_path / f"{which}.npz")) for which in ("one", "mesh"))
    if name != "mixture":  # torch's grouped products take no width of 25
        assert relative(mesh["logits"], torch_logits(load_torch(directory), TOKENS)) <= LOGITS
        np.testing.assert_array_equal(mesh.pop("new"), one.pop("new"))
        assert len([value for value in one.values() if np.any(value)]) > 4
    for key, value in one.items():
        if np.any(value):
            assert relative(mesh[key], value) <= (LOGITS if key == "logits" else LOSS), key
    lines = json.loads((tmp_path / "mesh.json").read_text())
    assert json.loads((tmp_path / "one.json").read_text()) == []
    assert any("does not divide 161" in line and "--vocab-size 16" in line for line in lines)


def test_experts_that_do_not_divide_are_refused_on_the_command_line_only(families):
    directory = families("deepseek_v3")
    settings = {"model": {"path": str(directory)}, "mesh": {"data": 1}}
    settings |= {"training": {"batch_size": 6}, "adapter": {"targets": "all-linear"}}
    message = "mesh.expert=3 cannot be used with .*, 8 routed experts; .* mesh.expert=1$"
    with pytest.raises(JaxtuneError, match=message):
        plan(resolve(settings, ["mesh.expert=3"]), "h100:3")
    # A size in a config file is a limit.
    settings["mesh"] |= {"expert": 3}
    assert plan(resolve(settings), "h100:3").mesh["expert"] == 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    target = Path(sys.argv[3])
    for which, arrays, lines in compute(sys.argv[1], Path(sys.argv[2])):
        np.savez(target / f"{which}.npz", **{k: np.asarray(v) for k, v in arrays.items()})
        (target / f"{which}.json").write_text(json.dumps(lines))
