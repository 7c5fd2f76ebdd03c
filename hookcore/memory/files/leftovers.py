"""Files and folders that a process needs for a while, and that the next one clears if it is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def make_claimed(folder: Path, pattern: str, make: Callable[[], int]) -> int:
    """Make something in a folder that others leave alone, and clear what killed processes left there.

    What is made is locked for as long as its descriptor is open, in whichever container; what isn't locked is
    nobody's. On file systems without locks, and on Windows, nothing is cleared.

    Args:
        folder: The folder.
        pattern: Matches the names of all that is made in this way.
        make: Makes something new, a file or a folder; returns a descriptor of it.

    Returns:
        What `make` returned.

    Raises:
        OSError: Nothing can be made there.
    """
    if sys.platform == "win32":
        return make()
    here = os.open(folder, os.O_RDONLY)
    try:
        # Held until what is made is locked: nobody clears it in between.
        with contextlib.suppress(OSError):
            fcntl.flock(here, fcntl.LOCK_EX)
            for path in folder.glob(pattern):
                _clear(path)
        made = make()
        with contextlib.suppress(OSError):
            fcntl.flock(made, fcntl.LOCK_EX)
        return made
    finally:
        os.close(here)


def _clear(path: Path) -> None:
    with contextlib.suppress(OSError):  # locked, another user's, or gone by now
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        finally:
            os.close(descriptor)
