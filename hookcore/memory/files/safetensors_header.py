"""The header of one safetensors file: where each of its tensors lies, checked completely.

The format: https://huggingface.co/docs/safetensors (a little-endian u64, that many bytes of JSON, the data).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import torch
from attrs import evolve, field, frozen
from safetensors import SafetensorError, safe_open

from hookcore.errors import CheckpointError
from hookcore.memory.files.regular_file import open_regular
from hookcore.units import shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""What a safetensors header calls a dtype. Types of less than a byte (F4, F6_*) are refused."""

_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; for an index, too."""
_MAX_ELEMENTS = 2**63 - 1  # what torch can count
_SAMPLES = 64  # tensors of a file; where nothing is cached each takes a read of the disk
_SAMPLE_BYTES = 64
_SHOWN = 500  # characters of another library's message
GET_AGAIN = "Download or save the file again."


@frozen
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        key: Its name in the checkpoint.
        path: The file that holds it.
        dtype: As stored.
        shape: As stored; `()` for a scalar.
        offset: Of its first byte, from the start of the file, in bytes. Files of old writers do not align it.
        nbytes: Length in bytes; 0 if a dimension is 0.
    """

    key: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@frozen
class FileStamp:
    """What a file looked like when its header was read.

    Attributes:
        size: Bytes.
        mtime_ns: Time of the last change of its content, as anybody may set it.
        ctime_ns: Time of the last change of it, its names or its rights, which nobody can set.
        inode: Tells a file that was replaced by another of the same size and time.
        sample: A few bytes of some tensors. Not compared: see `is_like`.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sample: bytes = field(default=b"", eq=False, repr=False)

    @classmethod
    def of(cls, file: Path | int) -> Self:
        """Take the stamp of a path or of an open file descriptor.

        Raises:
            OSError: The file cannot be looked at.
        """
        status = os.stat(file)  # noqa: PTH116 - takes descriptors too, and is called before every group read
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def is_like(self, other: Self) -> bool:
        """Return whether nothing but the time of a file's last change of any kind is another.

        So it is where it was moved, linked, given other rights or put back, and where it was written to and
        given its old times. Samples tell which.
        """
        return evolve(self, ctime_ns=other.ctime_ns) == other


def read_header(path: Path) -> tuple[FileStamp, list[TensorEntry]]:
    """Read and check one file's header; the entries are in order of their offsets."""
    with os.fdopen(open_regular(path), "rb") as file:
        stamp = FileStamp.of(file.fileno())
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data_start = _LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"'{path}' is not a safetensors file: its {stamp.size} bytes do not begin with the "
                f"length of a header of at most {MAX_HEADER_BYTES} bytes. {GET_AGAIN}"
            )
        if data_start > stamp.size:
            raise CheckpointError(
                f"'{path}' is truncated: its header ends at byte {data_start}, the file at "
                f"{stamp.size}: {data_start - stamp.size} bytes are missing, and all data. {GET_AGAIN}"
            )
        text = file.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"The header of '{path}' cannot be read: {error}. {GET_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of '{path}' is not a table of tensors. {GET_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'__metadata__' of '{path}' is not a table of strings. {GET_AGAIN}")
    entries = [_entry(path, key, fields, data_start) for key, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(path, entries, data_start, stamp.size)
    try:
        with safe_open(path, "pt"):  # the format's own parser decides what is valid
            return evolve(stamp, sample=read_sample(path, entries)), entries
    except SafetensorError as error:
        reason = str(error)[:_SHOWN]
        raise CheckpointError(f"safetensors refuses '{path}': {reason}. {GET_AGAIN}") from error


def read_sample(path: Path, entries: Sequence[TensorEntry]) -> bytes:
    """Read the first bytes of some of a file's tensors: each, or as many as there may be, evenly.

    Raises:
        OSError: The file cannot be read.
    """
    step = -(-len(entries) // _SAMPLES) or 1
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        found = []
        for entry in entries[::step]:
            file.seek(entry.offset)
            found.append(file.read(min(entry.nbytes, _SAMPLE_BYTES)))
    return b"".join(found)


def parse_json(text: bytes) -> Any:
    """Parse JSON, refusing a key that stands twice: one of the two would be lost without a word.

    Raises:
        ValueError: It is not JSON, or not of this kind.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {shown(twice)} stands there twice")
        for key in table:
            key.encode()  # half of a surrogate pair is no text: UnicodeEncodeError is a ValueError
        return table

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _entry(path: Path, key: str, fields: object, data_start: int) -> TensorEntry:
    """Check what the header says of one tensor, apart from the others."""

    def fault(found: str) -> CheckpointError:
        return CheckpointError(
            f"The header of '{path}' is damaged at tensor {shown(key)}: {found}. {GET_AGAIN}"
        )

    if not isinstance(fields, dict):
        raise fault(f"expected a table, found {shown(fields)}")
    name, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not _is_sizes(shape) or not _is_countable(shape):
        raise fault(f"expected a shape, found {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(f"expected data_offsets [begin, end], found {shown(offsets)}")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(
            f"Tensor {shown(key)} in '{path}' has dtype {shown(name)}, which has no torch dtype of whole "
            f"bytes; expected one of {', '.join(DTYPES)}. Save it in one of these, or load it in the usual "
            "way."
        )
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise fault(
            f"shape {shown(shape)} of {name} takes {nbytes} bytes, data_offsets give it {end - begin}"
        )
    return TensorEntry(key, path, dtype, tuple(shape), data_start + begin, nbytes)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    """Return whether it is a list of non-negative whole numbers (JSON's `true` is an int to Python)."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _is_countable(shape: list[int]) -> bool:
    """Return whether torch can count the elements of a shape, and of its parts."""
    elements = 1
    for size in shape:
        elements *= size or 1
        if elements > _MAX_ELEMENTS:  # at once: the product of many takes time
            return False
    return True


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Check that the tensors, in order, fill the file's data without gap or overlap."""
    position = data_start
    for entry in entries:
        if entry.offset != position:
            fault = "overlaps the one before it" if entry.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"The header of '{path}' is damaged: tensor {shown(entry.key)} begins at byte {entry.offset} "
                f"and {fault}, which ends at {position}. {GET_AGAIN}"
            )
        position += entry.nbytes
    if position > size:
        cut = next(entry.key for entry in entries if entry.offset + entry.nbytes > size)
        raise CheckpointError(
            f"'{path}' is truncated: {position - size} of {position} bytes are missing, from tensor "
            f"{shown(cut)} on. {GET_AGAIN}"
        )
    if position < size:
        raise CheckpointError(
            f"'{path}' is damaged: {size - position} bytes follow the last tensor, which ends at byte "
            f"{position}. {GET_AGAIN}"
        )
