"""What streaming did in a run."""

from __future__ import annotations

from attrs import define


@define
class StreamReport:
    """What was streamed since the technique was applied or last reset, and the memory that it takes now.

    Attributes:
        passes: Outermost calls that ended.
        copies: Copies of whole groups to the device.
        moved_bytes: Bytes of these copies.
        hits: Uses of a group whose copy had been begun ahead.
        on_demand: Uses of a group whose copy was begun only then. Groups that stay are in neither.
        resident_bytes: Bytes on the device that stay: groups, buffers, excluded modules.
        ring_bytes: Bytes on the device in which groups come and go.
        locked_bytes: Bytes of host memory that are page-locked.
        timed_passes: Passes that `record_timeline` timed.
        stalled_seconds: How long computing waited for copies in these; None if there were none.
    """

    passes: int = 0
    copies: int = 0
    moved_bytes: int = 0
    hits: int = 0
    on_demand: int = 0
    resident_bytes: int = 0
    ring_bytes: int = 0
    locked_bytes: int = 0
    timed_passes: int = 0
    stalled_seconds: float | None = None
