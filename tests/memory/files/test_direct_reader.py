"""Reads past the page cache: the same bytes, at the same place within a page, from any file system."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookcore.errors import CheckpointError
from hookcore.memory.files import direct_reader as direct
from hookcore.memory.files.checkpoint import Checkpoint
from hookcore.memory.files.direct_reader import ALIGNMENT, DirectReader, aligned_span
from hookcore.memory.files.mapped_file import map_checkpoint
from hookcore.memory.files.page_arena import separate_pages

SIZE = 5 * ALIGNMENT + 123
CONTENT = bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).tolist())

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs POSIX reads")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "a.safetensors"
    path.write_bytes(CONTENT)
    return path


def refuse_direct(monkeypatch, where):
    """Behave as a file system that knows no direct reads."""
    real_open, real_preadv = os.open, os.preadv
    direct_fds = set()

    def fake_open(path, flags, *rest):
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        fd = real_open(path, flags & ~os.O_DIRECT, *rest)
        (direct_fds.add if flags & os.O_DIRECT else direct_fds.discard)(fd)
        return fd

    def fake_preadv(fd, *rest):
        if fd in direct_fds:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(fd, *rest)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "preadv", fake_preadv)


@pytest.fixture(params=["as it is", "open", "read", "unknown"])
def reader(request, path, monkeypatch):
    if request.param == "unknown":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif request.param != "as it is":
        refuse_direct(monkeypatch, request.param)
    with DirectReader(path) as reader:
        assert request.param == "as it is" or not reader.direct
        yield reader


def test_every_kind_of_range(reader):
    edges = sorted({0, 1, 100, SIZE - 1, SIZE} | {n * ALIGNMENT + d for n in range(1, 6) for d in (-1, 0, 1)})
    buffer = separate_pages(SIZE + ALIGNMENT)
    for start in edges:
        for stop in (edge for edge in edges if edge >= start):
            for at in {0, (buffer.nbytes - aligned_span(start, stop)) // ALIGNMENT * ALIGNMENT}:
                buffer.tensor.fill_(77)
                position = reader.read_range(buffer, start, stop, at=at)
                assert position == at + start % ALIGNMENT
                found = buffer.memoryview[position : position + stop - start]
                assert found == CONTENT[start:stop]
                assert (buffer.tensor[:at] == 77).all()
                assert (buffer.tensor[at + aligned_span(start, stop) :] == 77).all()


@given(data=st.data())
def test_small_chunks_and_short_reads(data, path):
    """The system may return less than was asked for, anywhere."""
    real = os.preadv

    def short(fd, buffers, offset):
        return min(real(fd, buffers, offset), data.draw(st.integers(ALIGNMENT, 3 * ALIGNMENT)))

    with pytest.MonkeyPatch.context() as patch, DirectReader(path) as reader:
        patch.setattr(direct, "_CHUNK_BYTES", data.draw(st.integers(1, 3)) * ALIGNMENT)
        patch.setattr(os, "preadv", short)
        start = data.draw(st.integers(0, SIZE))
        stop = data.draw(st.integers(start, SIZE))
        buffer = separate_pages(aligned_span(start, stop))
        position = reader.read_range(buffer, start, stop)
        assert buffer.memoryview[position : position + stop - start] == CONTENT[start:stop]


DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.complex64)


@given(
    layout=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 60), max_size=2)), min_size=1, max_size=5
    ),
    seed=st.integers(0, 9),
)
def test_any_checkpoint_is_read_bit_equal_at_the_alignment_of_its_mapping(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (dtype, shape) in enumerate(layout):
        data = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
        state[f"w{number}"] = (
            data.view(dtype).view(shape) if data.numel() else torch.empty(shape, dtype=dtype)
        )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(state, path)
        checkpoint = Checkpoint.open(path)
        mapping = map_checkpoint(checkpoint)[path]
        with DirectReader(path) as reader:
            for key, entry in checkpoint.entries.items():
                stop = entry.offset + entry.nbytes
                buffer = separate_pages(aligned_span(entry.offset, stop))
                position = reader.read_range(buffer, entry.offset, stop)
                found = buffer.tensor[position : position + entry.nbytes]
                expected = state[key].flatten().view(torch.uint8)
                assert torch.equal(found, expected)
                if entry.nbytes:
                    assert (found.data_ptr() - mapping.tensor(entry).data_ptr()) % ALIGNMENT == 0


def test_threads_share_a_reader(path):
    faults = []

    def work(reader, number):
        buffer = separate_pages(SIZE + ALIGNMENT)
        for step in range(50):
            start = (number * 997 + step * 313) % SIZE
            position = reader.read_range(buffer, start, SIZE)
            if buffer.memoryview[position : position + SIZE - start] != CONTENT[start:]:
                faults.append(start)

    with DirectReader(path) as reader:
        threads = [threading.Thread(target=work, args=(reader, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults


def test_a_range_past_the_end_names_the_file(reader, path):
    buffer = separate_pages(SIZE + 2 * ALIGNMENT)
    for start, stop in ((0, SIZE + 1), (SIZE, SIZE + 1), (SIZE - 1, SIZE + 1), (SIZE + 5, SIZE + 6)):
        with pytest.raises(CheckpointError, match=f"{path}' ends .* {start} to {stop} were to be read"):
            reader.read_range(buffer, start, stop)
    far = SIZE + 50 * ALIGNMENT
    with pytest.raises(CheckpointError, match="ends"):
        reader.read_range(buffer, far, far + 1)


def test_a_file_cut_while_open_names_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(CONTENT)
    with DirectReader(path) as reader:
        os.truncate(path, ALIGNMENT + 7)
        with pytest.raises(CheckpointError, match=f"ends at byte {ALIGNMENT + 7}, 5 to {SIZE} were"):
            reader.read_range(separate_pages(SIZE + ALIGNMENT), 5, SIZE)


@pytest.mark.parametrize(
    ("start", "stop", "at"), [(-1, 5, 0), (5, 4, 0), (0, 5, 1), (0, 5, -ALIGNMENT), (0, 5, 1 << 20)]
)
def test_ranges_that_do_not_fit_are_refused(reader, start, stop, at):
    with pytest.raises(ValueError, match="buffer of"):
        reader.read_range(separate_pages(ALIGNMENT * 16), start, stop, at=at)


def test_a_buffer_too_small_is_refused(reader):
    with pytest.raises(ValueError, match="takes 8192 bytes"):
        reader.read_range(separate_pages(mmap.PAGESIZE), ALIGNMENT - 1, ALIGNMENT + 1, at=ALIGNMENT)


def test_a_failing_disk_and_a_missing_file_are_named(path, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="nothing' cannot be opened: No such file"):
        DirectReader(tmp_path / "nothing")
    with DirectReader(path) as reader:

        def fail(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=f"3 to 9 of '{path}' cannot be read: Input/output error"):
            reader.read_range(separate_pages(ALIGNMENT), 3, 9)
        if reader.direct:
            with pytest.raises(CheckpointError, match="cannot be opened: Input/output error"):
                DirectReader(path)


def open_descriptors():
    return len(list(Path("/dev/fd").iterdir()))


def test_close_gives_the_descriptor_back(path):
    before = open_descriptors()
    with DirectReader(path) as reader:
        assert open_descriptors() == before + 1
    reader.close()
    assert open_descriptors() == before
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.read_range(separate_pages(ALIGNMENT), 0, 1)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_buffered_reads_ask_to_be_forgotten(path, monkeypatch):
    refuse_direct(monkeypatch, "open")
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, *rest: asked.append(rest))
    with DirectReader(path) as reader:
        reader.read_range(separate_pages(SIZE), ALIGNMENT + 1, 3 * ALIGNMENT)
        reader.read_range(
            separate_pages(SIZE), ALIGNMENT, ALIGNMENT
        )  # a length of 0 would mean: all the rest
    assert asked == [(ALIGNMENT, 2 * ALIGNMENT, os.POSIX_FADV_DONTNEED)]


def test_aligned_span():
    assert [aligned_span(0, n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [
        0,
        ALIGNMENT,
        ALIGNMENT,
        2 * ALIGNMENT,
    ]
    assert aligned_span(ALIGNMENT - 1, ALIGNMENT + 1) == 2 * ALIGNMENT
    assert aligned_span(7, 7) == ALIGNMENT
    assert direct._CHUNK_BYTES % ALIGNMENT == 0
