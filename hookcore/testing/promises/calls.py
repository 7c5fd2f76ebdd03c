"""What a technique promises of calls while it is applied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from attrs import evolve, frozen
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import hookcore
from hookcore.errors import ConflictError
from hookcore.testing.cases import ModelCase, arguments_on, tensors_in
from hookcore.testing.promises.base import SEED, Promises, on_random_models
from hookcore.testing.promises.others import DeliberateError, Raising
from hookcore.testing.snapshot import ModelSnapshot
from hookcore.testing.twins import has_hooks, promise

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hookcore.testing.cases import Arguments, Blueprint

_MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
}


_CALLS_TO_LEARN = 3
"""What a technique learns from its first calls may change where weights lie between calls."""


class CallPromises(Promises):
    """Outputs, gradients, errors, routes, submodules, reset."""

    @on_random_models
    def test_outputs_are_those_of_the_bare_model(self, data: st.DataObject) -> None:
        """Every entry, called repeatedly and in any order, with and without gradients."""
        case, model, bare, _ = self.draw_applied(data)
        modes = [name for name in _MODES if self.gradients or name != "enable_grad"]
        mode = data.draw(st.sampled_from(modes), label="mode")
        calls = st.tuples(st.sampled_from(self.entries(case, model)), st.integers(0, 2))
        for entry, seed in data.draw(st.lists(calls, min_size=1, max_size=4), label="calls"):
            with _MODES[mode]():
                self.same_outputs(
                    case, (model, bare), entry, seed, home=self.home, when=f"while applied, under {mode}"
                )

    @on_random_models
    def test_gradients_are_those_of_the_bare_model(self, data: st.DataObject) -> None:
        """Of all weights, however often an entry is called before and after a backward pass."""
        case, model, bare, applied = self.draw_applied(data)
        if not self.gradients:
            return
        entry = data.draw(st.sampled_from(self.entries(case, model)), label="entry")
        for _ in range(data.draw(st.integers(1, 2), label="times")):
            for it, device in ((model, self.home), (bare, self.device)):
                outputs = [out for out in case.call(it, entry, SEED, device=device) if out.requires_grad]
                if outputs:
                    torch.stack([out.square().mean() for out in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        self._same_gradients(model, bare, "while applied")
        self.remove(applied, model)
        self._same_gradients(model, bare, "after removal")

    def _same_gradients(self, model: nn.Module, bare: nn.Module, when: str) -> None:
        found = dict(model.named_parameters())
        for fqn, parameter in bare.named_parameters():
            got, expected = found[fqn].grad, parameter.grad
            kept = got is expected if got is None or expected is None else self._same_gradient(got, expected)
            promise(kept, f"the gradient of {fqn!r} is that of the bare model, {when}")
            if got is not None and self.home == self.device:
                promise(
                    got.device == found[fqn].device,
                    f"the gradient of {fqn!r} lies where the weight does, {when}",
                )

    def _same_gradient(self, got: Tensor, expected: Tensor) -> bool:
        """Not in every bit: uses of a weight may be added up in another order."""
        try:
            torch.testing.assert_close(
                got, expected, rtol=self.tolerance, atol=self.tolerance, equal_nan=True, check_device=False
            )
        except AssertionError:
            return False
        return True

    @on_random_models
    def test_modules_are_called_in_any_order(self, data: st.DataObject) -> None:
        """Parts of a model are left out, called again, and called in another order at each call."""
        case = self.draw(data)
        routed = _Routed(case.blueprint)
        model, bare = self.pair(ModelCase(routed, case.seed))
        self.apply(model)
        step = st.integers(0, _PARTS - 1)
        for route in data.draw(st.lists(st.lists(step, max_size=4), min_size=2, max_size=4), label="routes"):
            now = ModelCase(evolve(routed, route=tuple(route)), case.seed)
            self.call_one(now, model, bare, "forward", SEED, when=f"where parts {route} are called")

    @on_random_models
    def test_it_works_on_a_submodule(self, data: st.DataObject) -> None:
        """Applied to a module inside a model it serves that module's calls, and hooks nothing outside."""
        case, model, bare = self.draw_pair(data)
        inside = [fqn for fqn, _ in model.named_modules() if fqn]
        if not inside:
            return
        fqn = data.draw(st.sampled_from(inside), label="submodule")
        calls = _arguments_of_calls(case, self.build(case).to(self.device), fqn, self.device)
        before = ModelSnapshot.take(model, twin=bare)
        part, bare_part = model.get_submodule(fqn), bare.get_submodule(fqn)
        applied = self.apply(part)
        belong = set(part.modules())
        outside = [name for name, it in model.named_modules() if it not in belong and has_hooks(it)]
        promise(not outside, f"applied to {fqn!r}, it hooks nothing outside, such as {outside}")
        for arguments in calls:
            args, kwargs = arguments_on(arguments, torch.device(self.home))
            bare_args, bare_kwargs = arguments_on(arguments, torch.device(self.device))
            with torch.no_grad():
                got = tensors_in(part(*_copied(args), **_copied(kwargs)))
                expected = tensors_in(bare_part(*_copied(bare_args), **_copied(bare_kwargs)))
            promise(
                all(self.same(one, other) for one, other in zip(got, expected, strict=True)),
                f"applied to {fqn!r}, it gives the outputs of the bare module",
            )
        if self.home == self.device:
            self.call_both(case, model, bare)
        self.remove(applied, model)
        self.is_restored(before, model)

    @on_random_models
    def test_a_failing_call_leaves_the_next_one_right(self, data: st.DataObject) -> None:
        """Whichever module raises, the error goes on unchanged, and no trace of the call is left."""
        case, model, bare = self.draw_pair(data)
        before = ModelSnapshot.take(model, twin=bare)
        applied = self.apply(model)
        for _ in range(_CALLS_TO_LEARN):
            self.call_both(case, model, bare)
        fqns = dict(model.named_modules())
        failing = [fqn for fqn, module in fqns.items() if has_hooks(module)]
        other = data.draw(st.sampled_from(list(fqns)), label="fails, too, at")
        for fqn in dict.fromkeys([*failing, other]):
            before_failing = ModelSnapshot.take(model, twin=bare)
            for entry in self.entries(case, model):
                outcomes = [
                    _call_failing(case, model, entry, fqn, self.home, hidden=self.hides_modules),
                    _call_failing(case, bare, entry, fqn, self.device),
                ]
                if outcomes[0] == _HIDDEN:
                    continue
                promise(
                    outcomes[0] == outcomes[1],
                    f"an error in {fqn or 'the model'!r} reaches the caller of {entry}() unchanged",
                )
            found = self.differences(before_failing, model, exact=self.tolerance is None)
            promise(not found, f"a call that fails leaves nothing behind: {'; '.join(found)}")
        self.call_both(case, model, bare)
        self.remove(applied, model)
        self.is_restored(before, model)

    @on_random_models
    def test_reset_keeps_outputs(self, data: st.DataObject) -> None:
        """After `reset` the calls are right, whatever was learned before."""
        case, model, bare, applied = self.draw_applied(data)
        if data.draw(st.booleans(), label="called before"):
            self.call_both(case, model, bare)
        applied.reset()
        self.call_both(case, model, bare)


# Routes

_PARTS = 2


class _Parts(nn.Module):
    """Several models in a list, given the same inputs; a route says which are called, in which order."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, route: tuple[int, ...], *args: Any, **kwargs: Any) -> list[Any]:
        """Return the result of each step."""
        return [self.parts[step](*_copied(args), **_copied(kwargs)) for step in route]


@frozen
class _Routed:
    """The blueprint of a model of several like parts.

    Attributes:
        part: The blueprint of each.
        route: The parts that a call takes, in order.
    """

    part: Blueprint
    route: tuple[int, ...] = ()

    @property
    def entries(self) -> tuple[str, ...]:
        return ("forward",)

    def make(self) -> nn.Module:
        parts = [self.part.make() for _ in range(_PARTS)]
        return _Parts(parts).train(parts[0].training)

    def make_inputs(self, entry: str, generator: torch.Generator) -> Arguments:
        args, kwargs = self.part.make_inputs(entry, generator)
        return (self.route, *args), kwargs


# Submodules and errors


def _copied(value: Any) -> Any:
    """The same arguments in other tensors: a forward may change them in place."""
    return tree_map_only(Tensor, torch.clone, value)


def _arguments_of_calls(case: ModelCase, model: nn.Module, fqn: str, device: str) -> list[Arguments]:
    """Return what a submodule is called with in calls of a model."""
    calls: list[Arguments] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((_copied(args), _copied(kwargs)))

    model.get_submodule(fqn).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        for entry in case.entries:
            case.call(model, entry, SEED, device=device)
    return calls


_HIDDEN = "hidden"


def _call_failing(
    case: ModelCase, model: nn.Module, entry: str, fqn: str, device: str, *, hidden: bool = False
) -> str:
    """Call with a module that raises, as far inside as can be, and tells what came of it.

    Args:
        case: What the model was built from.
        model: The model.
        entry: What to call.
        fqn: The module that raises.
        device: Where the inputs lie.
        hidden: Whether to make no call if no technique can stand at the module.
    """
    error = DeliberateError()
    remove: Callable[[], None]
    try:
        remove = hookcore.apply(model, [Raising(fqn, error)]).remove
    except ConflictError:  # the technique hides the module's call from other hooks
        if hidden:
            return _HIDDEN

        def fail(_module: nn.Module, _args: object) -> None:
            raise error

        remove = model.get_submodule(fqn).register_forward_pre_hook(fail).remove
    try:
        with torch.no_grad():
            case.call(model, entry, SEED, device=device)
    except DeliberateError as caught:
        return "raised" if caught is error else "another error"
    finally:
        remove()
    return "not reached"
