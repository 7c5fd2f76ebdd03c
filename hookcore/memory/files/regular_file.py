"""Opens the files that weights are read from: regular files only, with errors that name the remedy."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from hookcore.errors import CheckpointError
from hookcore.units import shown

if TYPE_CHECKING:
    from pathlib import Path

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_REMEDIES = {
    errno.EACCES: "Give this user the right to read it.",
    errno.EMFILE: "Files are held open while weights are read from them: raise the limit (`ulimit -n`), or "
    "save the model in fewer files (max_shard_size=).",
    errno.ENAMETOOLONG: "Give it a shorter name.",
    errno.ENOMEM: "If the address range is refused, set vm.overcommit_memory to 0.",
}


def open_regular(path: Path, flags: int = 0) -> int:
    """Open a regular file to read it.

    Opening a pipe would wait for a writer, and a device such as `/dev/zero` never ends.

    Args:
        path: The file.
        flags: More flags for `os.open`, such as `os.O_DIRECT`.

    Returns:
        The file descriptor, which the caller closes.

    Raises:
        CheckpointError: The path leads to something else than a regular file.
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, _FLAGS | flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise CheckpointError(
        f"{shown(str(path))} is a folder, a pipe or a device; expected a regular file. Give the path of a "
        "checkpoint's files."
    )


def unreadable(
    path: str | os.PathLike[str], error: OSError | ValueError, what: str = "be read"
) -> CheckpointError:
    """Make the error for a file or folder of which the system refuses something."""
    code, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, str(error))
    remedy = _REMEDIES.get(code or 0, "Check that it is there, complete and readable.")
    return CheckpointError(f"{shown(os.fspath(path))} cannot {what}: {reason}. {remedy}")
