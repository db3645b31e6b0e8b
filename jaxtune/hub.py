"""The Hugging Face hub: whether it answers, and the local path that a name may have meant."""

from __future__ import annotations

import contextlib
import difflib
import functools
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

# Seconds to wait for a connection: for a name that is probably a misspelled path, and for others,
# which may need a slow network. The clients of the hub retry for up to a minute.
_SHORT, _LONG = 2.0, 8.0
# Seconds for which an answer holds: long enough for one command, and short enough for a notebook in
# which a failed call is repeated.
_MEMORY = 30.0


def is_reachable(name: str) -> bool:
    """Returns whether a connection to the hub, or to the proxy in front of it, can be opened.

    False in offline mode (HF_HUB_OFFLINE).

    Args:
      name: name to look up there; the wait is short if it resembles a path on this machine.
    """
    patience = _SHORT if closest_path(name) else _LONG
    return _connects(patience, int(time.monotonic() // _MEMORY))


@functools.cache
def _connects(patience: float, period: int) -> bool:
    """Returns the result of `is_reachable`, computed once in each period of `_MEMORY` seconds."""
    del period
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    hub = urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(hub.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(hub.hostname or ""):
        hub = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = hub.port or (443 if hub.scheme == "https" else 80)
    opened = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((hub.hostname, port), patience):
            opened.set()

    # In a thread, because looking up a name takes its own time.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(patience)
    return opened.is_set()


def unreachable() -> str:
    """Returns the reason why the hub does not answer, for messages."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    # Without user and password, which belong to an address with "@".
    shown = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
    return f"{shown} does not answer; HF_ENDPOINT selects a mirror"


@contextlib.contextmanager
def datasets_offline(name: str) -> Iterator[None]:
    """Keeps the `datasets` library to its cache for a name if the hub does not answer."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not is_reachable(name)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def closest_path(name: str | Path) -> str:
    """Returns ``'; did you mean "x"?'`` for the existing path closest to one that does not exist.

    Returns an empty string if no path is close. Misspelled directories are corrected as well.
    """
    found = _closest(Path(name).expanduser())
    return f'; did you mean "{found}"?' if found else ""


def _closest(path: Path) -> Path | None:
    """Returns the existing path closest to `path`, or its corrected directory, or None."""
    try:
        exists = path.parent.is_dir()
        parent = path.parent if exists or path.parent == path else _closest(path.parent)
        names = [each.name for each in parent.iterdir()] if parent and parent.is_dir() else []
    except (OSError, ValueError):
        return None
    match = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if match and parent is not None:
        return parent / match[0]
    return None if exists else parent
