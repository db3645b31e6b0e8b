"""A directory appears only when complete. Run as a program, this file is the writer that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtune.atomic_files import new_directory
from jaxtune.errors import JaxtuneError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_new_directory_appears_when_the_block_ends(tmp_path):
    with new_directory(tmp_path / "a" / "b") as scratch:
        (scratch / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert names(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "a") as scratch:
        (scratch / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("what", ["directory", "file"])
def test_an_existing_output_is_rejected_before_the_work(tmp_path, what):
    target = tmp_path / "a"
    if what == "directory":
        target.mkdir()
        (target / "mine").touch()
    else:
        target.touch()
    with pytest.raises(JaxtuneError, match="a: already exists"), new_directory(target):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["a"]


def test_an_empty_directory_is_accepted(tmp_path):
    (tmp_path / "a").mkdir()
    with new_directory(tmp_path / "a") as scratch:
        (scratch / "file").touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def test_the_working_directory_may_be_a_dot(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with new_directory(".") as scratch:
        (scratch / "file").touch()
    assert names(tmp_path / "a") == ["file"]


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_directory(tmp_path / "link") as scratch:
        (scratch / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["file"]


def test_replacing_removes_the_old_content(tmp_path):
    for content in ("old", "new"):
        with new_directory(tmp_path / "a", replace=True) as scratch:
            (scratch / content).touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


def test_replacing_keeps_what_was_there_when_the_block_fails(tmp_path):
    with new_directory(tmp_path / "a") as scratch:
        (scratch / "old").touch()
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a", replace=True):
        _ = 1 / 0
    assert names(tmp_path / "a") == ["old"]


def test_an_impossible_location_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(JaxtuneError, match="file/a: ") as raised,
        new_directory(tmp_path / "file/a"),
    ):
        pass
    assert "\n" not in str(raised.value)


def test_a_kill_in_the_middle_leaves_no_directory_of_the_final_name(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "a").exists()
    assert [name.startswith(".a-") for name in names(tmp_path)] == [True]


if __name__ == "__main__":
    with new_directory(sys.argv[1]) as directory:
        (Path(directory) / "file").write_text("half")
        print("writing", flush=True)
        time.sleep(600)
