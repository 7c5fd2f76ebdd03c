"""Functions that torch.compile calls while it traces code, and whose results are constants in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

Function = TypeVar("Function", bound="Callable[..., Any]")


def untraced(function: Function) -> Function:
    """Marks a function as `torch.compiler.assume_constant_result` does.

    That would import all of the compiler, which takes a second, wherever plugins are looked for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
