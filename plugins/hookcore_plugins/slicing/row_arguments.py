"""What a call says about its rows in arguments that are no tensors."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

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
        places: Positions of those that it has, by name.
    """

    places: dict[str, int] = field(factory=dict)

    @classmethod
    def of(cls, method: Callable[..., Any]) -> RowArguments:
        """Those of a method."""
        try:
            names = list(inspect.signature(method).parameters)
        except ValueError:  # of what is built in
            return cls()
        return cls({name: names.index(name) for name in (_FRAMES, _BATCH, _SHAPE) if name in names})

    def together(self, rows: int, dims: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many neighbouring rows a call takes for one item, as a video; 1 if it does not say.

        Args:
            rows: How many there are.
            dims: Dimensions of the tensor whose rows they are.
            args: What is called with.
            kwargs: Likewise.
        """
        frames, items = (self._value(name, args, kwargs) for name in (_FRAMES, _BATCH))
        if dims == _IMAGES and _divides(frames, rows):
            return int(frames)
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
        changed = list(args)
        for name, place in self.places.items():
            value = self._value(name, args, kwargs)
            if name == _BATCH and _divides(value, rows):
                value = taken * value // rows
            elif name == _SHAPE and _is_of_images(value, rows):
                value = type(value)((taken, *value[1:]))
            else:
                continue
            if place < len(args):
                changed[place] = value
            else:
                kwargs = {**kwargs, name: value}
        return tuple(changed), kwargs

    def _value(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.places.get(name)
        if place is None:
            return None
        return args[place] if place < len(args) else kwargs.get(name)


def _divides(value: Any, rows: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and rows % value == 0


def _is_of_images(value: Any, rows: int) -> bool:
    """Whether it is the shape of so many images; one of fewer dimensions may begin with a height."""
    return isinstance(value, list | tuple) and len(value) >= _IMAGES and value[0] == rows
