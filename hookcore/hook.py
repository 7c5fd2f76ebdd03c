"""The code that runs at a module's call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hookcore.overriding import check_overrides

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import nn


class Hook:
    """Base of all hooks: override only what you need; what is not overridden costs nothing at a call.

    One hook object serves one binding: one entry of one module. Around a call, `pre_forward` runs from
    the outermost hook to the innermost, `around_forward` nests, `post_forward` runs from the innermost to
    the outermost. The module is passed in each time, so a hook need not hold it.

    A method that raises must first undo its own work: `on_error` is called only on hooks that had been
    entered and not yet left. The same holds for `attach` and `detach`: when one raises, the module has to
    be as it was before that one call. The engine undoes all the others.
    """

    swaps_weights: ClassVar[bool] = False
    """Whether a call changes what the module's tensors hold (casting, placement). The engine then lets one
    thread at a time into the component, and keeps what autograd saves apart from the swapped tensors."""

    only_brings_weights: ClassVar[bool] = False
    """Whether all that a call does is to have the module's tensors hold what they are to hold meanwhile. It
    may then be done around the call of a module further out, where that one's binding `encloses` what is
    below it: `module` is still the hook's own, arguments and output are the outer call's."""

    outermost_only: ClassVar[bool] = False
    """Whether the hook has nothing to do within another hooked call of its component: inner calls pass it by.
    So any module can have its weights for whoever calls it, at next to no cost to inner calls."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overrides(cls, Hook)

    def attach(self, module: nn.Module) -> None:
        """Prepare the module; called once before the first call, and again after each `detach`.

        Attaching goes from the innermost hook to the outermost.
        """

    def detach(self, module: nn.Module) -> None:
        """Give the module back as `attach` found it, in the reverse order of attaching.

        What a user changed meanwhile (loaded, edited or replaced weights) is kept, not overwritten.
        """

    def after_removal(self, module: nn.Module) -> None:
        """Run after `detach` when the technique is taken off for good, not only to be attached again.

        For what `detach` may leave open because the next `attach` would do it over, such as bringing into
        memory what was read from disk at each call. If it raises, the technique stays on.
        """

    def pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Run before the call.

        Returns:
            The new `(args, kwargs)`, or None to leave them as they are.
        """

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Run after the call.

        Returns:
            The new output, or None to leave it as it is.
        """

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Stand in for the call: runs after this hook's `pre_forward` and before its `post_forward`.

        Args:
            module: The module called.
            call: What is inside: the inner hooks and the entry itself. May be called any number of times.
            *args: What the module was called with, after all outer `pre_forward`.
            **kwargs: Likewise.

        Returns:
            The output.
        """
        raise NotImplementedError  # never called: the stack chains only methods that are overridden

    def substitute(self, module: nn.Module, entry: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is called in the place of the entry itself, inside of all hooks.

        Asked for whenever the entry's hooks change, after `attach`, and must not fail: prepare in `attach`,
        or at the first call. Claim `Resource.CODE`, so that no other technique does the same there.

        Args:
            module: The module.
            entry: The entry without any hook, or what a hook further inside put in its place; what is
                returned may call it.
        """
        raise NotImplementedError  # never called: the stack asks only where it is overridden

    def outside(self, module: nn.Module) -> Hook:
        """The hook that stands for this one where a call further out runs the module as one with it.

        At the calls of modules that a compiled block encloses nothing can stand. A hook that can have its
        effect there in another way gives the hook that does, for the block's call; any other is refused
        there. Where the module's own entry is compiled, what is given stands at that, in the place of this
        one: there it can `substitute`, inside of what compiles.

        Args:
            module: The hook's own; the call of another one may enclose it.
        """
        raise NotImplementedError  # never called: the engine asks only where it is overridden

    def on_error(self, module: nn.Module, error: BaseException) -> None:
        """Clean up when the call raises after this hook was entered and before it was left.

        The exception goes on unchanged. If this method raises, its error becomes a note on that exception.
        """

    def true_value(self, module: nn.Module, tensor: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
        """The value that calls compute with, of a tensor that the hook stores in a way of its own.

        For tensors whose storage dtype the binding claims (`Resource.STORAGE_DTYPE`). State dicts, copies,
        pickles, and reads by other modules' calls are given it. Asked at any time while the hook is attached,
        also within a call: data in no form of the hook's own is the value, and is returned itself.

        Args:
            module: The hook's own module.
            tensor: The parameter or buffer.
            data: What it holds, wherever that lies; not to be changed.

        Returns:
            A tensor of the same shape, on the same device.
        """
        raise NotImplementedError  # never called: the engine asks only where it is overridden

    def stored_value(self, module: nn.Module, tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What the tensor is to hold for a value that `load_state_dict` brings; the inverse of `true_value`.

        What belongs to it beside the data (scales) is set here. The default returns the value, which torch
        converts to the tensor's dtype as it writes it.
        """
        return value

    def reset(self, module: nn.Module) -> None:
        """Forget what was learned from earlier calls (traces, counters); weights stay where they are."""

    def loss_on_detach(self, module: nn.Module) -> str | None:
        """What `detach` could not give back exactly, as a phrase for people; None when nothing is lost."""

    def report(self, module: nn.Module) -> Mapping[str, int]:
        """Return where the bytes are that this hook manages: a label for people to a number of bytes."""
        return {}

    def needs(self, module: nn.Module) -> Mapping[str, int]:
        """Bytes of each device that weights will take at once, as far as that can be said before.

        It is asked before the hook is attached, and touches nothing. What several hooks share is said by the
        first of them.
        """
        return {}

    def run_report(self, module: nn.Module) -> Any:
        """Return the counts since the hook was attached or last reset: an attrs object; None for nothing.

        It is printed field by field; numbers in fields whose names end in `_bytes` or `_seconds` as such, and
        a mapping from phrases to how often they were true (reasons) below all others. Where the hooks of a
        technique count together, one of them answers.
        """


def overrides(kind: type[Hook], method: str) -> bool:
    """Return whether a class of hooks brings its own version of one of `Hook`'s methods."""
    return getattr(kind, method) is not getattr(Hook, method)
