"""What happens at one call of a hooked entry."""

from __future__ import annotations

from functools import partial
from operator import length_hint
from typing import TYPE_CHECKING, Any

from hookcore.hook import Hook, overrides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

_REDUCE = "__reduce_ex__"


class _Chain:
    """A run of hooks around a call, of which at most the innermost overrides `around_forward`.

    Only overridden methods are in the flat tuples that a call goes through. They are built when hooks
    change, never at a call.
    """

    __slots__ = ("_call", "_hooks", "_module", "_post", "_pre")

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def _build(self, hooks: Sequence[Hook], innermost: Callable[..., Any]) -> None:
        """Sets the hooks, outermost first, around a call."""
        own: list[Hook] = []
        call = innermost
        for index, hook in enumerate(hooks):
            own.append(hook)
            if overrides(hook, "around_forward"):
                inner = innermost
                if rest := hooks[index + 1 :]:
                    inner = _Chain(self._module)
                    inner._build(rest, innermost)
                call = partial(hook.around_forward, self._module, inner)
                break
        self._hooks = tuple(own)
        self._call = call
        self._pre = tuple(hook.pre_forward for hook in own if overrides(hook, "pre_forward"))
        self._post = tuple(hook.post_forward for hook in reversed(own) if overrides(hook, "post_forward"))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        # How far the call came is read off the iterators when it fails; on the way it costs nothing.
        module = self._module
        entering: Iterator[Any] | None = iter(self._pre)
        leaving: Iterator[Any] | None = None
        try:
            for pre_forward in entering:  # type: ignore[union-attr]
                changed = pre_forward(module, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            entering = None
            output = self._call(*args, **kwargs)
            leaving = iter(self._post)
            for post_forward in leaving:
                changed = post_forward(module, output)
                if changed is not None:
                    output = changed
        except BaseException as error:
            self._tell(error, entering, leaving)
            raise
        return output

    def _tell(
        self, error: BaseException, entering: Iterator[Any] | None, leaving: Iterator[Any] | None
    ) -> None:
        """Tells the hooks that were entered and not yet left, from inside out."""
        inside = len(self._hooks)
        if entering is not None:
            inside = self._position("pre_forward", len(self._pre) - length_hint(entering) - 1, default=0)
        elif leaving is not None:
            left = length_hint(leaving)
            inside = self._position("post_forward", left, default=inside)
        for hook in reversed(self._hooks[:inside]):
            try:
                hook.on_error(self._module, error)
            except Exception as another:  # noqa: BLE001 - the first error is the one to report
                error.add_note(f"hookcore: {type(hook).__qualname__}.on_error failed too: {another!r}")

    def _position(self, method: str, nth: int, *, default: int) -> int:
        """Index, from outside, of the nth hook that overrides a method; the default if there is none."""
        having = [index for index, hook in enumerate(self._hooks) if overrides(hook, method)]
        return having[nth] if 0 <= nth < len(having) else default


class HookStack(_Chain):
    """The ordered hooks of one entry of one module: the callable that stands in for the entry.

    It lies in the instance's `__dict__` under the entry's name, as long as it has hooks. It has the
    signature of what it wraps, and a copy or a pickle of the module leaves it out.

    Attributes:
        hooks: The hooks, outermost first.
        keeps_alive: What has to live as long as the hooks do.
        __wrapped__: What the entry was before.
    """

    __slots__ = ("__wrapped__", "_entry", "_replaced", "hooks", "keeps_alive")

    def __init__(self, module: nn.Module, entry: str) -> None:
        super().__init__(module)
        self._entry = entry
        self._replaced = module.__dict__.get(entry)
        self.__wrapped__: Callable[..., Any] = getattr(module, entry)
        self.hooks: tuple[Hook, ...] = ()
        self.keeps_alive: object = None

    @staticmethod
    def at(module: nn.Module, entry: str) -> HookStack | None:
        """The stack of an entry, or None if it has no hooks."""
        found = module.__dict__.get(entry)
        return found if isinstance(found, HookStack) else None

    @staticmethod
    def set(module: nn.Module, entry: str, hooks: Sequence[Hook], *, keeps_alive: object = None) -> None:
        """Gives an entry exactly these hooks, outermost first; with none, the entry is as it ever was.

        Args:
            module: The module.
            entry: Name of a method, or of a callable that the instance itself holds.
            hooks: The hooks.
            keeps_alive: What has to live as long as the hooks do.
        """
        stack = HookStack.at(module, entry)
        if hooks:
            stack = stack or HookStack(module, entry)
            stack.hooks = tuple(hooks)
            stack._build(stack.hooks, stack.__wrapped__)
            stack.keeps_alive = keeps_alive
            module.__dict__[entry] = stack
            if _REDUCE not in module.__dict__:
                module.__dict__[_REDUCE] = partial(_reduce_without_hooks, module)
        elif stack is not None:
            if stack._replaced is None:
                del module.__dict__[entry]
            else:
                module.__dict__[entry] = stack._replaced
            if not any(isinstance(value, HookStack) for value in module.__dict__.values()):
                del module.__dict__[_REDUCE]

    def __getattr__(self, name: str) -> Any:
        # Whatever else people ask of a method: __name__, __func__, __self__, __doc__.
        if name == "__wrapped__":  # not yet set: do not look for it in itself
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> Any:
        # Met only where the module's own __deepcopy__ or __reduce__ goes round ours.
        return getattr, (self._module, self._entry) if self._replaced is None else (
            self._replaced,
            "__call__",
        )


def _reduce_without_hooks(module: nn.Module, protocol: int) -> Any:
    """Reduces a hooked module, for `copy.deepcopy` and pickle, to what it would be without hooks."""
    reduced = type(module).__reduce_ex__(module, protocol)
    if not isinstance(reduced, tuple) or len(reduced) < 3:
        return reduced
    make, arguments, state, *rest = reduced
    if isinstance(state, dict):
        return make, arguments, _without_hooks(state), *rest
    if isinstance(state, tuple) and state and isinstance(state[0], dict):  # a class with __slots__
        return make, arguments, (_without_hooks(state[0]), *state[1:]), *rest
    return reduced


def _without_hooks(state: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, HookStack):
            if value._replaced is not None:
                plain[name] = value._replaced
        elif name != _REDUCE:
            plain[name] = value
    return plain
