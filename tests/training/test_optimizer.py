import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

import jaxtune
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.training.optimizer import (
    clip_by_global_norm,
    decay_mask,
    make_schedule,
)
from jaxtune.training.optimizer import make_optimizer as make_scheduled_optimizer

ORACLE_SCHEDULES = {
    "wsd": transformers.get_wsd_schedule,
    "constant": transformers.get_constant_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
    "cosine": transformers.get_cosine_schedule_with_warmup,
}


def config(**optimizer):
    return resolve({"optimizer": optimizer}).optimizer


def make_optimizer(settings, trainable, steps=20):
    return make_scheduled_optimizer(settings, trainable, make_schedule(settings, steps))


def oracle_scheduler(name, optimizer, warmup, steps):
    length = {} if name == "constant" else {"num_training_steps": steps}
    if name == "wsd":
        length |= {"num_decay_steps": 4, "decay_type": "linear"}
    return ORACLE_SCHEDULES[name](optimizer, num_warmup_steps=warmup, **length)


@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
@pytest.mark.parametrize("name", sorted(ORACLE_SCHEDULES))
def test_schedule_has_the_values_of_transformers(name, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    scheduler = oracle_scheduler(name, optimizer, warmup, 20)
    schedule = jax.jit(
        make_schedule(
            config(schedule=name, warmup_steps=warmup, learning_rate=3e-4, decay_steps=0.2), 20
        )
    )
    expected, values = [], []
    updates = 20 if warmup == 20 else 21  # a run all of warm-up ends at the peak
    for update in range(updates):
        expected.append(scheduler.get_last_lr()[0])
        values.append(schedule(jnp.int32(update)))
        optimizer.step()
        scheduler.step()
    # Ours is computed in float32, theirs in float64: a few units in the last place of the peak.
    np.testing.assert_allclose(values, expected, rtol=0, atol=3e-4 * 3e-7)


def gradients(seed):
    random = np.random.default_rng(seed)
    # From far below to far above the clip.
    scale = 10.0 ** random.uniform(-3, 3)
    return {
        "q_proj": {"lora_A": (scale * random.standard_normal((2, 4, 8))).astype(np.float32)},
        "input_layernorm": {"weight": (scale * random.standard_normal((2, 8))).astype(np.float32)},
        "o_proj": {"bias": (scale * random.standard_normal((2, 8))).astype(np.float32)},
    }


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_with_clipping_decay_and_schedule_follows_torch(clip_norm):
    settings = config(
        learning_rate=1e-2, weight_decay=0.1, clip_norm=clip_norm, warmup_steps=5, b2=0.95
    )
    trainable = jax.tree.map(jnp.asarray, gradients(99))
    optimizer = make_optimizer(settings, trainable)
    state = optimizer.init(trainable)

    @jax.jit
    def update(trainable, state, grads):
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    theirs = jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(np.asarray(x))), trainable)
    decayed, plain = [theirs["q_proj"]["lora_A"]], jax.tree.leaves(theirs)
    plain = [p for p in plain if p is not decayed[0]]
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    scheduler = oracle_scheduler("cosine", oracle, 5, 20)
    for seed in range(20):
        grads = gradients(seed)
        trainable, state = update(trainable, state, grads)
        jax.tree.map(lambda p, g: setattr(p, "grad", torch.tensor(g)), theirs, grads)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(decayed + plain, clip_norm)
        oracle.step()
        scheduler.step()
    # Bias correction in float32 is off by 6e-6 of an update; 20 updates of at most 1e-2.
    jax.tree.map(
        lambda ours, p: np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-6, atol=2e-6),
        trainable,
        theirs,
    )


@pytest.mark.parametrize("norm", [1e-9, 0.5, 1.0, 1e6])
def test_clip_follows_torch(norm):
    grads = {"a": np.full((3, 3), norm / 5, np.float32), "b": np.full(16, norm / 5, np.float32)}
    ours, _ = clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    parameters = [torch.nn.Parameter(torch.zeros(3, 3)), torch.nn.Parameter(torch.zeros(16))]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = torch.tensor(grad)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for mine, parameter in zip(ours.values(), parameters, strict=True):
        # One float32 rounding in each of norm, quotient and product.
        np.testing.assert_allclose(mine, parameter.grad.numpy(), rtol=5e-7)


def test_decay_spares_norms_and_biases_whatever_their_rank():
    tree = {
        "layers": {
            "input_layernorm": {"weight": jnp.ones((2, 3))},
            "self_attn": {
                "q_norm": {"weight": jnp.ones((2, 3))},
                "q_proj": {"lora_A": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))},
                "unbiased": {"weight": jnp.ones(3)},
            },
        },
        "norm": {"weight": jnp.ones(3)},
        "0.mlp.up_proj.bias": jnp.ones(3),
        "embed_tokens": {"weight": jnp.ones(3)},
    }
    assert decay_mask(tree) == {
        "layers": {
            "input_layernorm": {"weight": False},
            "self_attn": {
                "q_norm": {"weight": False},
                "q_proj": {"lora_A": True, "bias": False},
                "unbiased": {"weight": True},
            },
        },
        "norm": {"weight": False},
        "0.mlp.up_proj.bias": False,
        "embed_tokens": {"weight": True},
    }


def test_zero_padding_stays_exactly_zero_under_decay():
    trainable = {"lora_A": jnp.zeros((2, 4))}
    optimizer = make_optimizer(config(weight_decay=0.1, schedule="constant"), trainable)
    state = optimizer.init(trainable)
    for _ in range(3):
        updates, state = optimizer.update({"lora_A": jnp.zeros((2, 4))}, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert not np.any(np.asarray(trainable["lora_A"]))


def test_moments_are_float32():
    trainable = {"lora_A": jnp.ones((2, 4), jnp.float32)}
    state = make_optimizer(config(), trainable).init(trainable)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2
    assert all(leaf.dtype == jnp.float32 for leaf in moments)


def test_donation_gives_the_same_bits():
    settings = config(weight_decay=0.1)

    def train(**options):
        trainable = jax.tree.map(jnp.asarray, gradients(99))
        optimizer = make_optimizer(settings, trainable)

        def update(trainable, state, grads):
            updates, state = optimizer.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state

        jitted, state = jax.jit(update, **options), optimizer.init(trainable)
        for seed in range(5):
            trainable, state = jitted(trainable, state, gradients(seed))
        return trainable

    jax.tree.map(np.testing.assert_array_equal, train(), train(donate_argnums=(0, 1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamv"}, 'optimizer.name="adamv" is unknown; did you mean "adamw"?'),
        ({"schedule": "cosin"}, 'optimizer.schedule="cosin" is unknown; did you mean "cosine"?'),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(JaxtuneError) as error:
        config(**settings)
    assert message in str(error.value)


def test_a_warm_up_longer_than_the_run_is_said(caplog):
    schedule = make_schedule(config(warmup_steps=40, learning_rate=1e-3), 20)
    assert "optimizer.warmup_steps=40 exceeds the 20 steps of the run" in caplog.text
    assert float(schedule(20)) == pytest.approx(0.5e-3, rel=1e-6)


def test_a_run_warns_of_its_warm_up_once(tiny_chat, chats, tmp_path, caplog):
    for length in ({"steps": 2}, {"epochs": 0.05}):
        caplog.clear()
        sections = {
            "model": {"path": str(tiny_chat)},
            "data": {"train": str(chats), "max_length": 64},
            "training": {"batch_size": 2, **length},
            "optimizer": {"warmup_steps": 40},
        }
        jaxtune.train(sections, tmp_path / next(iter(length)))
        assert caplog.text.count("optimizer.warmup_steps=40 exceeds the ") == 1


def test_lora_plus_scales_the_rate_of_b_alone():
    """AdamW with decay at the ratio times the rate, for B; at the rate, for all else."""
    random = np.random.default_rng(0)
    trainable, gradient = (
        {
            name: jnp.asarray(random.standard_normal((2, 3)), jnp.float32)
            for name in ("lora_A", "lora_B")
        }
        for _ in range(2)
    )

    def updated(**settings):
        sections = {"optimizer": {"weight_decay": 0.1, "clip_norm": 0.0} | settings}
        optimizer = make_optimizer(resolve(sections).optimizer, trainable)
        return optimizer.update(gradient, optimizer.init(trainable), trainable)[0]

    plain, faster = updated(learning_rate=1e-3), updated(learning_rate=4e-3)
    both = updated(learning_rate=1e-3, lora_plus_ratio=4.0)
    np.testing.assert_array_equal(both["lora_A"], plain["lora_A"])
    np.testing.assert_allclose(both["lora_B"], faster["lora_B"], rtol=1e-6)


def test_a_warm_up_may_be_a_share_of_the_run():
    share, count = (make_schedule(config(warmup_steps=w), 30) for w in (0.1, 3))
    assert [float(share(step)) for step in range(31)] == [float(count(step)) for step in range(31)]
    with pytest.raises(
        JaxtuneError, match=r"warmup_steps takes a whole number, or a share below 1"
    ):
        config(warmup_steps=1.5)


def follow(settings, oracle_of, shape, tolerance):
    """Makes 12 updates by ours and by an oracle of torch; holds every one of them together."""
    random = np.random.default_rng(3)
    start = random.standard_normal(shape).astype(np.float32)
    trainable = {"q_proj": {"weight": jnp.asarray(start)}}
    optimizer = make_optimizer(settings, trainable)
    state, parameter = optimizer.init(trainable), torch.nn.Parameter(torch.tensor(start))
    oracle = oracle_of([parameter])
    for _ in range(12):
        gradient = random.standard_normal(shape).astype(np.float32)
        updates, state = optimizer.update({"q_proj": {"weight": gradient}}, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        parameter.grad = torch.tensor(gradient)
        oracle.step()
        ours = np.asarray(trainable["q_proj"]["weight"])
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=0, atol=tolerance)
    return state


PLAIN = {"schedule": "constant", "clip_norm": 0.0, "learning_rate": 1e-2}


def test_sgd_with_momentum_follows_torch():
    follow(
        config(name="sgd", b1=0.8, **PLAIN),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.8),
        (7, 5),
        1e-6,  # rounding, of 12 updates of some 1e-2
    )


@pytest.mark.parametrize("shape", [(160, 130), (7, 5)], ids=["factored", "whole"])
def test_adafactor_follows_torch(shape):
    # transformers' own, which factors matrices of any size: so a vector stands for a small one.
    shape = shape if min(shape) >= 128 else (35,)
    follow(
        config(name="adafactor", weight_decay=0.1, **PLAIN),
        lambda parameters: transformers.Adafactor(
            parameters, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False
        ),
        shape,
        3e-6,  # the last place of a weight of 3 is 2.4e-7, and rounded twice in 12 updates
    )


class Lion(torch.optim.Optimizer):
    """The pseudocode of Chen et al., 2023, line by line."""

    def __init__(self, parameters, lr, b1, b2, decay):
        super().__init__(parameters, {})
        self.lr, self.b1, self.b2, self.decay = lr, b1, b2, decay
        self.m = 0.0

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            update = torch.sign(self.b1 * self.m + (1 - self.b1) * parameter.grad)
            self.m = self.b2 * self.m + (1 - self.b2) * parameter.grad
            parameter -= self.lr * (update + self.decay * parameter)


def test_lion_follows_its_paper():
    follow(
        config(name="lion", b1=0.9, b2=0.99, weight_decay=0.1, **PLAIN),
        lambda parameters: Lion(parameters, 1e-2, 0.9, 0.99, 0.1),
        (7, 5),
        1e-6,
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_the_first_moment_may_be_kept_in_bfloat16(name):
    trainable = {"lora_A": jnp.ones((2, 4), jnp.float32)}
    optimizer = make_optimizer(config(name=name, moment_dtype="bfloat16"), trainable)
    state = optimizer.init(trainable)
    updates, state = optimizer.update(trainable, state, trainable)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments[0].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in moments[1:])
    assert updates["lora_A"].dtype == jnp.float32


def test_groups_have_rates_of_their_own():
    trainable = {
        "model": {
            "layers.0": {"q_proj": {"lora_A": jnp.ones(3), "lora_B": jnp.ones(3)}},
            "embed_tokens": {"weight": jnp.ones(3)},
        }
    }
    settings = config(name="sgd", b1=0.0, group_rates="q_proj.lora_B=4e-2,embed_.*=0.1x", **PLAIN)
    optimizer = make_optimizer(settings, trainable)
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="."): -float(leaf[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert moved == {
        "model.layers.0.q_proj.lora_A": pytest.approx(1e-2),
        "model.layers.0.q_proj.lora_B": pytest.approx(4e-2),
        "model.embed_tokens.weight": pytest.approx(1e-3),
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lora_b=4e-4", '"lora_b" matches no trainable; did you mean "lora_B"?'),
        ("lora_B=fast", '"lora_B=fast" is not a pattern and its rate, such as lora_B=4e-4'),
        ("lora_B", '"lora_B" is not a pattern and its rate'),
        ("lora_[=1", '"lora_[=1" is not a pattern and its rate'),
    ],
)
def test_a_bad_group_is_named(entry, message):
    with pytest.raises(JaxtuneError) as error:
        make_optimizer(config(group_rates=entry), {"lora_B": jnp.ones(2)})
    assert message in str(error.value)
