"""The handle that `apply` returns, and what there is to see of what is on a model."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Self

from attrs import frozen

from hookcore.errors import HookcoreWarning, LossyRemovalError, has_origin
from hookcore.plugins import plugins
from hookcore.registry import CHANGING, HookRegistry, without_collecting
from hookcore.report import attachment_table, tensor_bytes
from hookcore.run_report import RunReport, run_report
from hookcore.units import shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hookcore.attachment import Attachment
    from hookcore.plan import Plan
    from hookcore.target import Component


class Applied:
    """Techniques on a model, as one `apply` put them there.

    Can be used as a context manager that removes them at the end. Print it to see what was touched, where
    the bytes are, and what was skipped and why.

    Attributes:
        plan: What was done.
    """

    def __init__(self, plan: Plan, attachments: tuple[Attachment, ...]) -> None:
        self.plan = plan
        self._attachments = attachments

    def remove(self, *, allow_lossy: bool = False, force: bool = False) -> None:
        """Take these techniques off and leave all others on; a second call does nothing.

        Every tensor object, dtype, device, tie and attribute is as it was before, with the values that it
        has now.

        Args:
            allow_lossy: Go on where the original weights cannot be given back exactly.
            force: Give up on hooks that raise when they are taken off, and take off all others. A
                `HookcoreWarning` says which, since what they did to their modules may be left.

        Raises:
            LossyRemovalError: Weights were rounded and no originals were kept; nothing was removed.
            ConcurrentCallError: The model is being called at this moment.
            Exception: What a hook raised; nothing was removed.
        """
        take_off(self._attachments, allow_lossy=allow_lossy, force=force)

    def reset(self) -> None:
        """Make the techniques forget earlier calls (traces, counters), ready for another run.

        Raises:
            ConcurrentCallError: The model is being called at this moment.
        """
        with CHANGING:
            here = [item for item in self._attachments if item.attached]
            HookRegistry([item.component for item in here]).reset(here)
        plugins().observe("reset", plan=self.plan)

    def run_report(self) -> RunReport:
        """Return what these techniques counted since they were applied or last reset; print it."""
        return run_report(item for item in self._attachments if item.attached)

    def __enter__(self) -> Self:
        """Raise LossyRemovalError here, and not at the end of the block, if the end could not remove.

        The techniques are on then; `remove(allow_lossy=True)` takes them off.
        """
        _refuse_loss(self._attachments)
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if self._attachments and not any(item.attached for item in self._attachments):
            return "<Applied: removed>"
        if not self._attachments and not self.plan.left_alone:
            return "<Applied: nothing>"
        attached = [item for item in self._attachments if item.attached]
        return "Applied\n" + attachment_table(attached, self.plan.left_alone)


@frozen(eq=False)
class Status:
    """What is on a target, by whichever calls of `apply`.

    Attributes:
        components: The target's components.
        attachments: What is on them; where two meet on a module, the outer one comes first.
    """

    components: tuple[Component, ...]
    attachments: tuple[Attachment, ...]

    @property
    def techniques(self) -> tuple[str, ...]:
        """Names of the techniques, outermost first."""
        return tuple(item.technique.name for item in self.attachments)

    @property
    def nbytes(self) -> Mapping[str, int]:
        """Bytes of parameters and buffers by device, ties counted once; what is mapped is `"disk"`."""
        return tensor_bytes(self.components)

    def run_report(self) -> RunReport:
        """Return what the techniques counted since they were applied or last reset; print it."""
        return run_report(self.attachments)

    def __str__(self) -> str:
        if not self.attachments:
            return "nothing applied"
        return attachment_table(self.attachments)


@without_collecting
def take_off(attachments: Sequence[Attachment], *, allow_lossy: bool, force: bool) -> None:
    """Remove attachments, all or none, after asking what that would lose."""
    with CHANGING:
        here = [item for item in attachments if item.attached]
        if not here:
            return
        try:
            if not allow_lossy:
                _refuse_loss(here)
            given_up = HookRegistry([item.component for item in here]).detach(here, force=force)
        except Exception as error:
            if has_origin(error):
                error.add_note(
                    "hookcore: nothing was removed. remove(force=True) gives up on hooks that fail and takes "
                    "off all others; with allow_lossy=True none is asked what would be lost"
                )
            raise
    plugins().observe("removed", techniques=[item.technique for item in here])
    if given_up:
        warnings.warn(
            f"removed by force, although {len(given_up)} of the hooks failed in it: {shortened(given_up)}. "
            "What they did to their modules may be left: attributes, weights on another device or in another "
            "dtype. Load the model again to be sure",
            HookcoreWarning,
            stacklevel=4,
        )


def _refuse_loss(attachments: Sequence[Attachment]) -> None:
    for item in attachments:
        losses = item.losses() if item.attached else []
        if losses:
            fqn, loss = losses[0]
            more = f" (and so for {len(losses) - 1} more modules)" if len(losses) > 1 else ""
            raise LossyRemovalError(
                f"removing {item.technique.name} cannot give back the original weights: at {fqn!r}, "
                f"{loss}{more}. Nothing was removed. hookcore.remove(model, allow_lossy=True) goes on with "
                "the weights as they are now"
            )
