"""What a user asks for, and the hook that splits a batch and joins what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hookcore import Binding, Claim, Hook, HookcoreError, Phase, PlanError, Resource, Technique
from hookcore_plugins.slicing.nested_tensors import plain_values_in, tensors_in, with_tensors
from hookcore_plugins.slicing.row_arguments import RowArguments
from hookcore_plugins.slicing.rows import Call, NotRowsError, Rows, form_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from attrs import Attribute

    from hookcore import Component

_CODING = ("encode", "decode")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _names(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, str) else tuple(value)


@frozen
class Slicing(Technique):
    """Computes a batch a few rows at a time: activations of only so many rows are in memory at once.

    Split are the tensors among the inputs, however nested, whose first dimension is the batch; all others go
    whole to every slice. Which they are is found at the first call of a kind: the model is called without
    data and with other batch sizes, and what is rows has to change with the batch. Where that cannot be told,
    the call is refused. What comes out, in dataclasses, tuples, dicts and plain objects, is joined along the
    first dimension. Rows that are frames of one video stay together, where the call says how many they are
    (`num_frames`, or `batch_size` for how many videos there are). A slice has its own number of rows in an
    argument `batch_size` or `shape`. A number that an autoencoder returns besides, the loss of its codebook,
    is averaged over the rows.

    Rows have to be computed independently of each other, as autoencoders and most other models in evaluation
    mode do. The result is that of the whole batch up to rounding: kernels add up in another order for another
    number of rows.

    Attributes:
        batch_size: How many rows, or videos, are computed at once.
        entries: Names of the methods whose batches are split. None: `encode` and `decode` of an autoencoder,
            `forward` of any other module.
        rows: Names of the arguments in which the first dimension is the batch, for models that cannot be
            called without data. None: that is found.
    """

    name: ClassVar[str] = "slicing"
    phase: ClassVar[Phase] = Phase.SPLIT
    before: ClassVar[tuple[str, ...]] = ("tiling",)

    batch_size: int = field(default=1)
    entries: tuple[str, ...] | None = field(default=None, converter=_names, kw_only=True)
    rows: tuple[str, ...] | None = field(default=None, converter=_names, kw_only=True)

    @batch_size.validator
    def _check_size(self, _attribute: Attribute[int], value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"batch_size is {value!r}, expected an int of 1 or more rows")

    def skip_unless_named(self, component: Component) -> str | None:
        """Return why a component of a pipeline is left alone unless it is named; None for an autoencoder."""
        if _coding_entries(component):
            return None
        return "it is no autoencoder; name it to have its batches split"

    def bind(self, component: Component) -> Iterator[Binding]:
        """List a hook for each entry.

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
            stated = RowArguments.of(method)
            if self.rows is not None and not any(map(stated.takes, self.rows)):
                raise PlanError(
                    f"{entry}() of {label!r} has none of the arguments that rows={self.rows} names; it has "
                    f"{', '.join((*stated.positional, *stated.keyword_only))}"
                )
            yield Binding(
                "",
                _SlicingHook(self, entry, stated, averages=entry in coding),
                entry,
                [Claim(Resource.BATCH_SPLIT)],
            )


def _coding_entries(component: Component) -> tuple[str, ...]:
    declared = component.conventions.entries
    return tuple(entry for entry in _CODING if entry in declared) if set(_CODING) <= set(declared) else ()


class _SlicingHook(Hook):
    """Calls an entry once for each slice of the batch.

    Args:
        options: What the user asks for.
        entry: Name of the entry.
        stated: What the entry's arguments say about rows.
        averages: Whether numbers that come out are means over the rows.
    """

    def __init__(self, options: Slicing, entry: str, stated: RowArguments, *, averages: bool) -> None:
        self._options = options
        self._entry = entry
        self._stated = stated
        self._averages = averages
        self._known: dict[Hashable, Rows] = {}

    def reset(self, module: nn.Module) -> None:
        """Forget what is rows in which calls."""
        self._known.clear()

    def around_forward(
        self, module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Split, call, and join; a batch that is small enough is passed on as it is.

        Raises:
            HookcoreError: The call is given a cache to write into, it is not known what its rows are, or what
                comes out cannot be joined.
        """
        if torch.compiler.is_compiling():  # by whoever compiles the model as a whole: not this, nor below
            alone = torch.compiler.disable(self.around_forward)  # type: ignore[no-untyped-call]
            return alone(module, call, *args, **kwargs)
        given = self._stated.given(args, kwargs)
        names = self._options.rows
        inputs = (args, kwargs) if names is None else [given.get(name) for name in names]
        first = next((it for it in tensors_in(inputs) if it.ndim), None)
        if first is None:
            return call(*args, **kwargs)
        rows = first.shape[0]
        together = self._stated.together(rows, first.ndim, args, kwargs)
        size = self._options.batch_size * together
        if rows <= size:
            return call(*args, **kwargs)
        _check_no_cache(module, (*args, *kwargs.values()))
        found = self._rows(module, args, kwargs, rows, together)
        tensors = zip(tensors_in((args, kwargs)), found.given, strict=True)
        whole = {id(tensor) for tensor, is_rows in tensors if is_rows}
        joined = None
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            own = self._stated.for_slice(rows, stop - start, args, kwargs)
            slice_args, slice_kwargs = with_tensors(own, _Slice(whole, start, stop))
            output = call(*slice_args, **slice_kwargs)
            if joined is None:
                joined = _Joined(module, output, rows, stop, found.returned, averages=self._averages)
            joined.add(output, start, stop)
            del output  # or it would be in memory while the next slice is computed
        assert joined is not None  # noqa: S101 -- there are rows
        return joined.value

    def _rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, together: int
    ) -> Rows:
        form = form_of(args, kwargs, rows)
        if form not in self._known:
            call = Call(module, self._entry, args, kwargs, rows, together, self._stated)
            try:
                self._known[form] = call.find_rows(self._options.rows)
            except NotRowsError as error:
                raise HookcoreError(
                    f"slicing cannot split a call of {type(module).__name__}.{self._entry}() into rows: "
                    f"{error}. Name the arguments whose first dimension is the batch, as Slicing(rows=...), "
                    "or take slicing off"
                ) from error
        return self._known[form]


def _check_no_cache(module: nn.Module, values: Iterable[object]) -> None:
    """Refuse a cache among the arguments: slices would write into it one after the other, each as if alone.

    Raises:
        HookcoreError: There is one.
    """
    for value in values:
        if callable(getattr(value, "get_seq_length", None)):  # as all of transformers' have
            raise HookcoreError(
                f"slicing cannot split the {type(value).__name__} that {type(module).__name__} is given: "
                "keys and values of all rows are written into it. Call without a cache and with "
                "`use_cache=False`, which `model.generate` takes, too; or take slicing off"
            )


class _Slice:
    """Takes the rows of one slice out of the tensors with these ids."""

    def __init__(self, whole: set[int], start: int, stop: int) -> None:
        self._whole = whole
        self._range = slice(start, stop)

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor[self._range] if id(tensor) in self._whole else tensor


class _Joined:
    """What comes out for the whole batch, filled slice by slice, so that nothing is in memory twice.

    Args:
        module: Whose output it is, for messages.
        output: What the first slice has given.
        rows: Length of the batch.
        first: Length of the first slice.
        is_rows: Which of its tensors are rows; None: those that are as long as the slice.
        averages: Whether numbers in it are means over the rows.

    Attributes:
        value: The whole output.
    """

    def __init__(
        self,
        module: nn.Module,
        output: Any,
        rows: int,
        first: int,
        is_rows: tuple[bool, ...] | None,
        *,
        averages: bool,
    ) -> None:
        self._what = f"slicing cannot join what {type(module).__name__} returns"
        self._plain = plain_values_in(output)
        self._averages = averages
        self._whole: list[Tensor] = []
        self._is_split: list[bool] = []
        place = {}
        tensors = tensors_in(output)
        as_long = tuple(it.ndim > 0 and it.shape[0] == first for it in tensors)
        is_rows = as_long if is_rows is None else is_rows
        if len(is_rows) != len(tensors) or any(flag > it for flag, it in zip(is_rows, as_long, strict=True)):
            raise HookcoreError(f"{self._what}: it is not what a call without data returns")
        for tensor, is_split in zip(tensors, is_rows, strict=True):
            if is_split:
                place[id(tensor)] = _empty_like(tensor, rows)
            else:
                place[id(tensor)] = tensor.clone() if self._is_mean(tensor) else tensor
            self._whole.append(place[id(tensor)])
            self._is_split.append(is_split)
        self.value = with_tensors(output, lambda tensor: place[id(tensor)])

    def add(self, output: Any, start: int, stop: int) -> None:
        """Put the output of a slice in its place.

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
