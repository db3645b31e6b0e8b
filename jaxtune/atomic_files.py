"""Writes files and directories so that a reader sees them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtune.errors import JaxtuneError, check_path


@contextlib.contextmanager
def report_full_disk(directory: str | Path) -> Iterator[None]:
    """Reports a full disk or an exhausted quota as an error that names the directory.

    Args:
      directory: the directory that the block writes to.

    Raises:
      JaxtuneError: there is no space left; other errors pass unchanged.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        full = {errno.ENOSPC, errno.EDQUOT}
        # Orbax writes arrays through TensorStore, which reports the system's error as text.
        texts = {f"[os_error_code='{code}']" for code in full}
        if getattr(error, "errno", None) in full or any(text in str(error) for text in texts):
            raise JaxtuneError(f"no space left on the disk of {directory}") from error
        raise


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file atomically: a reader sees either the old content or the new.

    Args:
      path: the file, in an existing directory.
      text: the new content.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # otherwise a power failure may undo the rename
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_directory(directory: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `directory` when the block succeeds.

    Args:
      directory: final path.
      replace: replaces an existing directory, whose only writer must be the caller. `recover`
        completes a replacement that was interrupted between its two renames. Otherwise an existing
        directory must be empty.

    Raises:
      JaxtuneError: the directory exists, or the disk is full; no partial output is left.
    """
    final = Path(directory).resolve()
    try:
        recover(final)
        if not replace:
            refuse_taken(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(final, replace)
    except OSError as error:
        raise JaxtuneError(f"{final}: {error.strerror}") from error
    try:
        yield scratch
        scratch.chmod(0o755)
        _swap(scratch, final)
    except OSError as error:
        raise JaxtuneError(f"{final}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_taken(directory: str | Path) -> None:
    """Raises a JaxtuneError if a path cannot be created, or is not an empty directory."""
    path = check_path("the output directory", directory)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there != path and not there.is_dir():
        raise JaxtuneError(f"{path}: cannot create: {there} is not a directory")
    if not os.access(there, os.W_OK) and there != path:
        raise JaxtuneError(f"{path}: cannot create: {there} cannot be written")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise JaxtuneError(f"{path}: already exists; remove it or choose another path")


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files into an existing directory; keys are relative paths."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _scratch(final: Path, replace: bool) -> Path:
    if not replace:  # another process may be writing a directory of this name
        return Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    scratch = final.with_name(f".{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return scratch


def recover(directory: Path) -> None:
    """Completes or undoes a replacement that was interrupted between its two renames."""
    previous = _previous(directory)
    if previous.exists():
        if directory.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(directory)


def _swap(scratch: Path, final: Path) -> None:
    """Renames `scratch` to `final`; the previous directory is removed only afterwards.

    A non-empty directory cannot be replaced by one rename. If the process dies between the two
    renames, only the previous directory exists, and `recover` moves it back.
    """
    if final.exists():
        final.rename(_previous(final))
    scratch.rename(final)
    shutil.rmtree(_previous(final), ignore_errors=True)


def _previous(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.previous")
