"""What a call says about its rows in arguments that are no tensors."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeGuard

from attrs import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

_FRAMES = "num_frames"
"""What diffusers' models call their argument for how many neighbouring rows are the frames of one video."""

_BATCH = "batch_size"
"""The same for how many items all rows are together, each of as many neighbouring rows."""

_SHAPE = "shape"
"""The same for the shape of latents `(rows, height, width, channels)`, as in `VQModel`."""

_IMAGES = 4  # dimensions: (images, or frames of all videos, channels, height, width)


@frozen
class RowArguments:
    """Where a method has arguments that say something about rows, and what they say.

    Attributes:
        positional: Names of its arguments that may be given by position.
        keyword_only: Names of the others.
        takes_any: Whether it takes arguments of other names, too.
    """

    positional: tuple[str, ...] = ()
    keyword_only: tuple[str, ...] = ()
    takes_any: bool = False

    @classmethod
    def of(cls, method: Callable[..., Any]) -> RowArguments:
        """Those of a method."""
        try:
            parameters = inspect.signature(method).parameters.values()
        except ValueError:  # of what is built in
            return cls(takes_any=True)
        return cls(
            tuple(it.name for it in parameters if it.kind in (it.POSITIONAL_ONLY, it.POSITIONAL_OR_KEYWORD)),
            tuple(it.name for it in parameters if it.kind is it.KEYWORD_ONLY),
            any(it.kind is it.VAR_KEYWORD for it in parameters),
        )

    def takes(self, name: str) -> bool:
        """Return whether the method takes an argument of a name."""
        return self.takes_any or name in (*self.positional, *self.keyword_only)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what a call is given, by name."""
        return {**dict(zip(self.positional, args, strict=False)), **kwargs}

    def together(self, rows: int, dims: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return how many neighbouring rows a call takes for one item, as a video; 1 if it does not say.

        Args:
            rows: How many there are.
            dims: Dimensions of the tensor whose rows they are.
            args: What is called with.
            kwargs: Likewise.
        """
        given = self._about_rows(args, kwargs)
        frames, items = given.get(_FRAMES), given.get(_BATCH)
        if dims == _IMAGES and _divides(frames, rows):
            return frames
        return rows // items if _divides(items, rows) else 1

    def for_slice(
        self, rows: int, taken: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a slice, with its own number of rows in what said that of the batch.

        Args:
            rows: How many the batch has.
            taken: How many the slice has.
            args: What is called with.
            kwargs: Likewise.
        """
        changed = {}
        for name, value in self._about_rows(args, kwargs).items():
            if name == _BATCH and _divides(value, rows):
                changed[name] = taken * value // rows
            elif name == _SHAPE and _is_of_images(value, rows):
                changed[name] = type(value)((taken, *value[1:]))
        names = self.positional[: len(args)]
        first = (changed.pop(name, value) for name, value in zip(names, args, strict=False))
        return (*first, *args[len(names) :]), {**kwargs, **changed}

    def _about_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        own = (*self.positional, *self.keyword_only)
        given = self.given(args, kwargs)
        return {name: given[name] for name in (_FRAMES, _BATCH, _SHAPE) if name in own and name in given}


def _divides(value: Any, rows: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and rows % value == 0


def _is_of_images(value: Any, rows: int) -> bool:
    """Return whether it is the shape of so many images; one of fewer dimensions may begin with a height."""
    return isinstance(value, list | tuple) and len(value) >= _IMAGES and value[0] == rows
