"""A disk that fills up."""

from __future__ import annotations

import shutil
import subprocess


def small_disk(target, size):
    """Returns a command prefix that mounts a tiny disk where nobody else sees it, or None."""
    mount = f"mount -t tmpfs -o size={size} tmpfs '{target}' && exec \"$@\""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        prefix = ["unshare", *options, "sh", "-c", mount, "sh"]
        if (
            shutil.which("unshare")
            and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
        ):
            return prefix
    return None
