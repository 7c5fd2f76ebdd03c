"""What a program asks of the machine, counted, and failed on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from attrs import define

if TYPE_CHECKING:
    from collections import Counter

Request = Literal[
    "allocate",
    "pin",
    "launch",
    "copy",
    "record_event",
    "wait_event",
    "wait_stream",
    "synchronize",
]
"""A kind of request.

- `allocate`: memory of a device, at least one byte.
- `pin`: page-locked host memory.
- `launch`: a kernel.
- `copy`: between the host and a device, between two devices, or on one.
- `record_event`, `wait_event`, `wait_stream`: a stream records an event, or waits for an event or a stream.
- `synchronize`: the host waits for an event, a stream or a device because the program says so.
"""

REQUESTS: tuple[Request, ...] = get_args(Request)


@define(eq=False)
class Watch:
    """Counts requests, and fails one of them.

    Attributes:
        counts: How many of each kind there were, the failed one included.
        request: The kind that fails; None for no failure.
        nth: The number of the request that fails, among those of its kind, counted from 1.
        error: What it raises.
    """

    counts: Counter[Request]
    request: Request | None = None
    nth: int = 0
    error: BaseException | type[BaseException] = Exception

    def reach(self, request: Request) -> None:
        """Count a request before it has any effect.

        Raises:
            BaseException: This is the request that fails.
        """
        self.counts[request] += 1
        if request == self.request and self.counts[request] == self.nth:
            raise self.error
