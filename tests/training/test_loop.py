"""The loop under real interruptions. Run as a program, this file is the run that is killed."""

import dataclasses
import itertools
import logging
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.inventory import BaseRecord
from jaxtune.runs.metrics import read_lines
from jaxtune.runs.record import Record
from jaxtune.training.loop.callbacks import Callback
from jaxtune.training.loop.trainer import Trainer
from jaxtune.training.optimizer import make_optimizer, make_schedule

SIZE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: Any
    trainable: Any
    opt_state: Any


class Loader:
    """Batches that depend on everything drawn before, as a shuffled and packed stream does.

    The batch numbered `poison` is not finite, and after the one numbered `last` none comes.
    """

    def __init__(self, poison=None, last=None):
        self.random, self.drawn = np.random.default_rng(7), 0
        self.poison, self.last = poison, last

    def __next__(self):
        if self.drawn == self.last:
            threading.Event().wait()
        self.drawn += 1
        batch = self.random.standard_normal((16, SIZE)).astype(np.float32)
        return batch * np.float32("nan") if self.drawn == self.poison else batch

    @property
    def rows(self):
        return 16 * self.drawn

    def state(self):
        return {"random": self.random.bit_generator.state, "drawn": self.drawn}

    def restore(self, state):
        self.random.bit_generator.state, self.drawn = state["random"], state["drawn"]


def settings(**sections):
    base = {
        "training": {"steps": 20},
        "optimizer": {"learning_rate": 3e-2, "warmup_steps": 3, "weight_decay": 0.1},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 4},
        "logging": {"tensorboard": False},
    }
    return resolve({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


def forward(trainable, batch):
    target = jnp.tanh(jnp.roll(batch, 1, axis=-1))
    return jnp.mean((jnp.tanh(batch @ trainable["proj"]["lora_A"]) - target) ** 2)


def problem(config):
    """Returns the first state and the jitted step of a small regression with dropout."""
    key = jax.random.key(config.training.seed)
    trainable = {"proj": {"lora_A": jax.random.normal(key, (SIZE, SIZE)) / SIZE}}
    schedule = make_schedule(config.optimizer, config.training.steps)
    optimizer = make_optimizer(config.optimizer, trainable, schedule)

    def step(state, batch):
        kept = jax.random.bernoulli(jax.random.fold_in(key, state.step), 0.9, batch.shape)
        loss, grads = jax.value_and_grad(forward)(state.trainable, batch * kept)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "tokens": jnp.int32(batch.size) + state.step,
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return State(state.step + 1, trainable, opt_state), metrics

    state = State(jnp.int32(0), trainable, optimizer.init(trainable))
    return state, jax.jit(step, donate_argnums=0)


HELD_OUT = np.random.default_rng(8).standard_normal((8, SIZE)).astype(np.float32)


def evaluate(trainable):
    return {"loss": float(forward(trainable, HELD_OUT))}


def save_adapter(trainable, directory):
    np.save(directory / "adapter.npy", np.asarray(trainable["proj"]["lora_A"]))


def record(run, config):
    """Records a config, and no base, because the problem has none."""
    run.record(Record({}, config, BaseRecord("", "", "", "", "", 1, {})), run.changes(config), {})


def train(directory, config, **changes):
    run = RunDirectory(directory)
    with run.start(config) as frozen:
        record(run, frozen)
        state, step = problem(frozen)
        parts = {"step": step, "loader": Loader(), "evaluate": evaluate} | changes
        return Trainer(save_adapter=save_adapter, run=run, config=frozen, **parts).fit(state)


def comparable(path):
    """Returns the lines without what a clock has measured."""
    clocked = {"tokens_per_second", "data_wait"}
    return [{k: v for k, v in e.items() if k not in clocked} for e in read_lines(path)]


def assert_same_run(left, right):
    left, right = RunDirectory(left), RunDirectory(right)
    assert comparable(left.metrics) == comparable(right.metrics)
    assert comparable(left.evaluations) == comparable(right.evaluations)
    for ours, theirs in [
        (left.adapter_last, right.adapter_last),
        (left.adapter_best, right.adapter_best),
    ]:
        assert (ours / "adapter.npy").read_bytes() == (theirs / "adapter.npy").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The directory of a run that nothing has happened to."""
    directory = tmp_path_factory.mktemp("unbroken")
    train(directory, settings())
    return directory


def test_a_run_learns_and_leaves_its_record(tmp_path):
    config = settings()
    state = train(tmp_path, config)
    run = RunDirectory(tmp_path)
    lines = read_lines(run.metrics)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    schedule = make_schedule(config.optimizer, config.training.steps)
    rates = [line["learning_rate"] for line in lines]
    # Compiled with the step, the last bits of the peak may differ.
    np.testing.assert_allclose(rates, [schedule(s) for s in range(20)], rtol=0, atol=3e-2 * 3e-7)
    assert [line["tokens"] for line in lines] == list(np.cumsum([16 * SIZE + s for s in range(20)]))
    assert [line["rows"] for line in lines] == [16 * number for number in range(1, 21)]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert [line["step"] for line in read_lines(run.evaluations)] == [4, 8, 12, 16, 20]
    assert Checkpoints(run.checkpoints).steps() == [18, 20]
    last = np.load(run.adapter_last / "adapter.npy")
    np.testing.assert_array_equal(last, state.trainable["proj"]["lora_A"])


def test_the_best_adapter_is_the_one_with_the_lowest_held_out_loss(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    seen = []

    def scripted(trainable):
        seen.append(np.asarray(trainable["proj"]["lora_A"]).copy())
        return {"loss": next(scores)}

    train(tmp_path, settings(), evaluate=scripted)
    best = np.load(RunDirectory(tmp_path).adapter_best / "adapter.npy")
    np.testing.assert_array_equal(best, seen[1])


def test_nothing_is_evaluated_without_a_held_out_set_or_with_every_0(tmp_path):
    train(tmp_path / "a", settings(), evaluate=None)
    train(tmp_path / "b", settings(evaluation={"every": 0}))
    for name in ("a", "b"):
        run = RunDirectory(tmp_path / name)
        assert read_lines(run.evaluations) == []
        assert run.adapter_last.exists()
        assert not run.adapter_best.exists()


def test_logging_and_checkpoints_can_be_rarer(tmp_path):
    train(tmp_path, settings(logging={"every": 8}, checkpoint={"every": 0}))
    run = RunDirectory(tmp_path)
    assert [line["step"] for line in read_lines(run.metrics)] == [8, 16]
    assert read_lines(run.metrics)[0]["tokens"] == sum(16 * SIZE + s for s in range(8))
    assert Checkpoints(run.checkpoints).steps() == [20]


def test_no_steps_leaves_the_adapter_one_begins_with(tmp_path):
    config = settings(training={"steps": 0}, optimizer={"warmup_steps": 0})
    train(tmp_path, config)
    start = problem(config)[0].trainable["proj"]["lora_A"]
    last = np.load(RunDirectory(tmp_path).adapter_last / "adapter.npy")
    np.testing.assert_array_equal(last, start)


def test_a_finished_run_stays_as_it_is(tmp_path):
    first = np.asarray(train(tmp_path, settings()).trainable["proj"]["lora_A"]).copy()
    before = RunDirectory(tmp_path).metrics.read_text()
    again = train(tmp_path, None).trainable["proj"]["lora_A"]
    np.testing.assert_array_equal(first, again)
    assert RunDirectory(tmp_path).metrics.read_text() == before


def test_metrics_are_read_after_the_next_update_was_queued(tmp_path):
    config = settings(checkpoint={"every": 0}, evaluation={"every": 0})
    state, step = problem(config)
    run, seen = RunDirectory(tmp_path), []

    def watched(state, batch):
        result = step(state, batch)
        seen.append(len(read_lines(run.metrics)))
        return result

    with run.start(config):
        Trainer(
            step=watched,
            loader=Loader(),
            evaluate=None,
            save_adapter=save_adapter,
            run=run,
            config=config,
        ).fit(state)
    assert seen == [max(0, number - 1) for number in range(20)]


def test_callbacks_get_metrics_after_the_next_step_was_queued(tmp_path):
    config = settings(checkpoint={"every": 0}, evaluation={"every": 0})
    _, step = problem(config)
    order = []

    class Seen(Callback):
        def on_step(self, event):
            order.append(("seen", event.step))

    def watched(state, batch):
        order.append(("queued", len([kind for kind, _ in order if kind == "queued"]) + 1))
        return step(state, batch)

    train(tmp_path, config, step=watched, callbacks=[Seen()])
    expected = [(kind, n) for n in range(1, 21) for kind, n in (("queued", n), ("seen", n - 1))]
    assert order == [each for each in expected if each[1]] + [("seen", 20)]


def test_a_run_that_a_callback_has_stopped_resumes_like_an_unbroken_one(tmp_path, unbroken):
    class Stopping(Callback):
        def on_step(self, event):
            if event.step == 10:
                event.stop()

    train(tmp_path, settings(), callbacks=[Stopping()])
    assert RunDirectory(tmp_path).steps_done() == 11  # the step that was running
    train(tmp_path, None)
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("poisoned", [6, 20])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, unbroken, poisoned):
    with pytest.raises(JaxtuneError, match=f"step {poisoned}: loss is nan"):
        train(tmp_path, settings(), loader=Loader(poison=poisoned))
    run = RunDirectory(tmp_path)
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(1, poisoned))
    with Checkpoints(run.checkpoints) as checkpoints:
        saved = checkpoints.latest_verified()
        assert saved == (poisoned - 1) // 3 * 3
    assert np.all(np.isfinite(np.load(run.adapter_last / "adapter.npy")))
    train(tmp_path, None)  # with sound batches the run goes on
    assert_same_run(tmp_path, unbroken)


def test_a_held_out_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(JaxtuneError, match="step 4: held-out loss is inf"):
        train(tmp_path, settings(), evaluate=lambda trainable: {"loss": float("inf")})
    assert read_lines(RunDirectory(tmp_path).evaluations) == []


def test_a_damaged_checkpoint_costs_steps_but_no_exactness(tmp_path, unbroken, caplog):
    with pytest.raises(JaxtuneError):
        train(tmp_path, settings(), loader=Loader(poison=14))
    run = RunDirectory(tmp_path)
    file = max((run.checkpoints / "12").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train(run.path, None)
    assert "moved to" in caplog.text
    assert (run.checkpoints / "quarantine" / "12").is_dir()
    assert_same_run(tmp_path, unbroken)


def test_a_resumed_run_keeps_no_more_checkpoints_than_asked(tmp_path):
    parts = {"evaluate": lambda trainable: {"loss": 1.0}}  # the first evaluation is the best
    config = settings(evaluation={"every": 3})
    with pytest.raises(JaxtuneError):
        train(tmp_path, config, loader=Loader(poison=5), **parts)
    train(tmp_path, None, **parts)
    assert Checkpoints(RunDirectory(tmp_path).checkpoints).steps() == [18, 20]


def test_a_run_that_resumes_within_a_profiled_window_traces_the_rest(tmp_path, caplog):
    with pytest.raises(JaxtuneError):
        train(tmp_path / "a", settings(profile={"steps": "2,8"}), loader=Loader(poison=7))
    run = RunDirectory(tmp_path / "a")
    shutil.rmtree(run.path / "profile")
    with caplog.at_level(logging.INFO, "jaxtune"):
        train(run.path, None)
    assert "profile.steps=2,8: the run resumes after step 6: tracing steps 7 to 8" in caplog.text
    assert list((run.path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(JaxtuneError):
        train(tmp_path / "b", settings(profile={"steps": "2,3"}), loader=Loader(poison=8))
    with caplog.at_level(logging.INFO, "jaxtune"):
        train(tmp_path / "b", None)
    assert "profile.steps=2,3: the run resumes after step 6: no trace" in caplog.text


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_saves_nothing_half_and_says_how_to_go_on(tmp_path, unbroken, caplog):
    evaluations = []

    def press(trainable):
        evaluations.append(evaluate(trainable))
        if len(evaluations) == 2:
            signal.raise_signal(signal.SIGINT)
        return evaluations[-1]

    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        train(tmp_path, settings(), evaluate=press)
    expected = f"jaxtune train --workdir {tmp_path} resumes from the checkpoint of step 6"
    assert expected in caplog.text
    run = RunDirectory(tmp_path)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["3", "6"]
    train(tmp_path, None)
    assert_same_run(tmp_path, unbroken)


def resume(directory, evaluate, **sections):
    """Resumes a run with changed sections; returns the steps of its evaluations and its tally."""
    run = RunDirectory(directory)
    config = run.read_config().replace(**sections)
    record(run, config)
    train(directory, None, evaluate=evaluate)
    with Checkpoints(run.checkpoints) as checkpoints:
        _, extra = checkpoints.restore(run.steps_done(), problem(config)[0])
    return [line["step"] for line in read_lines(run.evaluations)], extra["tally"]


def test_a_run_that_stopped_early_continues_if_it_is_lengthened(tmp_path):
    rising = itertools.count(1)
    scores = {"evaluate": lambda trainable: {"loss": float(next(rising))}}
    train(tmp_path, settings(evaluation={"stop_patience": 2}), **scores)
    steps, tally = resume(tmp_path, **scores)
    assert steps == [4, 8, 12] and tally["stopped"]
    steps, tally = resume(tmp_path, training={"steps": 40}, **scores)
    assert steps == [4, 8, 12, 16, 20] and tally["stopped"] and tally["best_step"] == 4
    steps, tally = resume(tmp_path, evaluation={"stop_patience": 0}, **scores)
    assert steps[-1] == 40 and not tally["stopped"]


def test_another_metric_selects_the_best_step_anew(tmp_path):
    def scored(trainable):
        loss = evaluate(trainable)["loss"]
        return {"loss": loss, "token_accuracy": loss}

    train(tmp_path, settings(), evaluate=scored)
    metric = {"stop_metric": "token_accuracy"}
    training = {"steps": 28}
    _, tally = resume(tmp_path, scored, evaluation=metric, training=training)
    losses = {line["step"]: line["loss"] for line in read_lines(tmp_path / "evaluations.jsonl")}
    assert losses[20] < losses[4]
    later = {step: loss for step, loss in losses.items() if step > 20}
    assert tally["best_step"] == max(later, key=later.__getitem__)


def kill_when(process, metrics, lines, delay):
    """Kills a run `delay` seconds after its log has reached a number of lines."""
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            break
        time.sleep(0.001)
    process.kill()
    return process.wait()


def test_a_run_killed_again_and_again_has_the_losses_of_an_unbroken_one(tmp_path, unbroken):
    run, chance = RunDirectory(tmp_path), random.Random(0)
    with run.start(settings()):
        pass
    command = [sys.executable, __file__, str(tmp_path)]
    for lines in (5, 13):
        # Out of batches, a run cannot end before it is killed, however late that is.
        process = subprocess.Popen([*command, str(lines + 4)])
        code = kill_when(process, run.metrics, lines, chance.uniform(0, 0.01))
        assert code == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert_same_run(tmp_path, unbroken)
    assert [line["step"] for line in read_lines(run.metrics)] == list(range(1, 21))


@pytest.mark.slow
def test_many_kills_at_any_moment(tmp_path):
    config = settings(training={"steps": 60}, checkpoint={"every": 1}, evaluation={"every": 2})
    train(tmp_path / "unbroken", config)
    run, chance = RunDirectory(tmp_path / "killed"), random.Random(1)
    with run.start(config):
        pass
    command = [sys.executable, __file__, str(run.path)]
    for _ in range(8):
        done = len(read_lines(run.metrics))
        lines = done + chance.randint(0, 4)
        kill_when(subprocess.Popen(command), run.metrics, lines, chance.uniform(0, 0.1))
    subprocess.run(command, check=True)
    assert_same_run(tmp_path / "unbroken", run.path)


if __name__ == "__main__":
    train(sys.argv[1], None, loader=Loader(last=int(sys.argv[2]) if sys.argv[2:] else None))
