"""Python files that a checkpoint references in ``auto_map``: copied as data and never run.

transformers opens some checkpoints with code stored next to config.json. An export keeps such a
reference only together with the file, so that it opens wherever its source does.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxtune.strict_json import read_object

_KEY = "auto_map"
_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)
_logger = logging.getLogger(__name__)


def keep_named_code(directory: Path, source: Path | None) -> None:
    """Copies the code that an export's JSON files reference, and drops references without a file.

    Args:
      directory: directory of the export, with its JSON files.
      source: directory of the checkpoint from which it was made; None for a single file.
    """
    for path in (directory / name for name in _FILES):
        content = read_object(path) if path.is_file() else {}
        if _KEY not in content:
            continue
        entries = content[_KEY] if isinstance(content[_KEY], dict) else {}
        named = {role: set(_modules(entry)) for role, entry in entries.items()}
        there = {module for modules in named.values() for module in modules if _has(source, module)}
        kept = {role: entries[role] for role, modules in named.items() if modules <= there}
        for role in named.keys() - kept.keys():
            _logger.warning(
                "%s: %s.%s is left out: its Python files are not in the checkpoint",
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
    """Yields the modules next to config.json that an entry references.

    An entry is ``module.Class``, or a list of these and nulls. ``repository--module.Class`` refers
    to code in another repository and is kept as it is.
    """
    for reference in entry if isinstance(entry, list) else [entry]:
        if reference is not None and "--" not in str(reference):
            yield str(reference).rpartition(".")[0]


def _has(source: Path | None, module: str) -> bool:
    # The name is untrusted; an identifier cannot refer to another directory.
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
    """Copies modules and, transitively, their relative imports."""
    waiting, done = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in done or not _has(source, module):
            continue
        done.add(module)
        file = source / f"{module}.py"
        shutil.copyfile(file, directory / file.name)
        waiting += _IMPORT.findall(file.read_text(encoding="utf-8", errors="replace"))
