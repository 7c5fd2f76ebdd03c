"""Files that change under a model: whatever is done next is right or a HookcoreError, and ends no process."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import shutil
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import frozen
from safetensors.torch import load_file, save_file

import hookcore
from hookcore.testing import same_bits
from stress.scenes import VERBS, Scene, expected_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from random import Random

_SETUPS = tuple(
    (technique, model)
    for technique in ("disk", "disk_to_device", "groups_on_disk")
    for model in ("layers", "tied", "blocks")
)


def _write_other_weights(path: Path) -> None:
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path.with_suffix(".new"))


def _replace_by_a_copy(path: Path, _chance: Random) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _replace_by_other_weights(path: Path, _chance: Random) -> None:
    _write_other_weights(path)
    path.with_suffix(".new").replace(path)


def _replace_by_garbage(path: Path, chance: Random) -> None:
    path.with_suffix(".new").write_bytes(chance.randbytes(chance.choice([0, 7, 10_000])))
    path.with_suffix(".new").replace(path)


def _delete(path: Path, _chance: Random) -> None:
    path.unlink()


def _delete_the_folder(path: Path, _chance: Random) -> None:
    shutil.rmtree(path.parent)


def _replace_by_a_folder(path: Path, _chance: Random) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_a_pipe(path: Path, _chance: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_a_link(path: Path, chance: Random) -> None:
    path.unlink()
    path.symlink_to(chance.choice(["nowhere", "/dev/zero", path.name]))


def _touch(path: Path, _chance: Random) -> None:
    path.touch()


def _rewrite(path: Path, _chance: Random) -> None:
    _write_other_weights(path)
    path.write_bytes(path.with_suffix(".new").read_bytes())


def _rewrite_with_old_times(path: Path, chance: Random) -> None:
    before = path.stat()
    _rewrite(path, chance)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _overwrite_some(path: Path, chance: Random) -> None:
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        file.write(chance.randbytes(16))


def _cut(path: Path, chance: Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def _grow(path: Path, chance: Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.choice([1, 4096])))


_BY_NAME = (
    *(_replace_by_a_copy, _replace_by_other_weights, _replace_by_garbage, _delete, _delete_the_folder),
    *(_replace_by_a_folder, _replace_by_a_pipe, _replace_by_a_link, _touch),
)
_IN_PLACE = (_rewrite, _rewrite_with_old_times, _overwrite_some, _cut, _grow)
_CHANGES: dict[str, Callable[[Path, Random], None]] = {
    change.__name__.lstrip("_"): change for change in (*_BY_NAME, *_IN_PLACE)
}


@frozen
class FileChange:
    """One change.

    Attributes:
        technique: Name of what is on the model.
        model: Name of the model.
        change: What becomes of the file.
        after: What was done with the model before.
        seed: Draws the rest.
    """

    technique: str
    model: str
    change: str
    after: str
    seed: int
    count: ClassVar[int] = 1
    seconds: ClassVar[float] = 60

    def check(self) -> None:
        """Changes a file of the model, then uses the model on."""
        expected_outputs(self.technique, self.model)
        chance = random.Random(self.seed)
        with Scene(self.technique, self.model) as scene:
            scene.bring_to(self.after)
            scene.do(self.after)
            change = _CHANGES[self.change]
            change(_file_of(scene, chance), chance)
            uses = [_call, _remove] if change in _IN_PLACE else [_call, _read, _copy, _reset, _remove]
            for use in [*chance.choices(uses, k=3), _remove]:
                try:
                    with contextlib.suppress(hookcore.HookcoreError):
                        use(scene)
                except BaseException as fault:
                    fault.add_note(f"in {use.__name__}")
                    raise
            scene.check_threads_state()


def _file_of(scene: Scene, chance: Random) -> Path:
    """The checkpoint, or a file of offloaded weights where there are such."""
    written = sorted(it for it in scene.folder.rglob("*") if it.is_file() and it.name != "model.safetensors")
    return chance.choice(written) if written else scene.folder / "model.safetensors"


def _call(scene: Scene) -> None:
    scene.check_output(scene.call())


def _reset(scene: Scene) -> None:
    scene.reset()


def _read(scene: Scene) -> None:
    found = {key: tensor.cpu() for key, tensor in scene.model.state_dict().items()}
    differing = [key for key, tensor in scene.stored().items() if not same_bits(found[key], tensor)]
    assert not differing, f"state_dict gives other values for {differing}"


def _copy(scene: Scene) -> None:
    copied: Any = copy.deepcopy(scene.model)
    with torch.no_grad():
        scene.check_bare_output(copied)


def _remove(scene: Scene) -> None:
    scene.remove()
    scene.check_output(scene.call())


def inputs() -> Iterator[FileChange]:
    """Yields changes: all kinds after all verbs, again and again."""
    verbs = [verb for verb in VERBS if verb not in ("reset", "remove")]
    seeds = itertools.count()
    while True:
        for technique, model in _SETUPS:
            for change in _CHANGES:
                seed = next(seeds)
                yield FileChange(technique, model, change, verbs[seed % len(verbs)], seed)
