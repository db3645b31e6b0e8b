"""Progress bars: one at a time, on a terminal only, after two seconds."""

import builtins
import importlib.util

import pytest

from jaxtune import progress


@pytest.fixture
def terminal(monkeypatch):
    """Makes rich take standard error for a terminal, and shows bars at once."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", -1.0)


def test_a_nested_bar_stays_hidden(terminal, capsys):
    with progress.track(2, "outer") as outer:
        outer()
        with progress.track(2, "inner") as inner:
            inner()
        outer()
    shown = capsys.readouterr()
    assert "outer" in shown.err and "inner" not in shown.err and not shown.out
    with progress.track(1, "next") as advance:
        advance()
    assert "next" in capsys.readouterr().err


def test_a_notebook_has_bars_if_it_has_widgets(monkeypatch):
    class ZMQInteractiveShell:
        """The class by whose name rich recognizes a notebook."""

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    for found in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found or None)
        assert progress.Bar().disable == (not found)


def test_a_short_block_or_a_file_has_no_bar(terminal, monkeypatch, capsys):
    with progress.track(1, "disabled", enabled=False) as advance:
        advance()
    with progress.bars(False), progress.bars(True), progress.track(1, "hidden") as advance:
        advance()
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 60.0)
    with progress.track(1, "short") as advance:
        advance()
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", -1.0)
    monkeypatch.delenv("FORCE_COLOR")
    with progress.track(1, "file") as advance:
        advance()
    assert not capsys.readouterr().err
