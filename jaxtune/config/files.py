"""Config files: Python programs with a ``get_config()``.

Errors name the file and the line: that of the traceback where the program fails, or that of the
assignment where it sets a bad value.
"""

from __future__ import annotations

import ast
import importlib.util
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from jaxtune.config.tree import OPTIONS, SECTIONS
from jaxtune.errors import JaxtuneError, closest, shown


def load_file(path: str | Path) -> ml_collections.ConfigDict | Mapping[str, Any]:
    """Runs a config file and returns the result of its ``get_config()``.

    A config file is a Python program: run only files that you trust.

    Raises:
      JaxtuneError: the file does not exist, has no ``get_config``, raises an error, or sets an
        unknown key or a value that is invalid for its option.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise JaxtuneError(f"{path}: a config file is a Python file (.py)")
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
    except (Exception, SystemExit) as error:
        reason = _unknown_key(error) or f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise JaxtuneError(f"{path}{_line_of(error, path)}: {reason}") from error
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"{path}: get_config() returns {shown(config)} instead of a config")
    _check_values(config, path)
    return config


def _line_of(error: BaseException, path: Path) -> str:
    """Returns ``":LINE"`` of the error in a file; empty if it did not occur there."""
    if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == path.resolve():
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
    return f":{lines[-1]}" if lines else ""


def _unknown_key(error: BaseException) -> str:
    """Returns the message for a key that a locked config rejected; empty for other errors.

    The error of `ml_collections` names neither the section nor a close key, so both are taken from
    its frame: the section is the dict with that section's options.
    """
    if not isinstance(error, (AttributeError, KeyError)):
        return ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        config, key = values.get("self"), values.get("attribute", values.get("key"))
        if isinstance(config, ml_collections.ConfigDict) and isinstance(key, str):
            names = set(config.keys())
            if key in names:
                continue
            if names == set(SECTIONS):
                return _unknown_section(key)
            for section, defaults in SECTIONS.items():
                if names == set(defaults.to_dict()):
                    return _unknown_option(f"{section}.{key}")
    return ""


def _unknown_section(name: object) -> str:
    return f'unknown config section "{name}"{closest(str(name), SECTIONS)}'


def _unknown_option(key: str) -> str:
    return f'unknown config key "{key}"{closest(key, OPTIONS)}'


def _check_values(config: ml_collections.ConfigDict | Mapping[str, Any], path: Path) -> None:
    """Checks each section and option of a config on its own; errors name the line that sets it."""
    for section, entries in dict(config).items():
        if section not in SECTIONS:
            raise JaxtuneError(
                f"{path}{_line_setting(path, str(section))}: {_unknown_section(section)}"
            )
        if not isinstance(entries, (Mapping, ml_collections.ConfigDict)):
            line = _line_setting(path, str(section))
            raise JaxtuneError(
                f'{path}{line}: config section "{section}" has named options, not {shown(entries)}'
            )
        for name, value in dict(entries).items():
            key = f"{section}.{name}"
            try:
                if key not in OPTIONS:
                    raise JaxtuneError(_unknown_option(key))
                OPTIONS[key].check(key, value)
            except JaxtuneError as error:
                line = _line_setting(path, section, str(name))
                raise JaxtuneError(f"{path}{line}: {error}") from error


def _line_setting(path: Path, *key: str) -> str:
    """Returns ``":LINE"`` of the last line in a file that sets a key; empty if none is found."""
    found = list(_settings(ast.parse(path.read_bytes())))
    # A section may have a name of its own, as in `training = c.training; training.steps = 1`.
    for length in range(len(key)):
        lines = [line for names, line in found if names[-len(key) + length :] == key[length:]]
        if lines and (length == 0 or len(set(lines)) == 1):
            return f":{max(lines)}"
    return ""


def _settings(program: ast.Module) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yields the names and the line of everything that a program sets.

    These are targets of assignments, keyword arguments, and the keys of dicts in literals.
    """
    for node in ast.walk(program):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        else:
            targets = []
        for target in targets:
            yield _names(target), target.lineno
        if isinstance(node, ast.Call):
            outer = _names(node.func.value) if isinstance(node.func, ast.Attribute) else ()
            for keyword in node.keywords:
                yield (*outer, keyword.arg or ""), keyword.value.lineno
        if isinstance(node, ast.Dict):
            yield from _dict_keys(node, ())


def _dict_keys(node: ast.Dict, outer: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            names = (*outer, key.value)
            yield names, key.lineno
            if isinstance(value, ast.Dict):
                yield from _dict_keys(value, names)


def _names(node: ast.expr) -> tuple[str, ...]:
    """Returns the names of ``c.section.name`` or ``c["section"]["name"]``."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        return (*_names(node.value), node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return (*_names(node.value), str(node.slice.value))
    return ()
