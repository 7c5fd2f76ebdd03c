"""What a user asks for, and the hook that splits a batch and joins what comes out."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hookcore import Binding, Claim, Hook, HookcoreError, Phase, PlanError, Resource, Technique
from hookcore_plugins.slicing.nested import plain_values_in, tensors_in, with_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from attrs import Attribute

    from hookcore import Component

_CODING = ("encode", "decode")
_FRAMES = "num_frames"
"""What diffusers' models call their argument for how many neighbouring rows are the frames of one video."""

_FRAMES_AS_IMAGES = 4  # dimensions: (frames of all videos, channels, height, width)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _entries(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)


@frozen
class Slicing(Technique):
    """Computes a batch a few rows at a time: activations of only so many rows are in memory at once.

    Split are the tensors among the inputs, however nested, whose first dimension is as long as that of the
    first one; all others go whole to every slice. What comes out, in dataclasses, tuples, dicts and plain
    objects, is joined along the first dimension. Rows that are frames of one video stay together, where the
    call says how many they are (`num_frames`). A number that an autoencoder returns besides, the loss of its
    codebook, is averaged over the rows.

    Rows have to be computed independently of each other, as autoencoders and most other models in evaluation
    mode do.

    Attributes:
        batch_size: How many rows, or videos, are computed at once.
        entries: Names of the methods whose batches are split. None: `encode` and `decode` of an autoencoder,
            `forward` of any other module.
    """

    name: ClassVar[str] = "slicing"
    phase: ClassVar[Phase] = Phase.SPLIT
    before: ClassVar[tuple[str, ...]] = ("tiling",)

    batch_size: int = field(default=1)
    entries: tuple[str, ...] | None = field(default=None, converter=_entries, kw_only=True)

    @batch_size.validator
    def _check_size(self, _attribute: Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"batch_size is {value!r}, expected an int of 1 or more rows")

    def skip_unless_named(self, component: Component) -> str | None:
        """Why a component of a pipeline is left alone unless it is named; None for an autoencoder."""
        if _coding_entries(component):
            return None
        return "it is no autoencoder; name it to have its batches split"

    def bind(self, component: Component) -> Iterator[Binding]:
        """Lists a hook for each entry.

        Raises:
            PlanError: The module has no such method, splits batches itself, or computes rows together.
        """
        label = component.label("")
        if getattr(component.module, "use_slicing", False) is True:
            raise PlanError(
                f"{label!r} already splits its batches itself. Call `model.disable_slicing()` before "
                "slicing is applied"
            )
        for fqn, module in component.modules.items():
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
                raise PlanError(
                    f"slicing would change what {component.label(fqn)!r} computes: it takes its statistics "
                    "over the batch. Call `model.eval()` first"
                )
        coding = _coding_entries(component)
        for entry in self.entries or coding or ("forward",):
            method = getattr(component.module, entry, None)
            if not callable(method):
                raise PlanError(f"{label!r} has no method {entry!r} whose batches could be split")
            hook = _SlicingHook(self.batch_size, _place_of_frames(method), averages=entry in coding)
            yield Binding("", hook, entry, [Claim(Resource.BATCH_SPLIT)])


def _coding_entries(component: Component) -> tuple[str, ...]:
    declared = component.conventions.entries
    return tuple(entry for entry in _CODING if entry in declared) if set(_CODING) <= set(declared) else ()


def _place_of_frames(method: Callable[..., Any]) -> int | None:
    """Which of a method's arguments says how many rows are one video, if there is one that does."""
    try:
        names = list(inspect.signature(method).parameters)
    except ValueError:  # of what is built in
        return None
    return names.index(_FRAMES) if _FRAMES in names else None


class _SlicingHook(Hook):
    """Calls an entry once for each slice of the batch.

    Args:
        batch_size: Length of a slice.
        place_of_frames: Position of the argument that says how many rows are one video.
        averages: Whether numbers that come out are means over the rows.
    """

    def __init__(self, batch_size: int, place_of_frames: int | None, *, averages: bool) -> None:
        self._batch_size = batch_size
        self._place_of_frames = place_of_frames
        self._averages = averages

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Splits, calls, and joins; a batch that is small enough is passed on as it is."""
        first = next((it for it in tensors_in((args, kwargs)) if it.ndim), None)
        rows = 0 if first is None else first.shape[0]
        size = self._batch_size
        if self._place_of_frames is not None and first is not None and first.ndim == _FRAMES_AS_IMAGES:
            size *= self._frames_of_a_video(rows, args, kwargs)
        if rows <= size:
            return call(*args, **kwargs)
        joined = None
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            slice_args, slice_kwargs = with_tensors((args, kwargs), _Rows(rows, start, stop))
            output = call(*slice_args, **slice_kwargs)
            if joined is None:
                joined = _Joined(module, output, rows, stop, averages=self._averages)
            joined.add(output, start, stop)
            del output  # or it would be in memory while the next slice is computed
        assert joined is not None  # noqa: S101 -- there are rows
        return joined.value

    def _frames_of_a_video(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many neighbouring rows a call takes for one video; 1 if it does not say."""
        place = self._place_of_frames
        frames = args[place] if place is not None and place < len(args) else kwargs.get(_FRAMES)
        return frames if isinstance(frames, int) and frames > 0 and rows % frames == 0 else 1


class _Rows:
    """Takes the rows of one slice out of a tensor that has the whole batch."""

    def __init__(self, rows: int, start: int, stop: int) -> None:
        self._rows = rows
        self._range = slice(start, stop)

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.shape[0] == self._rows:
            return tensor[self._range]
        return tensor


class _Joined:
    """What comes out for the whole batch, filled slice by slice, so that nothing is in memory twice.

    Args:
        module: Whose output it is, for messages.
        output: What the first slice has given.
        rows: Length of the batch.
        first: Length of the first slice.
        averages: Whether numbers in it are means over the rows.

    Attributes:
        value: The whole output.
    """

    def __init__(self, module: nn.Module, output: Any, rows: int, first: int, *, averages: bool) -> None:
        self._what = f"slicing cannot join what {type(module).__name__} returns"
        self._plain = plain_values_in(output)
        self._averages = averages
        self._whole: list[Tensor] = []
        self._is_split: list[bool] = []
        place = {}
        for tensor in tensors_in(output):
            is_split = tensor.ndim > 0 and tensor.shape[0] == first
            if is_split:
                place[id(tensor)] = _empty_like(tensor, rows)
            else:
                place[id(tensor)] = tensor.clone() if self._is_mean(tensor) else tensor
            self._whole.append(place[id(tensor)])
            self._is_split.append(is_split)
        self.value = with_tensors(output, lambda tensor: place[id(tensor)])

    def add(self, output: Any, start: int, stop: int) -> None:
        """Puts the output of a slice in its place.

        Raises:
            HookcoreError: It cannot be joined with those before.
        """
        tensors = tensors_in(output)
        if len(tensors) != len(self._whole) or plain_values_in(output) != self._plain:
            raise HookcoreError(f"{self._what}: it differs between slices in more than its tensors' rows")
        for tensor, whole, is_split in zip(tensors, self._whole, self._is_split, strict=True):
            if is_split and tensor.shape == (stop - start, *whole.shape[1:]):
                whole[start:stop] = tensor
            elif self._is_mean(tensor) and tensor.shape == whole.shape:
                if not torch.equal(tensor, whole):
                    whole.add_((tensor - whole) * ((stop - start) / stop))
            elif is_split or not (tensor is whole or torch.equal(tensor, whole)):
                raise HookcoreError(
                    f"{self._what}: of {tuple(tensor.shape)} the first dimension is no batch of "
                    f"{stop - start}. Name other entries, or leave the module out"
                )

    def _is_mean(self, tensor: Tensor) -> bool:
        return self._averages and tensor.ndim == 0 and tensor.is_floating_point()


def _empty_like(tensor: Tensor, rows: int) -> Tensor:
    """Memory for that many rows, laid out as a slice of them is."""
    layout = torch.contiguous_format
    if not tensor.is_contiguous() and tensor.ndim in _CHANNELS_LAST:
        wanted = _CHANNELS_LAST[tensor.ndim]
        layout = wanted if tensor.is_contiguous(memory_format=wanted) else layout
    shape = rows, *tensor.shape[1:]
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
