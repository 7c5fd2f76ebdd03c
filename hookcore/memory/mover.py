"""What brings groups of weights to where they are used, and drops them: the interface of all movers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from hookcore.memory.device.timeline import Timeline
    from hookcore.memory.grouping import Group


@frozen(eq=False)
class ComponentGroups:
    """What calls of a component need.

    Attributes:
        component: Its name.
        groups: The groups that come and go.
        resident: Those that stay.
        aliases: What stands, in this component, for a group of another one that it needs, and that group.
    """

    component: str
    groups: tuple[Group, ...]
    resident: tuple[Group, ...]
    aliases: Mapping[Group, Group]


class GroupMover(Protocol):
    """Brings and drops groups. Each method does all of it or, if it raises, nothing.

    Attributes:
        lingers: Whether a group is dropped only when another one is needed, or the outermost call ends, and
            not at once at the end of the last call that holds it.
    """

    lingers: bool = True

    def expect(self, needed: ComponentGroups) -> None:
        """Is told, before anything is attached, what a component needs; what was told last of it counts."""
        return

    def attach(self, group: Group, *, resident: bool) -> None:
        """Put a group where it lies between calls: for good on the onload device if it is resident."""

    def detach(self, group: Group) -> None:
        """Put a group back where `attach` found it, with the values that it has now."""

    def onload(self, group: Group) -> None:
        """Bring a group, so that its modules can be called."""

    def offload(self, group: Group) -> None:
        """Drop what was brought, as far as it was; what a call changed in it is kept.

        It may not have been brought, or an exception may have interrupted that, or an earlier `offload`.
        """

    def report(self, group: Group, *, resident: bool) -> Mapping[str, int]:
        """Return where the group's bytes lie between calls: a label for people to a number of bytes."""

    def needs(self) -> Mapping[str, int]:
        """Bytes of each device that weights will take at once, from what it was told to expect."""
        return {}

    def begin(self) -> None:
        """Begin an outermost call."""
        return

    def end(self) -> None:
        """End an outermost call; no call holds a group any more."""
        return

    def invalidate(self, group: Group) -> None:
        """Invalidate copies of a group whose tensors somebody reads, and may change, between calls."""
        return

    def finalize(self, group: Group) -> None:
        """Finalize a group that was detached for good."""
        return

    def reset(self) -> None:
        """Forget what it learned and counted in earlier calls."""
        return

    def train(self) -> None:
        """Keep trained parameters, also between calls, where they lie now."""
        return

    def run_report(self) -> object:
        """Return what it counted since it was made or last reset: an attrs object; None for nothing."""
        return None

    def recording(self, timeline: Timeline) -> AbstractContextManager[None]:
        """Time on a device, if it uses streams there, what it does until the end of the block."""
        return nullcontext()
