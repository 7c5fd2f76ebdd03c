"""Free host memory: of the machine, and of all control groups that this process is in, caches left out."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hookcore.memory import host_memory
from hookcore.memory.host_memory import free_host_bytes, private_pages

ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)

NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def write_machine(root, available, cgroups):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:   {available} kB\n")
    (root / "proc/self/cgroup").write_text(cgroups)


def write_group(folder, version, limit, used, inactive):
    """Writes the files of one group; no limit and no statistics where these are None."""
    folder.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    unlimited = "max" if version == 2 else 2**63 - 4096
    (folder / names[0]).write_text(f"{unlimited if limit is None else limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = folder / "memory.stat"
    stat.unlink(missing_ok=True)
    if inactive is not None:
        stat.write_text(f"cache 5\nanon 3\ninactive_anon 4\n{names[2]} {inactive}\nslab 8\n")


def left(limit, used, inactive):
    return 1 << 62 if limit is None else limit - used + (inactive or 0)


sizes = st.integers(0, 10**9)
groups = st.lists(st.tuples(st.none() | sizes, sizes, st.none() | sizes), min_size=1, max_size=4)


@ANY
@given(sizes, groups, st.tuples(st.sampled_from([1, 2]), st.booleans()), st.floats(0, 1))
def test_the_least_that_any_group_leaves_is_free(tmp_path_factory, available, groups, kind, share):
    """The path that the process is told need not be there, in a container."""
    version, sees = kind
    tmp_path = tmp_path_factory.mktemp("root")
    mounted = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    path = "/".join(f"g{at}" for at in range(len(groups) - 1))
    line = f"0::/{path}" if version == 2 else f"7:cpu,memory:/{path}\n0::/none"
    if not sees:
        line = line.replace(f"/{path}", "/elsewhere/pod")
        groups = groups[:1]
    write_machine(tmp_path, available, f"9:name=systemd:/x\n{line}\n")
    folder = mounted
    for at, group in enumerate(groups):
        write_group(folder, version, *group)
        folder /= f"g{at}"
    expected = max(0, min(available * 1024, *(left(*group) for group in groups)))
    assert free_host_bytes(share, tmp_path) == int(expected * share)


def test_without_any_of_these_files_nothing_is_known_to_be_short(tmp_path):
    assert free_host_bytes(root=tmp_path) == 1 << 62


@pytest.mark.parametrize("known", [True, False])
def test_windows_tells_by_itself(tmp_path, monkeypatch, known):
    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(reference):  # noqa: N802 -- its name
            reference._obj.available = 12_345
            return known

    monkeypatch.setattr(host_memory.sys, "platform", "win32")
    windll = type("windll", (), {"kernel32": Kernel})
    monkeypatch.setattr(host_memory.ctypes, "windll", windll, raising=False)
    assert free_host_bytes(root=tmp_path) == (12_345 if known else 1 << 62)


@given(st.integers(0, 5 * mmap.PAGESIZE))
def test_pages_are_zeros_and_can_be_written(nbytes):
    pages = private_pages(nbytes)
    assert len(pages) >= max(nbytes, 1)
    assert bytes(pages) == bytes(len(pages))
    pages[0] = 1
