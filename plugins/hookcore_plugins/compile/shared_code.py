"""Code that is compiled once for many modules, and counted."""

from __future__ import annotations

import inspect
import time
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

LIMIT = "recompile_limit"  # since torch 2.13


@define
class CompileReport:
    """What compiling came to.

    Attributes:
        blocks: How many blocks, or entries, run compiled code.
        graphs: How many graphs were compiled.
        recompiles: How often code was compiled again because something had changed that it relied on.
        graph_breaks: At how many places a call falls back to Python between two graphs.
        reasons: Why it was compiled again, and why a call falls back, and how often.
    """

    blocks: int = 0
    graphs: int = 0
    recompiles: int = 0
    graph_breaks: int = 0
    reasons: dict[str, int] = field(factory=dict)


def options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for one call of `torch.compile`, which takes entries out of dicts that it is given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}


class SharedCode:
    """The code of modules of one class, compiled at its first call by any of them.

    torch keeps compiled code with the function's code object, for all who compile the same function. Here
    each function is copied first: what is compiled belongs to this object, is counted by it, shares no limit
    of recompiles with others, and goes with it.

    Args:
        options: What `torch.compile` is given.
        counts: Is told what compiling comes to; several codes may share it.

    Attributes:
        counts: The same.
        users: How many modules share the code.
    """

    def __init__(self, options: Mapping[str, Any], counts: CompileReport) -> None:
        self.counts = counts
        self.users = 0
        self._options = options
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def of(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled code for a module's entry, counted."""
        if isinstance(entry, MethodType) and entry.__self__ is module:
            return _Counted(MethodType(self._compile(entry.__func__), module), self.counts)
        return _Counted(self._compile(entry), self.counts)  # what somebody has put on the instance

    def forget(self) -> None:
        """Drop all compiled code."""
        self._compiled.clear()

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            options = options_of(self._options)
            if LIMIT in inspect.signature(torch.compile).parameters:
                # Where code depends on a block's number, each block is a recompile; leave none out.
                options.setdefault(LIMIT, torch._dynamo.config.recompile_limit + self.users)
            self._compiled[function] = torch.compile(_copy(function), **options)
        return self._compiled[function]


class _Counted:
    """Calls compiled code, and notes when something was compiled meanwhile."""

    __slots__ = ("_call", "_counters", "_counts")

    def __init__(self, call: Callable[..., Any], counts: CompileReport) -> None:
        from torch._dynamo.utils import counters

        self._call = call
        self._counts = counts
        self._counters = counters

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        counters = self._counters
        graphs = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        began = time.time_ns()
        try:
            return self._call(*args, **kwargs)
        finally:
            if counters["stats"]["unique_graphs"] != graphs:
                self._note(counters["stats"]["unique_graphs"] - graphs, breaks, began)

    def _note(self, graphs: int, breaks: int, began: int) -> None:
        from torch._dynamo.utils import get_compilation_metrics

        counts, counters = self._counts, self._counters
        again = [
            str(item.recompile_reason)
            for item in get_compilation_metrics()
            if item.recompile_reason and (item.start_time_us or 0) * 1000 >= began - 1000
        ]
        counts.graphs += graphs
        counts.recompiles += len(again)
        broken = sum(counters["graph_break"].values()) - breaks
        counts.graph_breaks += broken
        latest = list(counters["graph_break"])[-broken:] if broken > 0 else []
        for what, reasons in (("graph break", latest), ("compiled again", again)):
            for reason in reasons:
                phrase = f"{what}: {_first_line(reason)}"
                counts.reasons[phrase] = counts.reasons.get(phrase, 0) + 1


def _first_line(reason: str) -> str:
    """Return what torch says, without the stack that follows it."""
    return " ".join(reason.partition("\n")[0].split())


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with a code object of its own; anything else as it is."""
    if not isinstance(function, FunctionType):
        return function
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__qualname__ = function.__qualname__
    copied.__module__ = function.__module__
    return copied
