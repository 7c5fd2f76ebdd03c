"""Marks functions that torch.compile calls while it traces code, and whose results it takes as constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

Function = TypeVar("Function", bound="Callable[..., Any]")


def constant_result(function: Function) -> Function:
    """Mark a function as `torch.compiler.assume_constant_result` does.

    That decorator imports the whole compiler, which takes a second, wherever plugins are looked for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
