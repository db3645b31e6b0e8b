"""Checkpoints under real faults. Run as a program, this file is the process that is killed."""

import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from disks import small_disk

from jaxtune.errors import JaxtuneError
from jaxtune.parallel import failures
from jaxtune.parallel.time_limits import TimeLimit
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.manifest import write_manifest


def state(seed=0, size=64):
    random = np.random.default_rng(seed)
    trainable = {
        "layers": {
            "q_proj": {"lora_A": jnp.asarray(random.standard_normal((2, size)), jnp.float32)}
        },
        "model.norm": jnp.asarray([1.0, -0.0, jnp.inf, jnp.nan, 1e-42], jnp.float32),
        "half": jnp.asarray(random.standard_normal((3, 5)), jnp.bfloat16),
    }
    return {
        "step": jnp.int32(seed),
        "trainable": trainable,
        "opt_state": optax.adamw(1e-3).init(trainable),
    }


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(directory, steps, keep=5):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"loader": {"position": step}})


def array_file(directory, step):
    return max((directory / str(step) / "state").rglob("d/*"), key=lambda f: f.stat().st_size)


def test_round_trip_keeps_every_bit_and_the_structure(tmp_path):
    tree = state(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, tree, {"loader": {"position": 3}, "best": 0.1})
        assert checkpoints.latest_verified() == 3
        restored, extra = checkpoints.restore(3, like(tree))
    assert_same_bits(restored, tree)
    assert extra == {"loader": {"position": 3}, "best": 0.1}


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    tree = state(1, size=200_000)
    expected = jax.tree.map(np.array, tree)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        shapes = like(tree)
        overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 + 7, t), donate_argnums=0)
        jax.block_until_ready(overwrite(tree))
        restored, _ = checkpoints.restore(1, shapes)
    assert_same_bits(jax.tree.map(np.asarray, restored), expected)


def test_rotation_keeps_the_newest(tmp_path):
    save_all(tmp_path, range(1, 6), keep=2)
    assert Checkpoints(tmp_path).steps() == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]


def test_a_deletion_that_was_interrupted_is_completed(tmp_path):
    save_all(tmp_path, [1, 2], keep=2)
    (tmp_path / "1" / "manifest.json").unlink()  # the first file that a deletion removes
    save_all(tmp_path, [3], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


def test_rotation_does_not_count_a_step_that_lost_a_file(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {})
        checkpoints.wait()
        array_file(tmp_path, 3).unlink()
        checkpoints.save(4, state(4), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3, 4]


def test_a_single_checkpoint_is_not_enough(tmp_path):
    with pytest.raises(JaxtuneError, match=r"checkpoint\.keep must be at least 2, not 1"):
        Checkpoints(tmp_path, keep=1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit_manifest(step, change):
    path = step / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


FAULTS = {
    "flipped bit": lambda d: flip(array_file(d, 3)),
    "truncated array": lambda d: truncate(array_file(d, 3)),
    "missing array": lambda d: array_file(d, 3).unlink(),
    "changed loader state": lambda d: flip(d / "3" / "extra.json"),
    "broken manifest": lambda d: truncate(d / "3" / "manifest.json"),
    "empty manifest": lambda d: (d / "3" / "manifest.json").write_text("{}"),
    "file that the manifest lacks": lambda d: edit_manifest(d / "3", lambda m: m.popitem()),
    "new file": lambda d: (d / "3" / "state" / "more").write_text("x"),
    "entry without a file": lambda d: edit_manifest(d / "3", lambda m: m.update(x=[0, "0"])),
    "no manifest": lambda d: (d / "3" / "manifest.json").unlink(),
    "missing state": lambda d: shutil.rmtree(d / "3" / "state"),
    "nothing at all": lambda d: (shutil.rmtree(d / "3"), (d / "3").mkdir()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, fault):
    save_all(tmp_path, [1, 2, 3])
    FAULTS[fault](tmp_path)
    with Checkpoints(tmp_path) as checkpoints:
        with caplog.at_level(logging.WARNING):
            assert checkpoints.latest_verified() == 2
        assert str(tmp_path / "3") in caplog.text
        assert (tmp_path / "quarantine" / "3").is_dir()
        assert not (tmp_path / "3").exists()
        restored, extra = checkpoints.restore(2, like(state()))
        assert_same_bits(restored, state(2))
        assert extra == {"loader": {"position": 2}}
        # The number is free again, and a second accident overwrites nothing.
        checkpoints.save(3, state(3), {})
        checkpoints.wait()
        FAULTS[fault](tmp_path)
    assert Checkpoints(tmp_path).latest_verified() == 2
    assert (tmp_path / "quarantine" / "3-2").is_dir()


def test_files_that_others_leave_behind_are_no_damage(tmp_path):
    save_all(tmp_path, [1])
    state = tmp_path / "1" / "state"
    edit_manifest(tmp_path / "1", lambda m: m.update({"state/.DS_Store": [1, "0"]}))
    for place in (tmp_path / "1", state, state / "d"):
        for name in (".DS_Store", "._manifest.json", ".nfs000000000001"):
            (place / name).write_text("x")
    (tmp_path / "1" / "notes.txt").write_text("x")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_verified() == 1
        checkpoints.save(2, {"a": jnp.ones(2)}, {})
        checkpoints.wait()
        (tmp_path / "2" / "state" / ".DS_Store").write_text("x")
    assert Checkpoints(tmp_path).latest_verified() == 2


@pytest.mark.parametrize("quarantine", [True, False])
def test_finished_steps_that_are_all_damaged_are_no_fresh_start(tmp_path, quarantine):
    save_all(tmp_path, [1, 2])
    flip(array_file(tmp_path, 1))
    (tmp_path / "2" / "extra.json").unlink()
    (tmp_path / "3").mkdir()
    damage = r"no checkpoint is undamaged \(3: unf.*; 2: extra\.json is missing; 1: state/.* is dam"
    for _ in range(2):
        with pytest.raises(JaxtuneError, match=damage):
            Checkpoints(tmp_path).latest_verified(quarantine=quarantine)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    assert Checkpoints(tmp_path).latest_verified(quarantine=quarantine) is None


def test_a_time_limit_is_restarted_by_each_megabyte_that_is_hashed(tmp_path, monkeypatch):
    save_all(tmp_path, [1])
    (tmp_path / "1" / "state" / "large").write_bytes(bytes(5 * 2**20 + 1))
    ended = []
    monkeypatch.setattr(failures, "fail", lambda code, *_, **__: ended.append(code))
    limit, begin, times = TimeLimit(0.5 / 60, "stalled"), time.monotonic(), []

    def progress():
        times.append(time.monotonic())
        time.sleep(0.1)
        limit.restart()

    write_manifest(tmp_path / "1", progress)
    assert time.monotonic() - begin > 0.6 and len(times) >= 6 and not ended
    time.sleep(0.8)
    assert ended == [75]
    assert Checkpoints(tmp_path).latest_verified() == 1
    limit = TimeLimit(0.1 / 60, "stalled")
    limit.end()
    time.sleep(0.2)
    assert ended == [75]


def test_a_reader_skips_an_unfinished_step_and_leaves_it_to_its_writer(tmp_path):
    save_all(tmp_path, [1, 2])
    # The manifest is the last file of a step to be written.
    (tmp_path / "2" / "manifest.json").rename(tmp_path / "manifest.json")
    with Checkpoints(tmp_path) as reader:
        assert reader.latest_verified(quarantine=False) == 1
    assert not (tmp_path / "quarantine").exists()
    (tmp_path / "manifest.json").rename(tmp_path / "2" / "manifest.json")
    with Checkpoints(tmp_path) as reader:
        assert reader.latest_verified(quarantine=False) == 2


def test_restoring_a_damaged_step_by_number_is_refused(tmp_path):
    save_all(tmp_path, [1])
    flip(array_file(tmp_path, 1))
    with pytest.raises(JaxtuneError, match=r"d/\w+ is damaged: its SHA-256 differs"):
        Checkpoints(tmp_path).restore(1, like(state()))


def test_without_a_checkpoint_the_result_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("not a step")
    (tmp_path / "quarantine").mkdir()
    assert Checkpoints(tmp_path).latest_verified() is None
    assert Checkpoints(tmp_path / "absent").latest_verified() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"step": jnp.float32(0)}, r"step is int32\[\], but the run needs float32"),
        (
            lambda t: t | {"trainable": t["trainable"] | {"half": jnp.zeros((3, 6), jnp.bfloat16)}},
            r"trainable/half is bfloat16\[3, 5\], but the run needs bfloat16\[3, 6\]",
        ),
        (lambda t: t | {"stop": jnp.int32(0)}, 'missing stop; did you mean "step"'),
        (lambda t: {k: t[k] for k in ("opt_state", "trainable")}, "unexpected step, which the run"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, change, message):
    save_all(tmp_path, [1])
    with pytest.raises(JaxtuneError, match=message):
        Checkpoints(tmp_path).restore(1, like(change(state())))


def test_sharding_of_the_restored_tree_is_that_of_like(tmp_path):
    save_all(tmp_path, [1])
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state()
    )
    restored, _ = Checkpoints(tmp_path).restore(1, wanted)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


def start(*arguments, wrapper=()):
    command = [*wrapper, sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt_in_a_save(process, directory):
    """Stops the process again and again until it stands still within a save."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        steps = [p for p in directory.iterdir() if p.name.isdigit()]
        if len(steps) > 1 and any(not (p / "manifest.json").exists() for p in steps):
            return
        process.send_signal(signal.SIGCONT)
    raise TimeoutError


def test_a_kill_during_a_save_leaves_the_previous_step(tmp_path):
    process = start("forever", tmp_path)
    try:
        interrupt_in_a_save(process, tmp_path)
    finally:
        process.kill()
        process.communicate()
    with Checkpoints(tmp_path) as checkpoints:
        before = checkpoints.steps()[-1]
        latest = checkpoints.latest_verified()
        assert latest == before
        assert [p.name for p in (tmp_path / "quarantine").iterdir()] == [str(latest + 1)]
        restored, extra = checkpoints.restore(latest, like(state(size=BIG)))
    assert_same_bits(restored, state(latest, size=BIG))
    assert extra == {"step": latest}


BIG = 1_000_000  # 8 MB a save: long enough on any disk to be killed in


def save_forever(directory):
    with Checkpoints(directory) as checkpoints:
        for step in range(1, 10_000):
            checkpoints.save(step, state(step, size=BIG), {"step": step})


def save_until_error(directory):
    """Trains in small: polls after each save; prints the error, what is left, and how it reads."""
    checkpoints = Checkpoints(directory, keep=50)
    try:
        for step in range(1, 50):
            checkpoints.save(step, state(step, size=50_000), {})
            while step not in checkpoints.steps():
                checkpoints.poll()
    except JaxtuneError as error:
        names = sorted(p.name for p in Path(directory).iterdir())
        again = Checkpoints(directory)
        latest = again.latest_verified()
        assert latest is not None
        restored, _ = again.restore(latest, like(state(size=50_000)))
        assert_same_bits(restored, state(latest, size=50_000))
        print(json.dumps({"error": str(error), "names": names, "latest": latest, "failed": step}))


def test_a_full_disk_is_one_clear_error_and_keeps_older_steps(tmp_path):
    wrapper = small_disk(tmp_path, "3m")
    output, errors = start("until-error", tmp_path, wrapper=wrapper).communicate(timeout=120)
    assert output, errors
    result = json.loads(output.splitlines()[-1])
    assert result["error"] == f"no space left on the disk of {tmp_path}"
    assert result["latest"] == result["failed"] - 1 >= 1
    assert result["names"] == sorted(str(n) for n in range(1, result["failed"]))


def fail_to_write(directory):
    """Saves, is not allowed to write more than small files, and is allowed again."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
        try:
            checkpoints.save(2, state(2, size=50_000), {})
            checkpoints.wait()
        except Exception as error:
            told = {"kind": type(error).__name__, "error": str(error)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        told["left"] = sorted(p.name for p in Path(directory).iterdir())
        checkpoints.save(3, state(3), {})
        told["latest"] = checkpoints.latest_verified()
    print(json.dumps(told))


def test_another_write_error_passes_unchanged_and_is_reported_once(tmp_path):
    output, errors = start("fail", tmp_path).communicate(timeout=120)
    assert output, errors
    result = json.loads(output.splitlines()[-1])
    assert result["kind"] != "JaxtuneError"
    assert "File too large" in result["error"]
    assert result["left"] == ["1"]
    assert result["latest"] == 3


if __name__ == "__main__":
    roles = {"forever": save_forever, "until-error": save_until_error, "fail": fail_to_write}
    roles[sys.argv[1]](sys.argv[2])


def test_parts_of_a_saved_array_are_read_without_the_rest(tmp_path):
    """Large stacks are stored by layer, others whole; both are read alike."""
    stacks = {
        "large": jnp.arange(4 * 1024 * 1100, dtype=jnp.float32).reshape(4, 1024, 1100),
        "small": {"0": jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4)},
    }
    tree = {"trainable": stacks, "step": jnp.int32(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, tree, {"tally": {"best_step": None}})
        checkpoints.wait()
        assert checkpoints.best_step(3) == 3
        opened = checkpoints.open_part(3, "trainable", stacks)
        assert opened["large"].chunk == (1, 1024, 1100)
        assert opened["small"]["0"].chunk == (2, 3, 4)
        for path in (("large",), ("small", "0")):
            stored, value = opened, stacks
            for key in path:
                stored, value = stored[key], value[key]
            assert (stored.shape, stored.dtype) == (value.shape, value.dtype)
            for part in ((1,), (1, 2), (slice(0, 2), slice(1, 3))):
                assert np.array_equal(stored[part], value[part])
        for wrong, message in (
            ({"larg": stacks["large"]}, r'missing trainable.larg; did you mean "trainable.large"'),
            ({"large": stacks["large"][0]}, r"float32\[4, 1024, 1100\], but the run needs float32"),
        ):
            with pytest.raises(JaxtuneError, match=message):
                checkpoints.open_part(3, "trainable", wrong)
        damaged = array_file(tmp_path, 3)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(JaxtuneError, match="is damaged"):
        Checkpoints(tmp_path).open_part(3, "trainable", stacks)
