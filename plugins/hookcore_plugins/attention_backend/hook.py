"""The hooks of one module that computes attention: at its own call, and at that of a compiled block."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from hookcore import Hook, bare_entry
from hookcore_plugins.attention_backend.function_mode import redirected, suspended
from hookcore_plugins.attention_backend.temporary_attribute import StandingIn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from hookcore_plugins.attention_backend.compiled import Traceable
    from hookcore_plugins.attention_backend.counts import AttentionReport
    from hookcore_plugins.attention_backend.dispatch import Choice
    from hookcore_plugins.attention_backend.temporary_attribute import StandIn


class AttentionHook(Hook):
    """Has the backend compute what one module would have torch compute.

    Args:
        label: The module, for messages.
        entry: The method that is hooked.
        choice: What the user chose.
        traceable: Makes methods for compiled code.
        computes: Whether the module itself is expected to compute attention.
        stand_in: What has to stand in during its calls.
        reports: Whether this hook tells what was counted.
    """

    def __init__(
        self,
        label: str,
        entry: str,
        choice: Choice,
        traceable: Traceable,
        *,
        computes: bool,
        stand_in: StandIn | None,
        reports: bool,
    ) -> None:
        self._label = label
        self._entry = entry
        self._choice = choice
        self._traceable = traceable
        self._computes = computes
        self._standing_in = None if stand_in is None else StandingIn(stand_in.part, stand_in.of)
        self._reports = reports

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls on, with the backend in the place of torch's function."""
        attends = _Attends(self._choice, self._label)
        if self._standing_in is not None:
            self._standing_in.begin(module)
        try:
            output = redirected(attends, call, *args, **kwargs)
        finally:
            if self._standing_in is not None:
                self._standing_in.end(module)
        if self._computes and not attends.count:
            reason = f"{self._label} did not call torch's attention function"
            self._choice.tally.count("otherwise", reason)
        return output

    def outside(self, module: nn.Module) -> Hook:
        """The hook for calls of compiled code that this module is part of."""
        return _CompiledHook(
            module, self._entry, self._choice, self._traceable, self._standing_in, computes=self._computes
        )

    def run_report(self, module: nn.Module) -> AttentionReport | None:
        """What computed the model's attention."""
        return self._choice.tally.report() if self._reports else None

    def reset(self, module: nn.Module) -> None:
        """Begins to count anew."""
        self._choice.tally.clear()


class _Attends:
    """What attention goes to in one call of a module.

    Attributes:
        count: How often it did so far.
    """

    __slots__ = ("_choice", "_label", "count")

    def __init__(self, choice: Choice, label: str) -> None:
        self._choice = choice
        self._label = label
        self.count = 0

    def __call__(self, /, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        return self._choice.attend(self._label, *args, **kwargs)


class _CompiledHook(Hook):
    """Has code that is compiled with a module in it call the backend.

    For each call of that code, the module's method becomes one that torch.compile can trace, as a plain
    function. What is traced stays in the code.

    Args:
        module: The module that computes attention.
        entry: Its method.
        choice: What the user chose.
        traceable: Makes such methods.
        standing_in: What has to stand in during calls besides.
        computes: Whether the module itself is expected to compute attention.
    """

    def __init__(
        self,
        module: nn.Module,
        entry: str,
        choice: Choice,
        traceable: Traceable,
        standing_in: StandingIn | None,
        *,
        computes: bool,
    ) -> None:
        self._module = module
        self._choice = choice
        self._traceable = traceable
        self._computes = computes
        method = StandingIn(entry, lambda module: traceable.method(module, bare_entry(module, entry)))
        self._standing_in = (method,) if standing_in is None else (method, standing_in)

    def substitute(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """The method itself, where that is compiled."""
        return self._traceable.method(module, entry) if module is self._module else entry

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls on, with the other method in place."""
        standing_in = self._standing_in if module is not self._module else self._standing_in[1:]
        with contextlib.ExitStack() as stack:
            for it in standing_in:
                it.begin(self._module)
                stack.callback(it.end, self._module)
            stack.enter_context(suspended())
            output = call(*args, **kwargs)
        if self._computes:
            self._choice.tally.count("compiled")
        return output
