"""What happens at one call of a hooked entry."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from hookcore.errors import PluginError, note_origin
from hookcore.hook import Hook, overrides

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import CodeType

    from torch import nn

    from hookcore.guard import CallLock

_REDUCE = "__reduce_ex__"
_DEEPCOPY = "__deepcopy__"
_PRE, _POST, _AROUND = Hook.pre_forward, Hook.post_forward, Hook.around_forward
_SUBSTITUTE = Hook.substitute


class Owner(Protocol):
    """What hooks belong to; it lives as long as they stand at an entry."""

    def origin_of(self, hook: Hook, method: str) -> str | None:
        """Which technique's method that is, and at which module, for people; None if the hook is not its."""


class _Chain:
    """A run of hooks around a call, of which at most the innermost overrides `around_forward`.

    Only overridden methods are in the flat tuples that a call goes through. They are built when hooks
    change, never at a call, and take effect all at once: a call under way ends with the hooks it began with.
    """

    __slots__ = ("_owners", "_parts")

    def _build(
        self,
        module: nn.Module,
        hooks: Sequence[Hook],
        innermost: Callable[..., Any],
        owners: Sequence[Owner],
    ) -> None:
        """Set the hooks, outermost first, around a call."""
        # Written out, without `overrides` and lists: this runs for each of thousands of modules.
        pre: tuple[Callable[..., Any], ...] = ()
        post: tuple[Callable[..., Any], ...] = ()
        call = innermost
        for outer, hook in enumerate(hooks, start=1):
            kind = type(hook)
            if kind.pre_forward is not _PRE:
                pre = (*pre, hook.pre_forward)
            if kind.post_forward is not _POST:
                post = (hook.post_forward, *post)
            if kind.around_forward is not _AROUND:
                inner = innermost
                if rest := hooks[outer:]:
                    inner = _Chain()
                    inner._build(module, rest, innermost, owners)
                call = partial(hook.around_forward, module, inner)
                hooks = hooks[:outer]
                break
        self._owners = owners
        self._parts = module, pre, call, post, hooks

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        module, pre, call, post, hooks = self._parts
        # Where it fails, if it does: in the step begun last, after the `pre_forward` that returned last.
        step: Any = None
        entered: Any = None
        try:
            for step in pre:
                # In one statement, within which no interrupt can come but in the method itself.
                changed, entered = step(module, args, kwargs), step
                if changed is not None:
                    try:
                        args, kwargs = changed
                    except (TypeError, ValueError):
                        _refuse_arguments(changed)
                    if type(args) is not tuple or type(kwargs) is not dict:
                        _refuse_arguments(changed)
            step = call
            output = call(*args, **kwargs) if kwargs else call(*args)  # an empty ** costs as much as a step
            for step in post:
                changed = step(module, output)
                if changed is not None:
                    output = changed
        except BaseException as error:
            count, hook, method = _failed(hooks, pre, entered, post, step)
            if hook is not None and not (step is call and _went_through(step, error)):
                note_origin(error, _origin_of(self._owners, hook, method))
            _tell(module, hooks[:count], error, self._owners)
            raise
        return output


def _origin_of(owners: Iterable[Owner], hook: Hook, method: str) -> str | None:
    return next((it for owner in owners if (it := owner.origin_of(hook, method)) is not None), None)


def _refuse_arguments(found: object) -> NoReturn:
    raise PluginError(f"pre_forward() gave {found!r}; expected (args, kwargs), a tuple and a dict, or None")


def _went_through(around: Any, error: BaseException) -> bool:
    """Whether an error that came out of `around_forward` was raised by the call that it stands around."""
    inner = around.args[1]
    entered = _Chain.__call__ if isinstance(inner, _Chain) else inspect.unwrap(inner)
    code: CodeType | None = getattr(entered, "__code__", None)
    if code is None:  # what is compiled leaves no frame
        return True
    trace = error.__traceback__ and error.__traceback__.tb_next
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace = trace.tb_next
    return False


def _failed(
    hooks: Sequence[Hook],
    pre: Sequence[Callable[..., Any]],
    entered: object,
    post: Sequence[Callable[..., Any]],
    step: object,
) -> tuple[int, Hook | None, str]:
    """Return how many hooks, counted from outside, had been entered and not yet left when a step failed.

    Args:
        hooks: The hooks, outermost first.
        pre: The `pre_forward` of those that override it, in this order.
        entered: Which of these returned last; None for none.
        post: The `post_forward` of those that override it, innermost first.
        step: What was begun last: one of `pre`, the call, or one of `post`; None for nothing.

    Returns:
        Their number, and the hook and its method that failed. No hook if the call itself failed, or nothing
        was begun.
    """
    if step is None:
        return 0, None, ""
    places = [index for index, hook in enumerate(hooks) if overrides(type(hook), "pre_forward")]
    for number, one in enumerate(pre):
        if one is step:
            count = [*places, len(hooks)][number + (one is entered)]
            return count, hooks[places[number]], "pre_forward"
    places = [index for index, hook in enumerate(hooks) if overrides(type(hook), "post_forward")]
    for index, one in zip(places, reversed(post), strict=True):
        if one is step:
            return index, hooks[index], "post_forward"
    around = hooks[-1] if hooks and overrides(type(hooks[-1]), "around_forward") else None
    return len(hooks), around, "around_forward"


def _tell(module: nn.Module, hooks: Sequence[Hook], error: BaseException, owners: Sequence[Owner]) -> None:
    """Tell hooks, outermost first, of an error, from inside out: all of them, also if an interrupt comes."""
    if not hooks:
        return
    *outer, hook = hooks
    try:
        hook.on_error(module, error)
    except Exception as another:  # noqa: BLE001 - the first error is the one to report
        where = _origin_of(owners, hook, "on_error") or f"{type(hook).__qualname__}.on_error"
        error.add_note(f"hookcore: {where} failed too: {another!r}")
    finally:
        _tell(module, outer, error, owners)


class LeftOutOfCopies:
    """Base of what lies in a module's `__dict__`, and in no copy or pickle of it: see `PlainReduction`."""

    __slots__ = ()


class HookStack(_Chain, LeftOutOfCopies):
    """The ordered hooks of one entry of one module: the callable that stands in for the entry.

    It lies in the instance's `__dict__` under the entry's name, as long as it has hooks. It has the name,
    the documentation and the signature of what it wraps, and a copy or a pickle of the module leaves it out.

    Attributes:
        hooks: The hooks, outermost first.
        __wrapped__: What the entry was before.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, module: nn.Module, entry: str) -> None:
        self._module = module
        self._entry = entry
        self._replaced = module.__dict__.get(entry)
        self.hooks: tuple[Hook, ...] = ()
        self._inner: tuple[CallLock, Callable[..., Any]]
        # As functools.update_wrapper would, at a tenth of the cost; __getattr__ finds the other names.
        self.__wrapped__ = getattr(module, entry)
        self.__doc__ = self.__wrapped__.__doc__
        self.__module__ = self.__wrapped__.__module__

    @staticmethod
    def at(module: nn.Module, entry: str) -> HookStack | None:
        """The stack of an entry, or None if it has no hooks.

        It is found, too, inside what another library has since wrapped round it.
        """
        found = module.__dict__.get(entry)
        while found is not None and not (isinstance(found, HookStack) and found._module is module):
            found = getattr(found, "__wrapped__", None)
        return found

    @staticmethod
    def set(
        module: nn.Module,
        entry: str,
        hooks: Sequence[Hook],
        *,
        owners: Sequence[Owner] = (),
        lock: CallLock | None = None,
        inner_hooks: Sequence[Hook] = (),
    ) -> None:
        """Give an entry exactly these hooks, outermost first; with none, the entry is as it ever was.

        Args:
            module: The module.
            entry: Name of a method, or of a callable that the instance itself holds.
            hooks: The hooks.
            owners: What they belong to.
            lock: A call by the thread that has taken this lock goes through `inner_hooks` instead; None where
                none does.
            inner_hooks: Those of the hooks that inner calls go through.
        """
        stack = HookStack.at(module, entry)
        if hooks:
            if stack is None:
                stack = HookStack(module, entry)
                PlainReduction.begin(module, entry)
                module.__dict__[entry] = stack
            stack.hooks = tuple(hooks)
            innermost = stack.__wrapped__
            for hook in reversed(stack.hooks):
                if type(hook).substitute is not _SUBSTITUTE:
                    try:
                        innermost = hook.substitute(module, innermost)
                    except Exception as error:
                        note_origin(error, _origin_of(owners, hook, "substitute"))
                        raise
            stack._build(module, stack.hooks, innermost, owners)
            stack.__class__ = HookStack
            if lock is not None:
                inner: Any = innermost
                if inner_hooks:
                    inner = _Chain()
                    inner._build(module, tuple(inner_hooks), innermost, owners)
                stack._inner = lock, inner
                stack.__class__ = _OutermostStack
        else:
            if stack is not None:
                stack._give_back()
            PlainReduction.end(module, entry)

    def _give_back(self) -> None:
        """Make the entry what it was before, unless another library has put something there since."""
        attributes = self._module.__dict__
        if attributes.get(self._entry) is self:
            if self._replaced is None:
                del attributes[self._entry]
            else:
                attributes[self._entry] = self._replaced
        # Whoever kept the stack calls what it wraps.
        self.__class__ = HookStack
        self.hooks = ()
        self._owners = ()
        self._parts = self._module, (), self.__wrapped__, (), ()

    def __getattr__(self, name: str) -> Any:
        # Whatever else people ask of a method, such as __func__ and __self__.
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> Any:
        # Met only where a copy goes round those below, as a class's own way of pickling may.
        if self._replaced is None:
            return getattr, (self._module, self._entry)
        return getattr, (self._replaced, "__call__")


class _OutermostStack(HookStack):
    """A stack with other hooks for inner calls; a class of its own, so that other stacks need not ask."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        lock, inner = self._inner
        if lock.turn.thread == get_ident():
            return inner(*args, **kwargs)
        return _Chain.__call__(self, *args, **kwargs)


def bare_entry(module: nn.Module, entry: str) -> Callable[..., Any]:
    """An entry of a module without its hooks, for a hook that prepares what it will `substitute`."""
    stack = HookStack.at(module, entry)
    found: Callable[..., Any] = getattr(module, entry) if stack is None else stack.__wrapped__
    return found


class PlainReduction:
    """Stands in for the `__reduce_ex__` of a hooked module: reduces it to what it would be without hooks.

    Attributes:
        module: The module.
        entries: Which of its entries have hooks.
    """

    __slots__ = ("entries", "module")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.entries: set[str] = set()

    @staticmethod
    def begin(module: nn.Module, entry: str) -> None:
        """Leave the hooks of an entry out of copies and pickles of a module."""
        attributes = module.__dict__
        reduction = attributes.get(_REDUCE)
        if reduction is None:
            attributes[_REDUCE] = reduction = PlainReduction(module)
            if hasattr(type(module), _DEEPCOPY):
                attributes.setdefault(_DEEPCOPY, partial(_deepcopy_without_hooks, module))
        if isinstance(reduction, PlainReduction):  # or else the instance had a way of its own
            reduction.entries.add(entry)

    @staticmethod
    def end(module: nn.Module, entry: str) -> None:
        """Give copies and pickles back to the class once no other entry has hooks."""
        attributes = module.__dict__
        reduction = attributes.get(_REDUCE)
        if isinstance(reduction, PlainReduction):
            reduction.entries.discard(entry)
            if not reduction.entries:
                attributes.pop(_DEEPCOPY, None)
                del attributes[_REDUCE]

    def __call__(self, protocol: int) -> Any:
        """Reduce the module as its class does, without hooks."""
        return _without_hooks(type(self.module).__reduce_ex__(self.module, protocol))


def _without_hooks(reduced: Any) -> Any:
    """Leave hooks out of a module's attributes, wherever a reduced form has them: as state or argument."""
    if type(reduced) is tuple:
        return tuple(map(_without_hooks, reduced))
    if type(reduced) is dict:
        plain = {}
        for name, value in reduced.items():
            if isinstance(value, LeftOutOfCopies):
                if isinstance(value, HookStack) and value._replaced is not None:
                    plain[name] = value._replaced
            elif name not in (_REDUCE, _DEEPCOPY):
                plain[name] = value
        return plain
    return reduced


def _deepcopy_without_hooks(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Copy a hooked module in the way of its own class, then take what that copied of the hooks away."""
    copied = type(module).__deepcopy__(module, memo)  # type: ignore[attr-defined]
    if copied is not module and isinstance(copied, type(module)):
        for name, value in vars(module).items():
            if not isinstance(value, LeftOutOfCopies) or vars(copied).pop(name, None) is None:
                continue
            if isinstance(value, HookStack) and value._replaced:
                vars(copied)[name] = copy.deepcopy(value._replaced, memo)
        vars(copied).pop(_REDUCE, None)
        vars(copied).pop(_DEEPCOPY, None)
    return copied
