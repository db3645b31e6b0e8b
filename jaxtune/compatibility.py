"""JAX and Flax beyond the versions that were tested.

No upper bound keeps newer releases out: most change nothing that jaxtune depends on. The log names
a release that is newer than the tested one, and each private name of JAX that a release lacks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import re
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

# The newest versions with which the test suite has passed. pyproject.toml has the oldest.
TESTED = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}


def newer_than_tested(
    installed: Mapping[str, str], tested: Mapping[str, str] = TESTED
) -> dict[str, str]:
    """Returns the installed versions that are newer than the tested ones, by package.

    Args:
      installed: versions by package.
      tested: likewise; packages that it lacks are not compared.
    """
    return {
        package: version
        for package, version in installed.items()
        if package in tested and _release(version) > _release(tested[package])
    }


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


@functools.cache
def check_versions() -> None:
    """Logs a warning, once per process, if JAX or Flax is newer than the tested versions."""
    installed = {package: importlib.metadata.version(package) for package in TESTED}
    newer = newer_than_tested(installed)
    if newer:
        found = ", ".join(f"{package} {version}" for package, version in newer.items())
        known = ", ".join(f"{package} {TESTED[package]}" for package in newer)
        logger.warning("%s: newer than the tested versions (%s)", found, known)


@functools.cache
def private_module(name: str, names: tuple[str, ...], lost: str) -> Any | None:
    """Imports a private module of JAX, or returns None if JAX no longer has it.

    A missing name is logged once.

    Args:
      name: name of the module.
      names: attributes that the caller uses.
      lost: consequence of not having it, for the log.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        missing = name
    else:
        absent = [attribute for attribute in names if not hasattr(module, attribute)]
        if not absent:
            return module
        missing = f"{name}.{absent[0]}"
    version = importlib.metadata.version("jax")
    logger.warning("jax %s has no %s (a private name): %s", version, missing, lost)
    return None
