"""The hooks of one attention module: at its own call, and at the call of a compiled block around it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from hookcore import Hook, bare_entry
from hookcore_plugins.attention_backend.discovery import set_backend
from hookcore_plugins.attention_backend.dispatch import AttentionError
from hookcore_plugins.attention_backend.function_mode import redirected, suspended
from hookcore_plugins.attention_backend.temporary_attribute import TemporaryAttribute

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hookcore_plugins.attention_backend.compiled import TraceableMethods
    from hookcore_plugins.attention_backend.counts import AttentionReport
    from hookcore_plugins.attention_backend.discovery import AttentionModule
    from hookcore_plugins.attention_backend.dispatch import AttentionDispatch


class AttentionHook(Hook):
    """Replaces torch's attention function in the calls of one module.

    Args:
        found: The module.
        label: The module, for messages.
        dispatch: Computes the attentions.
        methods: Makes methods for compiled code.
        reports: Whether this hook gives the report of all that share `dispatch`.
    """

    def __init__(
        self,
        found: AttentionModule,
        label: str,
        dispatch: AttentionDispatch,
        methods: TraceableMethods,
        *,
        reports: bool,
    ) -> None:
        self._found = found
        self._label = label
        self._dispatch = dispatch
        self._methods = methods
        part = found.changed_part
        self._changed = None if part is None else TemporaryAttribute(part.part, part.make)
        self._reports = reports

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the call with the backend in the place of torch's function.

        Raises:
            AttentionError: The module computes otherwise for the library's backend that is set, or has a
                mask that only that takes.
        """
        if self._found.reads_backend and (reason := set_backend(module)):
            raise AttentionError(
                f"attention_backend cannot redirect the attention of {self._label!r}: {reason}"
            )
        attend = _CountingAttend(self._dispatch, self._label)
        changed = self._changed
        try:
            if changed is not None:
                changed.begin(module, attend)
            output = redirected(attend, call, *args, **kwargs)
        except TypeError as error:
            if "'attn_mask' must be Tensor" not in str(error):  # torch looks at that before any mode does
                raise
            raise AttentionError(
                f"{self._label!r} gives attention a mask that only its library's backend takes ({error}). "
                "Leave the module out with modules=[...], or take attention_backend off"
            ) from error
        finally:
            if changed is not None:
                changed.end(module, attend)
        if self._found.computes and not attend.count:
            reason = f"{self._label} did not call torch's attention function"
            self._dispatch.counts.count("otherwise", reason)
        return output

    def outside(self, module: nn.Module) -> Hook:
        """Return the hook for calls of compiled code that this module is part of."""
        return _CompiledHook(module, self._found, self._dispatch, self._methods, self._changed)

    def run_report(self, module: nn.Module) -> AttentionReport | None:
        """Return the counts of the model's attentions."""
        return self._dispatch.counts.report() if self._reports else None

    def reset(self, module: nn.Module) -> None:
        """Set the counts to zero."""
        self._dispatch.counts.clear()


class _CountingAttend:
    """The attention function during one call of a module.

    Attributes:
        count: How often it was called.
    """

    __slots__ = ("_dispatch", "_label", "count")

    def __init__(self, dispatch: AttentionDispatch, label: str) -> None:
        self._dispatch = dispatch
        self._label = label
        self.count = 0

    def __call__(self, /, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        return self._dispatch.attend(self._label, *args, **kwargs)


class _CompiledHook(Hook):
    """Replaces a module's method, during calls of the compiled code around it, by one that can be traced.

    What is traced stays in the compiled code.

    Args:
        module: The module that computes attention.
        found: What was found out about it.
        dispatch: Computes the attentions.
        methods: Makes the methods.
        changed: The part of the module that is changed during calls; None for none.
    """

    def __init__(
        self,
        module: nn.Module,
        found: AttentionModule,
        dispatch: AttentionDispatch,
        methods: TraceableMethods,
        changed: TemporaryAttribute | None,
    ) -> None:
        self._module = module
        self._computes = found.computes
        self._counts = dispatch.counts
        self._methods = methods
        entry = found.entry
        method = TemporaryAttribute(entry, lambda module: methods.method(module, bare_entry(module, entry)))
        self._temporary = (method,) if changed is None else (method, changed)

    def substitute(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """Return the traceable method where the module's own entry is compiled."""
        return self._methods.method(module, entry) if module is self._module else entry

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the call with the traceable method in place."""
        temporary = self._temporary if module is not self._module else self._temporary[1:]
        token = object()
        with contextlib.ExitStack() as stack:
            for it in temporary:
                stack.callback(it.end, self._module, token)
                it.begin(self._module, token)
            stack.enter_context(suspended())
            output = call(*args, **kwargs)
        if self._computes:
            self._counts.count("compiled")
        return output
