"""A disk that fills up."""

from __future__ import annotations

import shutil
import subprocess


def small_disk(target, size):
    """Returns a command prefix that mounts a tiny disk where nobody else sees it.

    It needs root, or the right to make a namespace for users, and fails without: a promise about
    full disks that is not tested would look like one that is kept.
    """
    mount = f"mount -t tmpfs -o size={size} tmpfs '{target}' && exec \"$@\""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        prefix = ["unshare", *options, "sh", "-c", mount, "sh"]
        if (
            shutil.which("unshare")
            and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
        ):
            return prefix
    raise AssertionError("a full disk needs unshare, and root or namespaces for users")
