"""Where each tensor of a safetensors checkpoint lies: headers only, no weights are read.

A checkpoint stays on disk as its author wrote it, and weights are read from there for as long as a model
runs. So the header is checked completely, once, before anything relies on it: every later read is
plain arithmetic on offsets. What the files looked like then is remembered in a stamp, because a shard that
is replaced under a running model would otherwise give wrong numbers in silence.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from attrs import evolve, frozen

from hookcore.errors import CheckpointError
from hookcore.memory.files.regular_file import open_regular, unreadable
from hookcore.memory.files.safetensors_header import (
    GET_AGAIN,
    MAX_HEADER_BYTES,
    FileStamp,
    TensorEntry,
    parse_json,
    read_header,
    read_sample,
)
from hookcore.units import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_STEMS = ("diffusion_pytorch_model", "model")  # the names diffusers and transformers write
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@frozen(eq=False)
class Checkpoint:
    """A safetensors checkpoint of one or more files whose headers were read and found sound.

    Attributes:
        root: The folder that holds the files.
        entries: Every tensor by its key, in file order: files by name, tensors by offset.
        stamps: Every file, in the same order, and what it looked like when it was last looked at.
    """

    root: Path
    entries: Mapping[str, TensorEntry]
    stamps: dict[Path, FileStamp]

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
        try:
            return cls._open(Path(path), subfolder, variant)
        except (OSError, ValueError) as error:  # ValueError: a null character in a name
            raise unreadable(getattr(error, "filename", None) or path, error) from error

    @classmethod
    def _open(cls, given: Path, subfolder: str | None, variant: str | None) -> Self:
        if not given.exists():
            raise CheckpointError(
                f"There is no checkpoint at {shown(str(given))}: expected a safetensors file, its index or a "
                "folder. One that is on the Hub must be downloaded first: "
                "huggingface_hub.snapshot_download(name)."
            )
        if given.is_dir():
            given = _find_in_folder(given / subfolder if subfolder else given, variant)
        elif subfolder or variant:
            raise CheckpointError(
                f"'{given}' is a file: subfolder and variant choose a file in a folder. Leave them out."
            )
        if given.name.endswith(".json"):
            return cls._open_shards(given)
        stamp, entries = _header_of(given)
        return cls(given.parent, {entry.key: entry for entry in entries}, {given: stamp})

    @classmethod
    def _open_shards(cls, index: Path) -> Self:
        weight_map = _read_index(index)
        shards = [index.parent / name for name in sorted(set(weight_map.values()))]
        if missing := [shard.name for shard in shards if not shard.exists()]:
            key = next(key for key, name in weight_map.items() if name == missing[0])
            raise CheckpointError(
                f"Shard {missing[0]!r} is missing ({len(missing)} of {len(shards)} shards are): index "
                f"'{index}' says that it holds {shown(key)}. Download the missing shards into "
                f"'{index.parent}'."
            )
        entries: dict[str, TensorEntry] = {}
        stamps = {}
        for shard in shards:
            stamps[shard], found = _header_of(shard)
            for entry in found:
                listed = weight_map.get(entry.key)
                if listed != shard.name:
                    raise CheckpointError(
                        f"Shard '{shard}' holds tensor {shown(entry.key)}, but index '{index}' "
                        f"{'does not list it' if listed is None else f'says that {listed!r} does'}. "
                        "Index and shards are of different checkpoints: download both again."
                    )
                entries[entry.key] = entry
        for key, name in weight_map.items():
            if key not in entries:
                raise CheckpointError(
                    f"Index '{index}' says that shard {name!r} holds tensor {shown(key)}, but it does not. "
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
            if found == expected or self._is_as_it_was(path, found, expected):
                return
            if found.size < expected.size:
                fault = f"shrank to {found.size} bytes, {expected.size} were expected"
            elif found.size > expected.size:
                fault = f"grew to {found.size} bytes, {expected.size} were expected"
            elif found.inode != expected.inode:
                fault = "was replaced by another file"
            elif found.mtime_ns != expected.mtime_ns:
                fault = "was written to"
            else:
                fault = "was written to and given its old times"
        key = next((entry.key for entry in self.entries.values() if entry.path == path), None)
        raise CheckpointError(
            f"'{path}', which holds tensor {shown(key)}, {fault} since its header was read. Weights are read "
            "from this file while the model runs: put the original back, or load the model again."
        )

    def _is_as_it_was(self, path: Path, found: FileStamp, expected: FileStamp) -> bool:
        """Whether a file that was put back, moved or linked holds what it held; it is known by that then."""
        entries = [entry for entry in self.entries.values() if entry.path == path]
        try:
            if not found.is_like(expected) or read_sample(path, entries) != expected.sample:
                return False
        except OSError:
            return False
        self.stamps[path] = evolve(found, sample=expected.sample)
        return True


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
        raise _pickled(f"'{folder / pickles[0]}'")
    wanted = f"safetensors checkpoint of variant {variant!r}" if variant else "safetensors checkpoint"
    raise CheckpointError(
        f"'{folder}' holds no {wanted}; it holds {', '.join(weights or names[:10]) or 'nothing'}. "
        "Pass a file, an index, or the subfolder= and variant= that the weights are in."
    )


def _pickled(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle checkpoint; only safetensors tell where each tensor lies. Convert it once: "
        "load the model and call model.save_pretrained(folder), or "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
    )


def _header_of(path: Path) -> tuple[FileStamp, list[TensorEntry]]:
    if path.name.endswith(_PICKLE_SUFFIXES):
        raise _pickled(f"'{path}'")
    return read_header(path)


def _read_index(path: Path) -> dict[str, str]:
    """Read which shard, by file name, holds each key."""
    with os.fdopen(open_regular(path), "rb") as file:
        text = file.read(MAX_HEADER_BYTES + 1)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"Index '{path}' is longer than {MAX_HEADER_BYTES} bytes. {GET_AGAIN}")
    try:
        index = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"Index '{path}' cannot be read: {error}. {GET_AGAIN}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"Index '{path}' has no 'weight_map' of keys to file names. {GET_AGAIN}")
    for key, name in weight_map.items():
        # A plain name: an index must not lead out of its folder.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            if isinstance(name, str) and name.endswith(_PICKLE_SUFFIXES):
                raise _pickled(shown(str(path.parent / name)))
            raise CheckpointError(
                f"Index '{path}' says that {shown(name)} holds tensor {shown(key)}: expected the name of a "
                f".safetensors file beside it. {GET_AGAIN}"
            )
    return weight_map
