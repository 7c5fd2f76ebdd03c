"""The technique and its hook."""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import evolve, field, frozen

from hookcore import Binding, Claim, Hook, Phase, PlanError, Resource, Skipped, Technique
from hookcore.memory import entries_of
from hookcore_plugins.compile.repeated_blocks import code_key, repeated_blocks
from hookcore_plugins.compile.shared_code import CompileReport, SharedCode, options_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from torch import nn

    from hookcore import Component

_MARK = "_dynamo_static_input_type"
BROUGHT_BELOW = (Resource.PLACEMENT, Resource.STORAGE_DTYPE)
"""What is not to be brought for the whole model at once, where it was to be brought for its parts."""

_OPTIONS = frozenset(inspect.signature(torch.compile).parameters) - {"model"}


def _as_value(options: Mapping[str, Any]) -> tuple[tuple[str, Hashable], ...]:
    """Options in a form that can be compared and hashed."""
    return tuple(sorted((name, repr(value)) for name, value in options.items()))


def _nothing() -> None:
    """Return what options are tried on."""


@frozen(init=False)
class Compile(Technique):
    """Compiles a model's repeated blocks with `torch.compile`, each kind of block once.

    Compiling one block and running it many times takes a small part of the time of compiling the whole model,
    and gives nearly its speed. Hooks stay outside of the compiled blocks: what offloading and casting do for
    the layers of a block, they do for the whole block at its call, so that nothing breaks its graph, and
    neither another block nor another place of the weights makes torch compile again. Techniques that have to
    see calls inside of a block are refused.

    The idea is that of `compile_repeated_blocks` of diffusers.

    Attributes:
        regional: Whether to compile the repeated blocks; False compiles each of the model's entries whole.
            Then nothing below can be offloaded or cast by itself.
        options: What `torch.compile` takes besides: `backend`, `mode`, `fullgraph`, `dynamic`, `options` ...;
            given as keyword arguments.

    Raises:
        TypeError: `torch.compile` has no such option.
    """

    name: ClassVar[str] = "compile"
    phase: ClassVar[Phase] = Phase.COMPUTE
    encloses: ClassVar[bool] = True

    regional: bool
    options: Mapping[str, Any] = field(eq=_as_value)

    def __init__(self, *, regional: bool = True, **options: Any) -> None:
        if unknown := sorted(options.keys() - _OPTIONS):
            raise TypeError(
                f"torch.compile has no option {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(sorted(_OPTIONS))}"
            )
        self.__attrs_init__(regional, options)

    def skip_unless_named(self, component: Component) -> str | None:
        """Return why a component of a pipeline is left alone unless it is named: it has no blocks."""
        if not self.regional or repeated_blocks(component)[0]:
            return None
        return "it has no repeated blocks that could be compiled by themselves"

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """List one hook for each block, or for each entry of the model.

        Raises:
            PlanError: torch.compile refuses the options, or the model has no repeated blocks.
        """
        try:
            torch.compile(_nothing, **options_of(self.options))
        except Exception as error:  # each backend has its own
            raise PlanError(f"torch.compile refuses {dict(self.options)!r}: {error}") from error
        claims = (Claim(Resource.CODE),)
        counts = CompileReport()
        if not self.regional:
            for number, entry in enumerate(entries_of(component)):
                counts.blocks += 1
                hook = CompileHook(SharedCode(self.options, counts), reports=not number)
                yield Binding("", hook, entry, claims, forbids_below=BROUGHT_BELOW, encloses=True)
            return
        blocks, skipped = repeated_blocks(component)
        yield from skipped
        if not blocks:
            raise PlanError(
                f"{component.label('')!r} has no repeated blocks that could be compiled by themselves"
                + "".join(f"; {it.fqn!r}: {it.reason}" for it in skipped[:1])
                + ". Compile(regional=False) compiles it whole"
            )
        codes: dict[Hashable, SharedCode] = {}
        for number, fqn in enumerate(blocks):
            key = code_key(component.modules[fqn])
            code = codes.setdefault(key, SharedCode(self.options, counts))
            code.users += 1
            counts.blocks += 1
            yield Binding(fqn, CompileHook(code, reports=not number), claims=claims, encloses=True)


class CompileHook(Hook):
    """Runs compiled code in the place of a module's own.

    Args:
        code: The code, which other modules may share.
        reports: Whether this hook tells what compiling came to.
    """

    def __init__(self, code: SharedCode, *, reports: bool) -> None:
        self._code = code
        self._reports = reports
        self._marked: set[int] | None = None  # tensors that somebody else's compiling had marked

    def attach(self, module: nn.Module) -> None:
        """Note, the first time, which tensors are marked already."""
        if self._marked is None:
            self._marked = {id(tensor) for tensor in _tensors(module) if _MARK in vars(tensor)}

    def substitute(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled entry; compiled at its first call."""
        return self._code.of(module, entry)

    def after_removal(self, module: nn.Module) -> None:
        """Drop the compiled code, and the marks that torch has left on the tensors of what it compiled."""
        self._code.forget()
        for tensor in _tensors(module):
            if id(tensor) not in (self._marked or ()):
                vars(tensor).pop(_MARK, None)

    def run_report(self, module: nn.Module) -> CompileReport | None:
        """Graphs, recompiles and graph breaks, with their reasons."""
        counts = self._code.counts
        return evolve(counts, reasons=dict(counts.reasons)) if self._reports else None

    def reset(self, module: nn.Module) -> None:
        """Begin to count anew; what was compiled stays."""
        counts = self._code.counts
        counts.graphs = counts.recompiles = counts.graph_breaks = 0
        counts.reasons.clear()


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
