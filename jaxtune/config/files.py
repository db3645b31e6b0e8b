"""Config files: Python programs with a ``get_config()``."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jaxtune.errors import JaxtuneError, closest


def load_file(path: str | Path) -> ml_collections.ConfigDict | Mapping[str, Any]:
    """Runs a config file and returns the result of its ``get_config()``.

    A config file is a Python program: run only files that you trust.

    Raises:
      JaxtuneError: the file does not exist, has no ``get_config`` or raises an error.
    """
    path = Path(path)
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.py")]
        raise JaxtuneError(f"{path}: no such config file{closest(path.name, there)}")
    spec = importlib.util.spec_from_file_location("jaxtune_config_file", path)
    if spec is None or spec.loader is None:
        raise JaxtuneError(f"{path}: a config file is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except JaxtuneError:
        raise
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_within(path, error)
        reason = " ".join(str(error).split())
        raise JaxtuneError(f"{path}:{line}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"{path}: get_config() returns {config!r} instead of a config")
    return config


def _line_within(path: Path, error: Exception) -> int:
    """Returns the line number in `path` at which an error occurred; 0 if it did not occur there."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno or 0 for frame in frames if Path(frame.filename) == path]
    return lines[-1] if lines else 0
