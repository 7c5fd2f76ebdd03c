"""Streamed parameters that stay in the checkpoint that they came from. Nothing is ever written.

Between calls they show the checkpoint's own tensors, mapped (see `file_weights`). For calls their bytes are
read into a little page-locked memory, in the dtype that calls find, and copied from there (see
`file_engine`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.memory.device.flat_group import rounded
from hookcore.memory.device.pinned_memory import Staging
from hookcore.memory.files import file_weight as file_weights
from hookcore.memory.files.file_reader import FileReader
from hookcore.memory.files.file_weight import FileWeight
from hookcore.memory.files.flat_file_group import FlatFileGroup
from hookcore.memory.files.origin import wanted_dtype
from hookcore.memory.files.read_engine import FileEngine
from hookcore.memory.store import Store
from hookcore.storage import planned_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.memory.device.copy_engine import CopyEngine
    from hookcore.memory.device.flat_group import FlatGroup
    from hookcore.memory.files.checkpoint import Checkpoint
    from hookcore.memory.files.origins_of_model import FileOrigins
    from hookcore.memory.grouping import Group
    from hookcore.target import TensorSlot


class FileStore(Store):
    """Leaves parameters in the files that they came from.

    A file that changes is found before its weights are used, and again when the outermost call ends.

    Args:
        origins: Where the values of each parameter lie, by slot.
        read_ahead: Bytes of host memory for what is read before it can be copied, beside one group.
    """

    def __init__(self, origins: FileOrigins, read_ahead: int) -> None:
        self._origins = origins
        self._read_ahead = read_ahead
        self._reader = FileReader()
        self._taken: dict[FlatFileGroup, None] = {}
        self._checkpoints: set[Checkpoint] = set()

    def moves(self, slot: TensorSlot) -> bool:
        """Parameters: buffers are taken from no file."""
        return not slot.is_buffer

    def nbytes(self, group: Group, *, stays: bool = False) -> int:
        """In the dtypes that calls find."""
        first = [slot.tensors[0] for slot in group.slots]
        dtypes = [planned_dtype(it) or wanted_dtype(it) for it in first]
        return sum(
            rounded(max(it.numel() * dtype.itemsize, 1)) for it, dtype in zip(first, dtypes, strict=True)
        )

    @torch.inference_mode(False)  # what is made here outlives the mode
    def take(self, group: Group) -> FlatFileGroup:
        """Show the checkpoint's tensors in parameters.

        Raises:
            CheckpointError: A parameter in memory differs from the checkpoint.
        """
        weights = [FileWeight.compare(slot, self._origins[slot]) for slot in group.slots]
        for weight in weights:
            weight.take_over()
        self._origins.take(group.slots)
        flat = FlatFileGroup(weights, group.name)
        self._taken[flat] = None
        self._checkpoints.update(weight.origin.checkpoint for weight in weights)
        return flat

    @torch.inference_mode(False)
    def take_again(self, flat: FlatGroup) -> FlatFileGroup:
        """Take the data that tensors were given for what is to be copied from now on."""
        own = self._own(flat)
        own.adopt()
        again = FlatFileGroup(own.weights, own.name)
        again.show_host()
        del self._taken[own]
        self._taken[again] = None
        return again

    @torch.inference_mode(False)
    def give_back(self, flat: FlatGroup) -> None:
        """Give parameters back as they were found: in memory, or showing the checkpoint's tensors.

        Raises:
            CheckpointError: Values have to be read, and a file has changed.
        """
        own = self._own(flat)
        if own.brought is not None:
            self.verify()
        own.adopt()
        values = [weight.values_to_give_back() for weight in own.weights]
        for weight, of_weight in zip(own.weights, values, strict=True):
            weight.give_back(of_weight)
        del self._taken[own]
        if not self._taken:
            self._checkpoints.clear()
            self._reader.close()

    def check_readable(self, flat: FlatGroup) -> None:
        """Check that no file is cut short: to read a mapping beyond its file's end would end the process.

        Raises:
            CheckpointError: One is.
        """
        for weight in self._own(flat).weights:
            weight.check_readable()

    def finalize(self, group: Group) -> None:
        """Leave parameters in memory, or showing the checkpoint's tensors.

        Raises:
            CheckpointError: Values have to be converted, and a file has changed.
        """
        self._origins.finalize(group.slots)

    def keep_on(self, flat: FlatGroup, device: torch.device) -> None:
        """Read parameters into memory on the device."""
        self.bring(flat, device)

    @torch.inference_mode(False)
    def bring(self, flat: FlatGroup, device: torch.device) -> None:
        """Read parameters into memory on the device, and wait.

        Raises:
            CheckpointError: A file has changed, or cannot be read.
        """
        own = self._own(flat)
        own.adopt()
        now = FlatFileGroup(own.weights, own.name)  # they may have been given other data since
        now.verify()
        host = torch.empty(now.nbytes, dtype=torch.uint8)
        self._reader.read(now.targets, now.ranges, host)
        now.verify()
        own.brought = now, now.views(host.to(device))
        now.show(own.brought[1])

    @torch.inference_mode(False)
    def drop(self, flat: FlatGroup) -> None:
        """Show host memory in parameters again; keep what was changed."""
        own = self._own(flat)
        if own.brought is not None:
            now, views = own.brought
            now.come_home(views, [view.data_ptr() for view in views])
            own.brought = None

    def make_engine(
        self, device: torch.device, nbytes: int, sources: Sequence[FlatGroup], *, per_group: bool
    ) -> CopyEngine:
        """Make what copies from files, through a little page-locked memory."""
        sizes = [flat.nbytes for flat in sources]
        room = min(sum(sizes), max(sizes, default=0) + self._read_ahead)
        return FileEngine(device, nbytes, self._reader, Staging(device, room), per_group=per_group)

    def report(self, flat: FlatGroup, on_device: str | None) -> dict[str, int]:
        """Bytes on disk, those that stay on the device, and edited ones in memory."""
        return file_weights.report(self._own(flat).weights, on_device)

    @property
    def is_outdated(self) -> bool:
        """Whether calls find another dtype in some parameter than when it was taken over."""
        return any(flat.is_outdated for flat in self._taken)

    def verify(self) -> None:
        """Check all files.

        Raises:
            CheckpointError: One has changed.
        """
        for checkpoint in self._checkpoints:
            checkpoint.verify()

    @staticmethod
    def _own(flat: FlatGroup) -> FlatFileGroup:
        assert isinstance(flat, FlatFileGroup)  # noqa: S101 -- each store is given its own only
        return flat
