"""Writing a directory so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxtune.errors import JaxtuneError


@contextlib.contextmanager
def new_directory(directory: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a scratch directory that takes the name `directory` when the block succeeds.

    Args:
      directory: the final name.
      replace: swaps an existing directory out; otherwise one that is not empty is refused.

    Raises:
      JaxtuneError: the directory exists, or the disk is full; nothing is left behind.
    """
    final = Path(directory).resolve()
    try:
        taken = final.exists() and (not final.is_dir() or any(final.iterdir()))
        if taken and not replace:
            raise JaxtuneError(f"{final}: exists already; remove it or choose another place")
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
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


def _swap(scratch: Path, final: Path) -> None:
    """Gives `scratch` the final name; what was there is removed only afterwards."""
    old = None
    if final.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
        final.replace(old)
    scratch.replace(final)
    if old is not None:
        shutil.rmtree(old)
