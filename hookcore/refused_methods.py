"""Methods of other libraries' classes that refuse hooked models, while there are any."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from hookcore.errors import ConflictError
from hookcore.registry import CHANGING, attached_anywhere

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_MARK = "_hookcore_original"


def refuse_meanwhile(
    owner: type,
    method: str,
    find: Callable[..., tuple[nn.Module, str] | None],
    undo: Callable[[nn.Module], object] = bool,
) -> None:
    """Make a method of a class refuse the modules of hooked components, while anything is applied.

    Call it whenever that may have changed (`hookcore_observe`). When nothing is applied, the class is as it
    was. The method then raises a `ConflictError` before it does anything.

    Args:
        owner: The class.
        method: Name of its method.
        find: Given what the method is called with, the module and a phrase for what is put on it; None for a
            call that does no harm.
        undo: Takes off a module that is refused what the library has put there before it called the method.
    """
    with CHANGING:
        found = vars(owner)[method]
        original = getattr(found, _MARK, None)
        if original is not None and not attached_anywhere():
            setattr(owner, method, original)
        elif original is None and attached_anywhere():
            setattr(
                owner,
                method,
                _refusing(found, find, undo, lambda: refuse_meanwhile(owner, method, find, undo)),
            )


def _refusing(
    original: Callable[..., Any],
    find: Callable[..., tuple[nn.Module, str] | None],
    undo: Callable[[nn.Module], object],
    look_again: Callable[[], None],
) -> Callable[..., Any]:
    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        look_again()  # a hooked model may have gone away without anybody being told
        found = find(*args, **kwargs)
        if found is not None:
            module, what = found
            for item in attached_anywhere():
                if module in item.component.fqns:
                    undo(module)
                    raise ConflictError(
                        f"{what} cannot be put on {item.component.label(item.component.fqns[module][0])!r}: "
                        f"{item.technique.name} is on the model. Nothing was touched. Take that off "
                        "before, by hookcore.remove(model) or the handle that apply() gave"
                    )
        return original(*args, **kwargs)

    setattr(guarded, _MARK, original)
    return guarded
