"""Files and directories that appear under their names whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtune.errors import JaxtuneError


@contextlib.contextmanager
def disk_full_named(directory: str | Path) -> Iterator[None]:
    """Turns a full disk (or an exhausted quota) into an error that names the directory.

    Args:
      directory: where the block writes.

    Raises:
      JaxtuneError: the block failed for want of space; any other error passes unchanged.
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
    """Writes a UTF-8 text file so that a reader sees the old content or the new, never a part.

    Args:
      path: the file; its directory exists.
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
        os.fsync(handle)  # without this a power cut may undo the rename
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_directory(directory: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a scratch directory that takes the name `directory` when the block succeeds.

    Args:
      directory: the final name.
      replace: swaps an existing directory out; otherwise one that is not empty is refused. The
        caller is its only writer. A kill between the two renames of the swap leaves what
        `recover` puts back.

    Raises:
      JaxtuneError: the directory exists, or the disk is full; nothing is left behind.
    """
    final = Path(directory).resolve()
    try:
        recover(final)
        taken = final.exists() and (not final.is_dir() or any(final.iterdir()))
        if taken and not replace:
            raise JaxtuneError(f"{final}: exists already; remove it or choose another place")
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


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes files, by their path in it, into an existing directory."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _scratch(final: Path, replace: bool) -> Path:
    if not replace:  # another process may be writing beside this one
        return Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    scratch = final.with_name(f".{final.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return scratch


def recover(directory: Path) -> None:
    """Undoes or completes a swap that a kill has cut short between its two renames."""
    previous = _previous(directory)
    if previous.exists():
        if directory.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(directory)


def _swap(scratch: Path, final: Path) -> None:
    """Gives `scratch` the final name; what was there is removed only afterwards."""
    if final.exists():
        final.rename(_previous(final))
    scratch.rename(final)
    shutil.rmtree(_previous(final), ignore_errors=True)


def _previous(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.previous")
