"""A group's parameters whose values lie in files, and where they are wanted side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hookcore.memory.device.flat_group import FlatGroup, rounded
from hookcore.memory.files.file_range import merged
from hookcore.memory.files.file_reader import Target
from hookcore.memory.files.file_weight import is_as_stored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.memory.files.file_weight import FileWeight


class FlatFileGroup(FlatGroup):
    """Parameters that lie in files, and side by side only where they are copied through and to.

    Args:
        weights: The parameters.
        name: The group's name, for people.

    Attributes:
        weights: As given.
        targets: Where the values of each lie, and are wanted.
        ranges: The bytes of files that hold them.
        brought: While they show a copy on the device in memory of its own: what that was made from, and
            what they were shown.
    """

    __slots__ = (
        "_files",
        "_origin_dtypes",
        "_target_of",
        "_weight_of",
        "brought",
        "ranges",
        "targets",
        "weights",
    )

    def __init__(self, weights: Sequence[FileWeight], name: str) -> None:
        super().__init__((), name)
        self.weights = weights
        self.tensors = [tensor for weight in weights for tensor in weight.tensors]
        self._weight_of = [(weight, index) for weight in weights for index in range(len(weight.tensors))]
        self.targets: list[Target] = []
        self.brought: tuple[FlatFileGroup, list[torch.Tensor]] | None = None
        self._target_of: list[int] = []
        for weight in weights:
            self._give_places(weight)
        self.ranges = merged([it.origin for it in self.targets if it.origin is not None])
        origins = [weight.origin for weight in weights]
        self._origin_dtypes = [origin.dtype for origin in origins]
        self._files = {origin.entry.path: origin.checkpoint for origin in origins}
        self.note_versions()

    def _give_places(self, weight: FileWeight) -> None:
        """Give each home a place: tied objects share memory until one is given other data."""
        origin = weight.origin
        places: dict[int, int] = {}
        for home in weight.homes:
            if id(home) not in places:
                places[id(home)] = len(self.targets)
                dtype = origin.dtype if is_as_stored(home, origin) else home.dtype
                target = Target(home, origin if home is origin.raw else None, self.nbytes, dtype)
                self.targets.append(target)
                self.nbytes += rounded(max(target.nbytes, 1))
            self._target_of.append(places[id(home)])
            self.homes.append(home)
            self.addresses.append(home.data_ptr())

    @property
    def is_outdated(self) -> bool:
        """Whether calls find another dtype than when this was made."""
        return any(
            weight.origin.dtype is not dtype
            for weight, dtype in zip(self.weights, self._origin_dtypes, strict=True)
        )

    def verify(self) -> None:
        """Check the files that hold them.

        Raises:
            CheckpointError: One has changed.
        """
        for path, checkpoint in self._files.items():
            checkpoint.verify_file(path)

    @torch.inference_mode(False)
    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return what each tensor is in such memory."""
        made = [target.view(memory) for target in self.targets]
        return [made[index] for index in self._target_of]

    @torch.inference_mode(False)
    def _kept(self, at: int, view: torch.Tensor) -> torch.Tensor:
        """Keep it in memory: a mapping copies the pages written."""
        if self.tensors[at]._version == self._versions[at]:
            return self.homes[at]
        weight, index = self._weight_of[at]
        weight.keep_edit(index, view)
        return weight.homes[index]

    @torch.inference_mode(False)
    def adopt(self) -> None:
        """Take data that tensors were given, or that were changed on the device, for their homes."""
        if self.brought is None:
            for weight in self.weights:
                weight.adopt()
            return
        (now, views), self.brought = self.brought, None
        at = 0
        for weight in self.weights:
            stop = at + len(weight.tensors)
            weight.keep_edits(views[at:stop], now._versions[at:stop], compare=True)
            at = stop
