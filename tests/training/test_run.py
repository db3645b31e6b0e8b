import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.runs.directory import RunDirectory

CONFIG = resolve({"training": {"steps": 7}, "adapter": {"targets": "q_proj,v_proj"}})


def test_a_run_keeps_its_config(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "mine")
    assert not run.exists()
    with run.start(CONFIG) as config:
        assert config == CONFIG
    assert run.exists()
    assert json.loads(run.config.read_text())["training"]["steps"] == 7


@pytest.mark.parametrize("config", [None, CONFIG])
def test_an_interrupted_run_goes_on_without_a_config_or_with_the_same(tmp_path, config):
    with RunDirectory(tmp_path).start(CONFIG):
        pass
    with RunDirectory(tmp_path).start(config) as frozen:
        assert frozen == CONFIG


def test_another_config_is_refused_with_the_differences(tmp_path):
    run = RunDirectory(tmp_path)
    with run.start(CONFIG):
        pass
    other = resolve(
        CONFIG, ["training.steps=9", "training.dtype=float32", "adapter.targets=q_proj"]
    )
    with pytest.raises(JaxtuneError) as error, run.start(other):
        pass
    assert "adapter.targets: ('q_proj', 'v_proj') → ('q_proj',)" in str(error.value)
    assert "training.dtype: bfloat16 → float32" in str(error.value)
    assert "training.steps" not in str(error.value)  # the length may change
    assert "training.seed" not in str(error.value)
    assert "\n" not in str(error.value)
    assert run.read_config() == CONFIG


def test_resuming_without_a_run_creates_nothing(tmp_path):
    run = RunDirectory(tmp_path / "typo")
    with (
        pytest.raises(JaxtuneError, match=r"typo: not a run directory \(no config\.json\)"),
        run.start(),
    ):
        pass
    assert not run.path.exists()


def test_a_config_that_is_not_json_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.config.write_text("{\n  nonsense")
    with pytest.raises(JaxtuneError, match=r"config\.json:2: invalid JSON"):
        run.read_config()


HOLD = """
import sys
from jaxtune.runs.directory import RunDirectory
with RunDirectory(sys.argv[1]).start():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    run = RunDirectory(tmp_path)
    with run.start(CONFIG):
        pass
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                JaxtuneError, match=f"process {holder.pid} is training in this directory"
            ),
            run.start(),
        ):
            pass
        assert run.read_config() == CONFIG  # reading stays free
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with run.start():  # the system lets go of the lock of a killed process
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_directory_is_replaced_whole(tmp_path):
    run = RunDirectory(tmp_path)
    target = run.adapter_last
    run.replace_directory(target, lambda to: (to / "a").write_text("1"))
    run.replace_directory(target, lambda to: (to / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in target.parent.iterdir()] == ["last"]


def test_a_failed_write_leaves_the_old_directory(tmp_path):
    run = RunDirectory(tmp_path)
    run.replace_directory(run.adapter_last, lambda to: (to / "a").write_text("1"))

    def fail(to: Path):
        (to / "half").write_text("")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run.replace_directory(run.adapter_last, fail)
    assert [p.name for p in run.adapter_last.parent.iterdir()] == ["last"]
    assert [p.name for p in run.adapter_last.iterdir()] == ["a"]


SWAP = """
import os, signal, sys
from pathlib import Path
from jaxtune.runs.directory import RunDirectory
run = RunDirectory(sys.argv[1])
run.replace_directory(run.adapter_best, lambda to: (to / "old").write_text(""))
renames = int(sys.argv[2])
def audit(event, arguments):
    global renames
    if event in ("os.rename", "shutil.rmtree") and "best" in str(arguments[0]):
        if renames == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        renames -= 1
sys.addaudithook(audit)
run.replace_directory(run.adapter_best, lambda to: (to / "new").write_text(""))
"""


# The events before: clearing the way, old → aside, new → in place, deleting the old.
@pytest.mark.parametrize(("events", "left"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_kill_within_the_swap_leaves_the_old_or_the_new(tmp_path, events, left):
    run = RunDirectory(tmp_path)
    with run.start(CONFIG):
        pass
    killed = subprocess.run([sys.executable, "-c", SWAP, str(tmp_path), str(events)])
    assert killed.returncode == -signal.SIGKILL
    with run.start():
        assert [p.name for p in run.adapter_best.iterdir()] == [left]
    run.replace_directory(run.adapter_best, lambda to: (to / "newer").write_text(""))
    assert [p.name for p in run.adapter_best.parent.iterdir()] == ["best"]


def test_result_is_written(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_result({"seconds": {"train": 1.5}})
    assert json.loads(run.result.read_text()) == {"seconds": {"train": 1.5}}


def test_only_finished_checkpoints_count_as_steps_done(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.steps_done() == 0
    for step in (3, 6):
        (run.checkpoints / str(step)).mkdir(parents=True)
    (run.checkpoints / "quarantine" / "9").mkdir(parents=True)
    (run.checkpoints / "3" / "manifest.json").touch()
    assert run.steps_done() == 3
