"""What a test does with the simulator: installs it, limits it, makes it fail, and asks what it found."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from hookcore.testing.simulator import state
from hookcore.testing.simulator.errors import SimulatorError, Violation
from hookcore.testing.simulator.faults import REQUESTS, Request, Watch
from hookcore.testing.simulator.host import HostWatch
from hookcore.testing.simulator.machine import Machine
from hookcore.testing.simulator.naming import names_in
from hookcore.testing.simulator.profiles import GENERIC, DeviceProfile
from hookcore.testing.simulator.registration import offer_names, register
from hookcore.testing.simulator.trace import Trace
from hookcore.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator


def install(
    devices: int = 2, *, memory: int | str | None = None, profile: DeviceProfile | None = None
) -> None:
    """Add the simulated devices "sim:0", "sim:1", ... to this process, for as long as it runs.

    A second call with the same number of devices only sets the memory and the profile that it names.

    Args:
        devices: How many.
        memory: Bytes of each, as a number or as "8GiB"; by default those of the profile.
        profile: What each of them is and can do; `GENERIC` by default.

    Raises:
        SimulatorError: The simulator is installed with another number of devices, or another package has
            taken torch's one slot for such devices.
        ValueError: The number of devices is less than 1.
    """
    if devices < 1:
        raise ValueError(f"devices is {devices}, expected 1 or more")
    if state.is_installed():
        machine = state.get_machine()
        if len(machine.devices) != devices:
            raise SimulatorError(
                f"the simulator is installed with devices={len(machine.devices)}, which cannot be changed; "
                f"start another process for devices={devices}"
            )
        _set_limits(machine, profile, memory)
        return
    import torch

    name = torch._C._get_privateuse1_backend_name()
    if name not in ("privateuseone", state.DEVICE_TYPE):
        raise SimulatorError(
            f"torch's slot for further devices is taken by {name!r}; use the simulator in another process"
        )
    machine = Machine(devices, GENERIC)
    machine.findings.name_of = names_in
    state.set_machine(machine)
    _set_limits(machine, GENERIC if profile is None else profile, memory)
    register()


def _set_limits(machine: Machine, profile: DeviceProfile | None, memory: int | str | None) -> None:
    """Set the profile and the memory of all devices; None leaves them as they are."""
    for device in machine.devices:
        if profile is not None:
            device.set_profile(profile)
        if memory is not None:
            device.memory.capacity = parse_bytes(memory)
    if profile is not None:
        offer_names(profile.lacks)


@contextlib.contextmanager
def limited(
    *,
    memory: int | str | None = None,
    profile: DeviceProfile | None = None,
    strict: bool | None = None,
) -> Iterator[None]:
    """Set limits within a `with` block; what is left out stays as it is.

    Args:
        memory: Bytes of each device.
        profile: The figures behind the virtual time, and the memory if `memory` is left out.
        strict: True raises what breaks a rule, at once or at the next operation; False keeps it for
            `violations`.
    """
    machine = state.get_machine()
    before = [
        (device, device.profile, device.memory.capacity, device.memory.cache, device.loaded)
        for device in machine.devices
    ]
    was_strict = machine.findings.strict
    _set_limits(machine, profile, memory)
    if strict is not None:
        machine.findings.strict = strict
    try:
        yield
    finally:
        machine.findings.strict = was_strict
        for device, old, capacity, cache, loaded in before:
            device.profile, device.memory.capacity = old, capacity
            device.memory.cache, device.loaded = cache, loaded
        offer_names(machine.devices[0].profile.lacks)


@contextlib.contextmanager
def watching_host() -> Iterator[None]:
    """Within a `with` block, also finds that the host uses pinned memory while a copy of it runs."""
    with HostWatch():  # type: ignore[no-untyped-call]
        yield


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Within a `with` block, notes what runs when."""
    machine = state.get_machine()
    before, machine.trace = machine.trace, Trace()
    try:
        yield machine.trace
    finally:
        machine.trace = before


@contextlib.contextmanager
def counting() -> Iterator[Counter[Request]]:
    """Count what all threads ask of the devices inside a `with` block.

    Yields:
        The counts so far, by kind of request.
    """
    with _watching(Watch(Counter())) as counts:
        yield counts


@contextlib.contextmanager
def fail_at(
    request: Request, nth: int, error: BaseException | type[BaseException]
) -> Iterator[Counter[Request]]:
    """Fail one request inside a `with` block, before it has any effect. Blocks may be nested.

    Count the requests of a program with `counting`, fail each of them in turn, and see that what the program
    worked on is whole afterwards.

    Args:
        request: Its kind: "allocate", "pin", "launch", "copy", "record_event", "wait_event", "wait_stream" or
            "synchronize".
        nth: Its number among the requests of this kind inside the block, of all threads, counted from 1.
        error: What it raises. The traceback of an instance keeps tensors alive for as long as the instance
            lives; a class is raised anew.

    Yields:
        The counts so far, by kind of request, the failed one included.

    Raises:
        ValueError: There is no such kind of request, or `nth` is less than 1.
    """
    if request not in REQUESTS:
        raise ValueError(f"request is {request!r}, expected one of {', '.join(REQUESTS)}")
    if nth < 1:
        raise ValueError(f"nth is {nth}, expected 1 or more")
    with _watching(Watch(Counter(), request, nth, error)) as counts:
        yield counts


@contextlib.contextmanager
def _watching(watch: Watch) -> Iterator[Counter[Request]]:
    machine = state.get_machine()
    with machine.lock:
        machine.watches += (watch,)
    try:
        yield watch.counts
    finally:
        with machine.lock:
            machine.watches = tuple(it for it in machine.watches if it is not watch)


def violations() -> tuple[Violation, ...]:
    """Return what was found and not raised: what is found late in strict mode, and all otherwise."""
    machine = state.get_machine()
    with machine.lock:
        machine.settle()
        return tuple(machine.findings.violations)


def check() -> None:
    """Wait for everything, and raise what was found, also when not in strict mode.

    Raises:
        RaceError: Something was found.
    """
    machine = state.get_machine()
    with machine.lock, limited(strict=True):
        for device in machine.devices:
            machine.synchronize(device.index)
        machine.findings.raise_found()


def reset() -> None:
    """Wait for everything, forgets what was found, and begins at time 0 with new peaks.

    What is allocated stays so. The calling thread is at the default streams and at the first device again.
    """
    machine = state.get_machine()
    with machine.lock:
        machine.reset()
    state.current.reset()
