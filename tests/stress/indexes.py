"""Indexes of sharded checkpoints, sound and damaged, beside files that are none."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import frozen
from safetensors.torch import save_file

from hookcore import CheckpointError
from hookcore.memory import Checkpoint
from hookcore.testing.twins import promise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INDEX = "model.safetensors.index.json"
_MOST_CHARACTERS = 5000
_ODD_NAMES: tuple[Any, ...] = (
    *(
        "../outside.safetensors",
        "/etc/passwd",
        "sub/inside.safetensors",
        "./model-00001-of-00002.safetensors",
    ),
    *("", ".", "..", "pipe.safetensors", "folder.safetensors", "zero.safetensors", "loop.safetensors"),
    *(
        "missing.safetensors",
        "weights.bin",
        "nul\0.safetensors",
        "x" * 300 + ".safetensors",
        "\ud800.safetensors",
    ),
    *(None, 1, [], {}, True, "x" * 100_000, "leads_out.safetensors"),
)
_ODD_MAPS: tuple[Any, ...] = (None, [], {}, 1, "x", [["a", _SHARDS[0]]], {"a": None})
_TEXTS = (
    b"",
    b"[]",
    b"null",
    b"NaN",
    b"{",
    b"\xff\xfe",
    b'{"weight_map":' * 2000,
    b"[" * 100_000,
    b'"\\ud800"',
)


@frozen
class Index:
    """One folder with an index and two shards.

    Attributes:
        seed: Draws it.
    """

    seed: int
    count: ClassVar[int] = 1
    seconds: ClassVar[float] = 20

    def check(self) -> None:
        """Opens the index: all tensors are where it says, or CheckpointError says what is wrong."""
        chance = random.Random(self.seed)
        with tempfile.TemporaryDirectory(prefix="stress-") as temporary:
            folder = Path(temporary, "checkpoint")
            folder.mkdir()
            stored = _write_shards(folder, chance)
            text = _index(stored, chance)
            _put_odd_things_beside(folder)
            (folder / _INDEX).write_bytes(text)
            try:
                checkpoint = Checkpoint.open(folder / _INDEX)
            except CheckpointError as error:
                promise(len(str(error)) <= _MOST_CHARACTERS, "no message is of many thousand characters")
                valid = {"weight_map": {key: name for name in stored for key in stored[name]}}
                promise(not _is(text, valid), f"a valid index is not refused: {error}")
            else:
                weight_map = json.loads(text)["weight_map"]
                found = {key: entry.path for key, entry in checkpoint.entries.items()}
                assert found == {key: folder / name for key, name in weight_map.items()}, f"{found}"


def _write_shards(folder: Path, chance: Random) -> dict[str, list[str]]:
    """Writes two shards; returns their names with the keys that each holds."""
    stored: dict[str, list[str]] = {}
    for number, name in enumerate(_SHARDS):
        keys = [f"layer.{number}.{key}" for key in chance.sample(["weight", "bias", "größe"], 2)]
        save_file({key: torch.zeros(2) for key in keys}, folder / name)
        stored[name] = keys
    return stored


def _index(stored: dict[str, list[str]], chance: Random) -> bytes:
    """The text of the index, damaged or not."""
    weight_map: dict[Any, Any] = {key: name for name in stored for key in stored[name]}
    index: dict[str, Any] = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    key = chance.choice(list(weight_map))
    text = None
    match chance.randrange(9):
        case 0:
            pass
        case 1:
            weight_map[key] = chance.choice(_ODD_NAMES)
        case 2:
            weight_map["added"] = chance.choice([*_ODD_NAMES, *_SHARDS])
        case 3:
            del weight_map[key]
        case 4:
            weight_map[key] = chance.choice(_SHARDS)
        case 5:
            index["weight_map"] = chance.choice(_ODD_MAPS)
        case 6:
            index["metadata"] = chance.choice([*_ODD_MAPS, "x" * 100_000])
        case 7:
            text = chance.choice(_TEXTS)
        case 8:
            whole = json.dumps(index).encode()
            at = chance.randrange(len(whole))
            text = whole[:at] + chance.randbytes(1) + whole[at + 1 :]
    return json.dumps(index).encode() if text is None else text


def _put_odd_things_beside(folder: Path) -> None:
    """Makes what a name in an index may be of that is no file, and files that lie elsewhere."""
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    save_file({"added": torch.zeros(2)}, folder.parent / "outside.safetensors")


def _is(text: bytes, index: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(text)["weight_map"] == index["weight_map"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def inputs() -> Iterator[Index]:
    """Yields folders."""
    return map(Index, itertools.count())
