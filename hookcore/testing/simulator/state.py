"""The one machine of this process, and what each thread has made current."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from hookcore.testing.simulator.errors import SimulatorError

if TYPE_CHECKING:
    from hookcore.testing.simulator.devices import StreamState
    from hookcore.testing.simulator.machine import Machine

DEVICE_TYPE = "sim"


class _Current(threading.local):
    """What a thread has made current.

    Attributes:
        device: Index of the current device.
        streams: Number of the current stream by device; a device that is missing is at its default stream.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Make current what is so in a new thread."""
        self.device = 0
        self.streams: dict[int, int] = {}


current = _Current()
_machine: Machine | None = None


def set_machine(machine: Machine) -> None:
    """Make the machine; done once, by `install`."""
    global _machine  # noqa: PLW0603 -- torch has one PrivateUse1 device, so the process has one machine
    _machine = machine


def is_installed() -> bool:
    """Return whether `install` was called in this process."""
    return _machine is not None


def get_machine() -> Machine:
    """The machine.

    Raises:
        SimulatorError: There is none.
    """
    if _machine is None:
        raise SimulatorError(
            "the simulator is not installed. Call hookcore.testing.simulator.install() first"
        )
    return _machine


def current_stream_state(device: int) -> StreamState:
    """The calling thread's current stream of a device."""
    return get_machine().devices[device].streams[current.streams.get(device, 0)]


def device_index(device: torch.device | str | int | None) -> int:
    """The index that a device stands for; None and a device without an index stand for the current one.

    Raises:
        SimulatorError: There is no such simulated device.
    """
    if device is None:
        return current.device
    if isinstance(device, int):
        index = device
    else:
        found = torch.device(device)
        if found.type != DEVICE_TYPE:
            raise SimulatorError(f"{found} is not a simulated device; expected {DEVICE_TYPE!r}")
        index = current.device if found.index is None else found.index
    count = len(get_machine().devices)
    if not 0 <= index < count:
        raise SimulatorError(
            f"there is no device sim:{index}: the simulator was installed with devices={count}"
        )
    return index
