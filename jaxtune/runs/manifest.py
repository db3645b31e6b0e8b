"""The manifest of a checkpoint: the size and SHA-256 of every file, and what differs from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.atomic_files import write_atomically
from jaxtune.runs.paths import EXTRA, MANIFEST
from jaxtune.strict_json import read_object

STATE = "state"
_BLOCK = 2**20  # bytes


def write_manifest(path: Path, progress: Callable[[], Any] = lambda: None) -> None:
    """Writes the manifest of a step, its last file.

    Args:
      path: directory of the step.
      progress: function that is called after each megabyte that has been hashed.
    """
    sizes = _file_sizes(path)
    files = {name: [size, _sha256(path / name, progress)] for name, size in sizes.items()}
    write_atomically(path / MANIFEST, json.dumps(files, indent=2))


def find_damage(path: Path, contents: bool = True) -> str | None:
    """Returns a description of the damage of a step, or None.

    Files that are not part of a checkpoint are ignored: those whose names start with a dot, which
    file managers and network file systems create, and those beside ``state/`` and ``extra.json``.

    Args:
      path: directory of the step.
      contents: whether to compare hashes as well as names and sizes.
    """
    if not (path / MANIFEST).is_file():
        return "unfinished (no manifest)"
    try:
        manifest = read_object(path / MANIFEST)
        listed = {name: (int(size), str(sha)) for name, (size, sha) in manifest.items()}
    except (ValueError, TypeError):
        return f"{MANIFEST} is damaged"
    # Earlier versions listed hidden files, which may be gone.
    listed = {name: entry for name, entry in listed.items() if not _hidden(name)}
    present = _file_sizes(path)
    if not listed:
        return f"{MANIFEST} lists no files"
    if unlisted := sorted(present.keys() - listed.keys()):
        return f"{unlisted[0]} is not in {MANIFEST}"
    for name, (size, sha) in listed.items():
        if name not in present:
            return f"{name} is missing"
        if present[name] != size:
            return f"{name} has {present[name]} bytes instead of {size}"
        if contents and _sha256(path / name) != sha:
            return f"{name} is damaged: its SHA-256 differs from the manifest"
    return None


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _file_sizes(path: Path) -> dict[str, int]:
    """Returns the sizes in bytes of the files of a step except the manifest, by relative path."""
    return {
        file.relative_to(path).as_posix(): file.stat().st_size
        for file in sorted([path / EXTRA, *(path / STATE).rglob("*")])
        if file.is_file() and not file.is_symlink() and not _hidden(file.name)
    }


def _sha256(path: Path, progress: Callable[[], Any] = lambda: None) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            progress()
    return digest.hexdigest()
