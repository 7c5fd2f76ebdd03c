"""Host memory: how much of it is free for this process, and pages of its own."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from pathlib import Path

_UNKNOWN = 1 << 62  # bytes; nothing is known to be short


def private_pages(nbytes: int) -> mmap.mmap:
    """Memory of this process alone, in large pages where there are some: zeros, whole pages at least.

    Shared memory, which is what Python makes without being asked, cannot be given back to the system, and a
    forked child would change it for its parent.
    """
    size = max(nbytes, 1)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # In small pages a direct read takes half as long again, and a pass over the weights a third.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def free_host_bytes(share: float = 1.0, root: Path = Path("/")) -> int:
    """A share of the host memory that is free: of the machine, and of the control groups of this process.

    What a group has cached of files, and did not use lately, counts as free: the system takes it back when it
    is needed.

    Args:
        share: Of it.
        root: Where `proc` and `sys` are.
    """
    free = [_UNKNOWN, *_of_machine(root)]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                free += _of_groups(root / "sys/fs/cgroup", path, *_VERSION_2)
            elif "memory" in controllers.split(","):
                free += _of_groups(root / "sys/fs/cgroup/memory", path, *_VERSION_1)
    return int(max(0, min(free)) * share)


_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _of_machine(root: Path) -> list[int]:
    if sys.platform == "win32":
        return _of_windows()
    with contextlib.suppress(OSError, KeyError):
        fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
        return [int(fields["MemAvailable"].split()[0]) * 1024]
    return []


def _of_groups(mounted: Path, path: str, limit: str, used: str, reclaimable: str) -> list[int]:
    """Return what a group and all those above it leave, as far as these limit anything.

    A container sees its own group where others see the root, and its path is then none that is there.
    """
    found = []
    group = mounted / path.strip("/")
    for above in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            most = int((above / limit).read_text())
            found.append(
                most - int((above / used).read_text()) + _counted(above / "memory.stat", reclaimable)
            )
        if above == mounted:
            return found
    return found


def _counted(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(dict(line.split() for line in path.read_text().splitlines()).get(name, 0))
    return 0


class _MemoryStatus(ctypes.Structure):
    """`MEMORYSTATUSEX` of Windows."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "a", "b", "c", "d", "e")),
    )


def _of_windows() -> list[int]:
    status = _MemoryStatus(ctypes.sizeof(_MemoryStatus))
    known = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return [status.available] if known else []
