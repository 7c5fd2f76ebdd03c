"""Where each tensor of a safetensors checkpoint lies: headers only, no weights are read.

A checkpoint stays on disk as its author wrote it, and weights are read from there for as long as a model
runs. So the header is checked completely, once, before anything relies on it: every later read is
plain arithmetic on offsets. What the files looked like then is remembered in a stamp, because a shard that
is replaced under a running model would otherwise give wrong numbers in silence.

The format: https://huggingface.co/docs/safetensors (a little-endian u64, that many bytes of JSON, the data).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import torch
from attrs import frozen

from hookcore.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_ELEMENTS = 2**63 - 1  # what torch can count
_STEMS = ("diffusion_pytorch_model", "model")  # the names diffusers and transformers write
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_GET_AGAIN = "Download or save the file again."


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
        mtime_ns: Time of the last change of its content.
        inode: Tells a file that was replaced by another of the same size and time.
    """

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> Self:
        """Take the stamp of a path or of an open file descriptor.

        Raises:
            OSError: The file cannot be looked at.
        """
        status = os.stat(file)  # noqa: PTH116 - takes descriptors too, and is called before every group read
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@frozen(eq=False)
class Checkpoint:
    """A safetensors checkpoint of one or more files whose headers were read and found sound.

    Attributes:
        root: The folder that holds the files.
        entries: Every tensor by its key, in file order: files by name, tensors by offset.
        stamps: Every file, in the same order, and what it looked like.
    """

    root: Path
    entries: Mapping[str, TensorEntry]
    stamps: Mapping[Path, FileStamp]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, subfolder: str | None = None, variant: str | None = None
    ) -> Self:
        """Find the files of a checkpoint and read their headers.

        Args:
            path: A `.safetensors` file, a `.safetensors.index.json`, or a folder with one or the other, as
                `save_pretrained` of diffusers and transformers writes it.
            subfolder: The folder inside `path`, e.g. `"transformer"` of a pipeline.
            variant: As in `from_pretrained`, e.g. `"fp16"`.

        Raises:
            CheckpointError: No checkpoint is there, more than one is, or a file is missing or damaged.
        """
        given = Path(path)
        if not given.exists():
            raise CheckpointError(
                f"There is no checkpoint at '{given}': expected a safetensors file, its index or a folder. "
                "One that is on the Hub must be downloaded first: huggingface_hub.snapshot_download(name)."
            )
        if given.is_dir():
            given = _find_in_folder(given / subfolder if subfolder else given, variant)
        elif subfolder or variant:
            raise CheckpointError(
                f"'{given}' is a file: subfolder and variant choose a file in a folder. Leave them out."
            )
        if given.name.endswith(".json"):
            return cls._open_shards(given)
        stamp, entries = _read_header(given)
        return cls(given.parent, {entry.key: entry for entry in entries}, {given: stamp})

    @classmethod
    def _open_shards(cls, index: Path) -> Self:
        weight_map = _read_index(index)
        shards = [index.parent / name for name in sorted(set(weight_map.values()))]
        if missing := [shard.name for shard in shards if not shard.exists()]:
            key = next(key for key, name in weight_map.items() if name == missing[0])
            raise CheckpointError(
                f"Shard {missing[0]!r} is missing ({len(missing)} of {len(shards)} shards are): index "
                f"'{index}' says that it holds {key!r}. Download the missing shards into '{index.parent}'."
            )
        entries: dict[str, TensorEntry] = {}
        stamps = {}
        for shard in shards:
            stamps[shard], found = _read_header(shard)
            for entry in found:
                listed = weight_map.get(entry.key)
                if listed != shard.name:
                    raise CheckpointError(
                        f"Shard '{shard}' holds tensor {entry.key!r}, but index '{index}' "
                        f"{'does not list it' if listed is None else f'says that {listed!r} does'}. "
                        "Index and shards are of different checkpoints: download both again."
                    )
                entries[entry.key] = entry
        for key, name in weight_map.items():
            if key not in entries:
                raise CheckpointError(
                    f"Index '{index}' says that shard {name!r} holds tensor {key!r}, but it does not. "
                    "Index and shards are of different checkpoints: download both again."
                )
        return cls(index.parent, entries, stamps)

    @property
    def nbytes(self) -> int:
        """Of all tensors together, without headers."""
        return sum(entry.nbytes for entry in self.entries.values())

    def verify(self, paths: Iterable[Path] | None = None) -> None:
        """Check that files (all of them by default) are still those whose headers were read.

        Raises:
            CheckpointError: One was changed, replaced or removed.
        """
        for path in self.stamps if paths is None else paths:
            self.verify_file(path)

    def verify_file(self, path: Path) -> None:
        """Check that one of this checkpoint's files is still the one whose header was read.

        One `stat`, a few microseconds: cheap enough to ask before every read.

        Raises:
            CheckpointError: It was changed, replaced or removed.
        """
        expected = self.stamps[path]
        try:
            found = FileStamp.of(path)
        except OSError as error:
            fault = f"cannot be read any more ({error.strerror})"
        else:
            if found == expected:
                return
            if found.size < expected.size:
                fault = f"shrank to {found.size} bytes, {expected.size} were expected"
            elif found.size > expected.size:
                fault = f"grew to {found.size} bytes, {expected.size} were expected"
            elif found.inode != expected.inode:
                fault = "was replaced by another file"
            else:
                fault = "was written to"
        key = next((entry.key for entry in self.entries.values() if entry.path == path), None)
        raise CheckpointError(
            f"'{path}', which holds tensor {key!r}, {fault} since its header was read. Weights are read from "
            "this file while the model runs: put the original back, or take the model's techniques off and "
            "load the new checkpoint."
        )


def _find_in_folder(folder: Path, variant: str | None) -> Path:
    """Choose the one file or index that a folder offers; a guess between two could give wrong weights."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder '{folder}'. Check subfolder= against the checkpoint.")
    infix = f".{variant}" if variant else ""
    standard = [
        folder / name
        for stem in _STEMS
        for name in (f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json")
        if (folder / name).exists()
    ]
    names = sorted(child.name for child in folder.iterdir())
    candidates = standard
    if not candidates and not variant:
        indexes = [folder / name for name in names if name.endswith(".safetensors.index.json")]
        candidates = indexes or [folder / name for name in names if name.endswith(".safetensors")]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"'{folder}' holds more than one checkpoint: {', '.join(file.name for file in candidates)}. "
            "Pass the path of the file or index that is meant."
        )
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    weights = [name for name in names if ".safetensors" in name]
    if pickles and not weights:
        raise _pickled(folder / pickles[0])
    wanted = f"safetensors checkpoint of variant {variant!r}" if variant else "safetensors checkpoint"
    raise CheckpointError(
        f"'{folder}' holds no {wanted}; it holds {', '.join(weights or names[:10]) or 'nothing'}. "
        "Pass a file, an index, or the subfolder= and variant= that the weights are in."
    )


def _pickled(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is a pickle checkpoint; only safetensors tell where each tensor lies. Convert it once: "
        "load the model and call model.save_pretrained(folder), or "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
    )


def _read_index(path: Path) -> dict[str, str]:
    """Read which shard, by file name, holds each key."""
    try:
        index = _parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Index '{path}' cannot be read: {error}. {_GET_AGAIN}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"Index '{path}' has no 'weight_map' of keys to file names. {_GET_AGAIN}")
    for key, name in weight_map.items():
        # A plain name: an index must not lead out of its folder.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            if isinstance(name, str) and name.endswith(_PICKLE_SUFFIXES):
                raise _pickled(path.parent / name)
            raise CheckpointError(
                f"Index '{path}' says that {name!r} holds tensor {key!r}: expected the name of a "
                f".safetensors file beside it. {_GET_AGAIN}"
            )
    return weight_map


def _read_header(path: Path) -> tuple[FileStamp, list[TensorEntry]]:
    """Read and check one file's header; the entries are in order of their offsets."""
    if path.name.endswith(_PICKLE_SUFFIXES):
        raise _pickled(path)
    try:
        with path.open("rb") as file:
            stamp = FileStamp.of(file.fileno())
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            data_start = _LENGTH_BYTES + length
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"'{path}' is not a safetensors file: its {stamp.size} bytes do not begin with the "
                    f"length of a header of at most {_MAX_HEADER_BYTES} bytes. {_GET_AGAIN}"
                )
            if data_start > stamp.size:
                raise CheckpointError(
                    f"'{path}' is truncated: its header ends at byte {data_start}, the file at "
                    f"{stamp.size}: {data_start - stamp.size} bytes are missing, and all data. {_GET_AGAIN}"
                )
            header = _parse_json(file.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The header of '{path}' cannot be read: {error}. {_GET_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"The header of '{path}' is not a table of tensors. {_GET_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"'__metadata__' of '{path}' is not a table of strings. {_GET_AGAIN}")
    entries = [_entry(path, key, fields, data_start) for key, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_layout(path, entries, data_start, stamp.size)
    return stamp, entries


def _parse_json(text: bytes) -> Any:
    """Parse JSON, refusing a key that stands twice: one of the two would be lost without a word.

    Raises:
        ValueError: It is not JSON, or not of this kind.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in table if keys.count(key) > 1)
            raise ValueError(f"key {twice!r} stands there twice")
        return table

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _entry(path: Path, key: str, fields: object, data_start: int) -> TensorEntry:
    """Check what the header says of one tensor, apart from the others."""

    def fault(found: str) -> CheckpointError:
        return CheckpointError(f"The header of '{path}' is damaged at tensor {key!r}: {found}. {_GET_AGAIN}")

    if not isinstance(fields, dict):
        raise fault(f"expected a table, found {fields!r}")
    name, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not _is_sizes(shape) or math.prod(size or 1 for size in shape) > _MAX_ELEMENTS:
        raise fault(f"expected a shape, found {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(f"expected data_offsets [begin, end], found {offsets!r}")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise CheckpointError(
            f"Tensor {key!r} in '{path}' has dtype {name!r}, which has no torch dtype of whole bytes; "
            f"expected one of {', '.join(DTYPES)}. Save it in one of these, or load it in the usual way."
        )
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise fault(f"shape {shape} of {name} takes {nbytes} bytes, data_offsets give it {end - begin}")
    return TensorEntry(key, path, dtype, tuple(shape), data_start + begin, nbytes)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of non-negative whole numbers (JSON's `true` is an int to Python)."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Check that the tensors, in order, fill the file's data without gap or overlap."""
    position = data_start
    for entry in entries:
        if entry.offset != position:
            fault = "overlaps the one before it" if entry.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"The header of '{path}' is damaged: tensor {entry.key!r} begins at byte {entry.offset} and "
                f"{fault}, which ends at {position}. {_GET_AGAIN}"
            )
        position += entry.nbytes
    if position > size:
        cut = next(entry.key for entry in entries if entry.offset + entry.nbytes > size)
        raise CheckpointError(
            f"'{path}' is truncated: {position - size} of {position} bytes are missing, from tensor {cut!r} "
            f"on. {_GET_AGAIN}"
        )
    if position < size:
        raise CheckpointError(
            f"'{path}' is damaged: {size - position} bytes follow the last tensor, which ends at byte "
            f"{position}. {_GET_AGAIN}"
        )
