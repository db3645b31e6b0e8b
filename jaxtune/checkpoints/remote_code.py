"""The Python files that a checkpoint names in ``auto_map``: copied as data, and never run.

transformers opens some checkpoints with code that lies beside config.json. An export names such
code only if it holds it, so that it opens wherever its source does.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_KEY = "auto_map"
_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)
_logger = logging.getLogger(__name__)


def keep_named_code(directory: Path, source: Path | None) -> None:
    """Copies what the JSON files of an export name, and drops the names of what is not there.

    Args:
      directory: of the export, with its JSON files.
      source: the directory of the checkpoint that it was made from, if it was one.
    """
    for path in (directory / name for name in _FILES):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict) or _KEY not in content:
            continue
        entries = content[_KEY] if isinstance(content[_KEY], dict) else {}
        named = {role: set(_modules(entry)) for role, entry in entries.items()}
        there = {module for modules in named.values() for module in modules if _has(source, module)}
        kept = {role: entries[role] for role, modules in named.items() if modules <= there}
        for role in named.keys() - kept.keys():
            _logger.warning(
                "%s: %s.%s names Python files that are not in the checkpoint: left out",
                path.name,
                _KEY,
                role,
            )
        if source is not None:
            _copy({module for role in kept for module in named[role]}, source, directory)
        if kept != content[_KEY]:
            rest = {key: value for key, value in content.items() if key != _KEY}
            text = json.dumps(rest | ({_KEY: kept} if kept else {}), indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def _modules(entry: Any) -> Iterable[str]:
    """Yields the module of each class that an entry names beside config.json.

    An entry is ``module.Class`` or a list of such and nulls. ``repository--module.Class`` names
    code that stays where it is.
    """
    for reference in entry if isinstance(entry, list) else [entry]:
        if reference is not None and "--" not in str(reference):
            yield str(reference).rpartition(".")[0]


def _has(source: Path | None, module: str) -> bool:
    # A name is data from elsewhere: an identifier leads to no other directory.
    if source is None or not module.isidentifier():
        return False
    file = source / f"{module}.py"
    return file.is_file() and _belongs(file)


def _belongs(file: Path) -> bool:
    """Returns whether a file lies in its checkpoint and does not link to a file elsewhere.

    The hub's cache links snapshots/COMMIT/NAME to blobs/HASH.
    """
    directory, target = file.parent.resolve(), file.resolve()
    return target.parent in (directory, directory.parent.parent / "blobs")


def _copy(modules: Iterable[str], source: Path, directory: Path) -> None:
    """Copies modules, and those beside them that they import."""
    waiting, done = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in done or not _has(source, module):
            continue
        done.add(module)
        file = source / f"{module}.py"
        shutil.copyfile(file, directory / file.name)
        waiting += _IMPORT.findall(file.read_text(encoding="utf-8", errors="replace"))
