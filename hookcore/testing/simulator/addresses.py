"""Addresses of devices' memory."""

from __future__ import annotations

ALIGNMENT = 512
"""Bytes of which every address that a device's memory begins at is a multiple, as with torch's allocator."""


class Addresses:
    """Addresses of devices' memory: none is given out twice, and none is one of the host's.

    A program that follows one on the host ends, as it would with a real device.
    """

    def __init__(self) -> None:
        self._next = 1 << 60  # beyond what a process can map

    def take(self, nbytes: int) -> int:
        """Give out the first of so many, which never lie side by side with those of another call."""
        address = self._next
        self._next += (nbytes // ALIGNMENT + 2) * ALIGNMENT
        return address


ADDRESSES = Addresses()
