"""Mapped checkpoints: bit-equal, never written to, and giving back RAM without losing an edit."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import threading
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookcore.errors import CheckpointError
from hookcore.memory import Checkpoint
from hookcore.memory.files import mapped_file as module
from hookcore.memory.files.mapped_file import MappedFile, find_mapping, map_checkpoint
from hookcore.memory.files.safetensors_header import TensorEntry

PAGE = mmap.PAGESIZE
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about pages")

DTYPES = (
    torch.bool, torch.uint8, torch.int16, torch.uint32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def pages_file(path, pages, extra=0):
    """Write a file whose page n is full of byte n % 251."""
    data = b"".join(bytes([page % 251]) * PAGE for page in range(pages)) + b"\xff" * extra
    path.write_bytes(data)
    return data


def flat(mapping, offset=0, nbytes=None):
    nbytes = len(mapping) - offset if nbytes is None else nbytes
    return mapping.tensor(TensorEntry("w", mapping.path, torch.uint8, (nbytes,), offset, nbytes))


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


@given(
    layout=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3)), min_size=1, max_size=6
    ),
    shards=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@pytest.mark.filterwarnings("error")
def test_any_checkpoint_is_mapped_bit_equal(layout, shards, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (dtype, shape) in enumerate(layout):
        data = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        state[f"w{number}"] = (
            data.view(dtype).view(shape) if data.numel() else torch.empty(shape, dtype=dtype)
        )
    with TemporaryDirectory() as folder:
        for shard in range(shards):
            part = {key: value for key, value in state.items() if int(key[1:]) % shards == shard}
            safetensors.torch.save_file(part, Path(folder) / f"{shard}.safetensors")
        for shard in range(shards):
            checkpoint = Checkpoint.open(Path(folder) / f"{shard}.safetensors")
            mappings = map_checkpoint(checkpoint)
            for key, entry in checkpoint.entries.items():
                mapping = mappings[entry.path]
                tensor = mapping.tensor(entry)
                assert bits(tensor) == bits(state[key])
                assert tensor.is_contiguous()
                where = (mapping, entry.offset, entry.nbytes) if entry.nbytes else None
                assert find_mapping(tensor) == where


@given(data=st.data())
def test_edits_outlive_drops_and_never_reach_the_file(data):
    pages = 12
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        expected = bytearray(pages_file(path, pages, extra=data.draw(st.integers(0, PAGE - 1))))
        original = bytes(expected)
        mapping = MappedFile(path)
        tensor = flat(mapping)
        offsets = st.integers(0, len(expected) - 1)
        for action in data.draw(st.lists(st.sampled_from(["edit", "read", "populate", "drop"]), max_size=12)):
            offset = data.draw(offsets)
            nbytes = data.draw(st.integers(0, len(expected) - offset))
            if action == "edit":
                nbytes = min(nbytes, 2 * PAGE)
                tensor[offset : offset + nbytes] = 252
                expected[offset : offset + nbytes] = bytes([252]) * nbytes
            elif action == "read":
                assert bytes(tensor[offset : offset + nbytes].tolist()) == expected[offset : offset + nbytes]
            else:
                getattr(mapping, action)(offset, nbytes)
            for begin in range(0, len(expected), PAGE):
                length = min(PAGE, len(expected) - begin)
                if expected[begin : begin + length] != original[begin : begin + length]:
                    assert mapping.was_written(begin, length)
        mapping.drop(0, len(mapping))
        assert bytes(tensor.tolist()) == expected
        assert path.read_bytes() == original


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "a.safetensors"
    pages_file(path, 64, extra=100)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return MappedFile(path)


@linux
def test_drop_gives_back_whole_clean_pages_inside_the_range(mapped):
    size = len(mapped)

    def resident():
        return int((mapped._page_flags(0, 64) & module._IN_RAM != 0).sum())

    mapped.populate(0, size)
    assert resident() == 64
    assert mapped.drop(PAGE + 1, 3 * PAGE) == 2 * PAGE
    assert resident() == 62
    assert mapped.drop(5 * PAGE, 3 * PAGE) == 3 * PAGE
    assert resident() == 59
    assert mapped.drop(20 * PAGE + 1, PAGE) == 0
    assert resident() == 59
    flat(mapped)[30 * PAGE + 5] = 1
    flat(mapped)[33 * PAGE] = 1
    assert mapped.drop(29 * PAGE, 6 * PAGE) == 4 * PAGE
    assert resident() == 55
    assert mapped.drop(29 * PAGE, 6 * PAGE) == 0
    assert mapped.drop(60 * PAGE, 0) == 0


@linux
def test_was_written_is_told_by_page(mapped):
    mapped.populate(0, len(mapped))
    tensor = flat(mapped)
    assert not mapped.was_written(0, len(mapped))
    tensor[10 * PAGE] = 9
    assert mapped.was_written(0, len(mapped))
    assert mapped.was_written(10 * PAGE + 50, 1)
    assert mapped.was_written(9 * PAGE + 1, PAGE)
    assert not mapped.was_written(9 * PAGE, PAGE)
    assert not mapped.was_written(11 * PAGE, PAGE)
    assert not mapped.was_written(10 * PAGE, 0)


@linux
def test_swapped_pages_count_as_written():
    flags = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    assert module._is_written(flags).tolist() == [False, False, True, False, True, False, True, False]


@linux
@pytest.mark.parametrize("failure", ["missing", "short"])
def test_without_pagemap_nothing_is_dropped(mapped, monkeypatch, tmp_path, failure):
    pagemap = tmp_path / "pagemap"
    if failure == "short":
        pagemap.write_bytes(b"")
    monkeypatch.setattr(module, "_PAGEMAP", str(pagemap))
    tensor = flat(mapped)
    tensor[:] = 7
    assert mapped.drop(0, len(mapped)) == 0
    assert mapped.was_written(0, 1)
    assert (tensor == 7).all()


def test_on_other_systems_mapping_works_and_the_rest_does_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    data = pages_file(path, 3)
    monkeypatch.setattr(sys, "platform", "darwin")
    mapping = MappedFile(path)
    tensor = flat(mapping)
    tensor[0] = 77
    mapping.populate(0, len(mapping))
    assert mapping.drop(0, len(mapping)) == 0
    assert mapping.was_written(0, 1)
    assert mapping.cached_fraction(0, len(mapping)) is None
    assert bytes(tensor.tolist()) == b"\x4d" + data[1:]
    assert path.read_bytes() == data


@linux
def test_a_file_larger_than_memory_is_mapped(tmp_path):
    path = tmp_path / "a.safetensors"
    size = 4 * os.sysconf("SC_PHYS_PAGES") * PAGE
    try:
        with path.open("wb") as file:
            file.truncate(size)
    except OSError as error:
        pytest.skip(f"no such sparse files here: {error}")
    mapping = MappedFile(path)
    assert flat(mapping, size - 4, 4).tolist() == [0] * 4


# What is cached


def evict(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path, pages):
    """Ask in another way: a read that must not wait fails where a page is not cached. None: cannot tell."""
    found = []
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # asking for one page brings in no other
        for page in range(pages):
            try:
                os.preadv(file.fileno(), [bytearray(1)], page * PAGE, os.RWF_NOWAIT)
                found.append(True)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    return None
                found.append(False)
    return found


@linux
def test_cached_fraction_tells_the_truth(tmp_path):
    path = tmp_path / "a.safetensors"
    pages_file(path, 64)
    mapping = MappedFile(path)
    assert mapping.cached_fraction(0, len(mapping)) == 1.0
    evict(path)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 5 * PAGE, 20 * PAGE)
    told = [mapping.cached_fraction(page * PAGE, PAGE) for page in range(64)]
    assert told[20:25] == [1.0] * 5
    assert 0.0 in told
    truth = cached_pages(path, 64)
    if truth is not None:  # asking may itself have the system read more, so this goes one way only
        assert all(is_there for it, is_there in zip(told, truth, strict=True) if it)
    mapping.populate(0, len(mapping))
    assert mapping.cached_fraction(0, len(mapping)) == 1.0
    assert mapping.cached_fraction(5, 0) == 1.0


@linux
def test_cached_fraction_counts_the_lowest_bits_of_the_pages_touched(mapped, monkeypatch):
    asked = []

    def mincore(address, length, out):
        asked.append((address - mapped.address, length))
        for page in range(length // PAGE):
            module.ctypes.c_ubyte.from_address(out + page).value = 0b110 | (page % 4 == 0)
        return 0

    monkeypatch.setattr(module._libc, "mincore", mincore)
    assert mapped.cached_fraction(PAGE - 1, 7 * PAGE) == 0.25
    assert asked == [(0, 8 * PAGE)]
    monkeypatch.setattr(module._libc, "mincore", lambda *_: -1)
    with pytest.raises(CheckpointError, match="cannot be asked about"):
        mapped.cached_fraction(0, PAGE)


@linux
def test_cached_fraction_is_unknown_for_a_file_that_is_not_ours(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    pages_file(path, 2)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert MappedFile(path).cached_fraction(0, PAGE) is None


# Populating


@linux
@pytest.mark.parametrize("old_kernel", [False, True])
def test_populate_maps_every_page_of_the_range(mapped, monkeypatch, old_kernel):
    evict(mapped.path)
    if old_kernel:
        monkeypatch.setattr(module, "_MADV_POPULATE_READ", 9999)  # EINVAL, as before Linux 5.14
    mapped.populate(3 * PAGE - 1, 20 * PAGE)  # pages 2 to 22
    in_ram = mapped._page_flags(0, 64) & module._IN_RAM != 0
    assert in_ram[2:23].all()
    assert bytes(flat(mapped).tolist()) == mapped.path.read_bytes()


@linux
@pytest.mark.parametrize("old_kernel", [False, True])
@pytest.mark.parametrize("left", [0, 10, 10 * PAGE, 64 * PAGE, 64 * PAGE + 99])
def test_a_file_cut_while_mapped_is_an_error_not_a_crash(mapped, monkeypatch, left, old_kernel):
    if old_kernel:
        monkeypatch.setattr(module, "_MADV_POPULATE_READ", 9999)
    os.truncate(mapped.path, left)
    with pytest.raises(CheckpointError, match=f"'{mapped.path}' was cut to {left} bytes") as caught:
        mapped.populate(0, len(mapped))
    assert f"{64 * PAGE + 100} were expected" in str(caught.value)


@linux
@pytest.mark.parametrize("left", [0, 10 * PAGE, 64 * PAGE + 99])
def test_a_file_cut_while_being_populated_is_an_error_not_a_crash(mapped, monkeypatch, left):
    checked = []

    def cut_after_the_first_check():
        MappedFile.check_size(mapped)
        if not checked:
            os.truncate(mapped.path, left)
        checked.append(True)

    monkeypatch.setattr(mapped, "check_size", cut_after_the_first_check)
    with pytest.raises(CheckpointError, match=f"The file has {left} bytes|was cut to {left} bytes"):
        mapped.populate(0, len(mapped))


@linux
def test_populate_tries_again_when_interrupted(mapped, monkeypatch):
    real = module._libc.madvise
    codes = [errno.EINTR, errno.EAGAIN]

    def madvise(address, length, advice):
        if advice == module._MADV_POPULATE_READ and codes:
            module.ctypes.set_errno(codes.pop())
            return -1
        return real(address, length, advice)

    monkeypatch.setattr(module._libc, "madvise", madvise)
    mapped.populate(0, len(mapped))
    assert not codes


@linux
def test_other_threads_run_while_populating(mapped, monkeypatch):
    """A signal from another thread arrives during the call only if the GIL was let go."""
    entered, answered = threading.Event(), threading.Event()

    def other():
        entered.wait(5)
        answered.set()

    # A C function that blocks stands in for the disk.
    blocking = module.ctypes.CDLL(None).usleep
    thread = threading.Thread(target=other)
    thread.start()
    during = []

    def madvise(*_):
        entered.set()
        blocking(300_000)
        during.append(answered.is_set())
        return 0

    monkeypatch.setattr(module._libc, "madvise", madvise)
    mapped.populate(0, PAGE)
    thread.join()
    assert during[0]
    assert type(module._libc) is module.ctypes.CDLL  # PyDLL would keep the GIL


# Lifetime


def test_a_tensor_keeps_its_mapping_open_and_the_last_one_closes_it(tmp_path):
    path = tmp_path / "a.safetensors"
    data = pages_file(path, 4)
    mapping = MappedFile(path)
    alive = weakref.ref(mapping)
    tensor = flat(mapping)
    view = tensor.view(4, PAGE)[2:, 5:]
    with pytest.raises(BufferError):
        mapping.close()
    gc.disable()
    try:
        del mapping, tensor
        assert alive() is not None
        path.unlink()
        assert bytes(view[1].tolist()) == data[3 * PAGE + 5 :]
        found, offset, nbytes = find_mapping(view)
        assert (found.path, offset, nbytes) == (path, 2 * PAGE + 5, 2 * PAGE - 5)
        del view, found
        assert alive() is None  # at once, not at the next collection
    finally:
        gc.enable()


def test_a_closed_mapping_is_refused_and_not_found(tmp_path):
    path = tmp_path / "a.safetensors"
    pages_file(path, 2)
    mapping = MappedFile(path)
    mapping.close()
    for call in (mapping.populate, mapping.drop, mapping.cached_fraction, mapping.was_written):
        with pytest.raises(ValueError, match="closed"):
            call(0, 1)
    other = torch.ones(3)
    mapping.address = other.data_ptr()  # the system may give the addresses to others
    module._live[mapping.address] = mapping
    assert find_mapping(other) is None
    assert "closed" in repr(mapping)


def test_find_mapping_of_other_tensors(mapped):
    assert find_mapping(torch.ones(3)) is None
    assert find_mapping(torch.ones(3, device="meta")) is None
    assert find_mapping(torch.eye(3).to_sparse()) is None
    assert find_mapping(flat(mapped)[:0]) is None
    assert find_mapping(flat(mapped).clone()) is None
    parameter = torch.nn.Parameter(flat(mapped, 8, 24).view(torch.float32).view(2, 3))
    assert find_mapping(parameter) == (mapped, 8, 24)
    assert find_mapping(parameter.t()) == (mapped, 8, 24)
    assert find_mapping(parameter[:, 1]) == (mapped, 12, 16)
    assert find_mapping(flat(mapped)[-1:]) == (mapped, len(mapped) - 1, 1)


# Refusals


def test_a_range_outside_the_file_is_refused(mapped):
    size = len(mapped)
    for offset, nbytes in ((-1, 2), (0, -1), (0, size + 1), (size, 1)):
        for call in (mapped.populate, mapped.drop, mapped.cached_fraction, mapped.was_written):
            with pytest.raises(ValueError, match="is not inside"):
                call(offset, nbytes)
    with pytest.raises(ValueError, match="is not inside"):
        flat(mapped, size - 1, 2)


def test_a_file_that_cannot_be_mapped_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing' cannot be mapped"):
        MappedFile(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="empty' cannot be mapped"):
        MappedFile(tmp_path / "empty")


def test_a_file_changed_between_header_and_mapping_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3)}, path)
    checkpoint = Checkpoint.open(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="'w', was written to"):
        map_checkpoint(checkpoint)
