"""Which tensors of a call have the batch as their first dimension, shown by calls without data.

A copy of the model on the meta device is called with two other batch sizes. What is rows has to change with
the batch for the call to succeed; what is none has to stay. Where both succeed, nothing is known.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import MappingKey, tree_flatten_with_path, tree_leaves, tree_map, tree_map_only

from hookcore import skeleton_of
from hookcore_plugins.slicing.nested_tensors import plain_values_in, tensors_in, with_tensors

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from hookcore_plugins.slicing.row_arguments import RowArguments

_MOST_KEPT = 2
"""Tensors that are as long as the batch by chance, at most; more are not looked for."""


class NotRowsError(ValueError):
    """It is not known what a call's rows are; the text is a phrase for people."""


class CannotFollowError(NotRowsError):
    """A call fails where it is followed without data."""


@frozen
class Rows:
    """What of a call is rows.

    Attributes:
        given: For each distinct tensor among the arguments, whether it is.
        returned: The same for what comes out; None: each that is as long as the slice is.
    """

    given: tuple[bool, ...]
    returned: tuple[bool, ...] | None


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Hashable:
    """Return what calls have in common whose rows are the same arguments: all but sizes and numbers."""
    tensors = tuple((it.ndim, _is_as_long(it, rows)) for it in tensors_in((args, kwargs)))
    plain = (type(it) if type(it) in (int, float) else it for it in plain_values_in((args, kwargs)))
    return tensors, tuple(kwargs), tuple(plain)


@frozen
class Call:
    """A call whose rows are wanted.

    Attributes:
        module: What is called.
        entry: Which method of it.
        args: What it is called with.
        kwargs: Likewise.
        rows: Length of the batch.
        together: How many neighbouring rows are one item.
        stated: What the arguments say about rows.
    """

    module: nn.Module
    entry: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    together: int
    stated: RowArguments
    tensors: list[Tensor] = field(init=False)

    @tensors.default
    def _tensors_default(self) -> list[Tensor]:
        return tensors_in((self.args, self.kwargs))

    def find_rows(self, named: Iterable[str] | None) -> Rows:
        """Find what is rows.

        Args:
            named: Arguments in which all that is as long as the batch is rows; None: that is to be found.

        Raises:
            NotRowsError: That cannot be told, or slices would not make up the whole.
        """
        self._check_keys()
        alike = [number for number, it in enumerate(self.tensors) if _is_as_long(it, self.rows)]
        one, other = itertools.islice(self._sizes(), 2)
        if named is not None:
            given = self.stated.given(self.args, self.kwargs)
            inside = {id(it) for name in named for it in tensors_in(given.get(name))}
            chosen = frozenset(it for it in alike if id(self.tensors[it]) in inside)
            try:
                found = self._follow(chosen, one), self._follow(chosen, other)
            except CannotFollowError:
                return Rows(self._flags(chosen), None)
            return Rows(self._flags(chosen), self._returned(found, (one, other)))
        chosen, first = self._choose(alike, one)
        for number in sorted(chosen - {alike[0]}):
            if number in first.used and self._succeeds(chosen - {number}, one):
                raise NotRowsError(
                    f"it cannot be told whether {self._name(number)} is {self.rows} rows of the batch or the "
                    "same for all rows"
                )
        return Rows(self._flags(chosen), self._returned((first, self._follow(chosen, other)), (one, other)))

    def _choose(self, alike: list[int], size: int) -> tuple[frozenset[int], _Pass]:
        """The tensors that have to change with the batch, as few left out as possible."""
        try:
            return frozenset(alike), self._follow(frozenset(alike), size)
        except CannotFollowError as error:
            reason = error
        if not self._succeeds(frozenset(alike), self.rows):
            raise NotRowsError(f"it fails where it is followed without data ({reason})")
        for count in range(1, min(_MOST_KEPT, len(alike) - 1) + 1):
            for kept in itertools.combinations(alike[1:], count):
                chosen = frozenset(alike) - set(kept)
                try:
                    return chosen, self._follow(chosen, size)
                except CannotFollowError:
                    continue
        raise NotRowsError(
            f"it fails with {size} in the place of {self.rows} as the first dimension of "
            f"{self._name(alike[0])} ({reason})"
        )

    def _returned(self, passes: tuple[_Pass, _Pass], sizes: tuple[int, int]) -> tuple[bool, ...]:
        outputs = [it.output for it in passes]
        tensors = [tensors_in(it) for it in outputs]
        if len(tensors[0]) != len(tensors[1]) or plain_values_in(outputs[0]) != plain_values_in(outputs[1]):
            raise NotRowsError("what comes out differs with the batch in more than its tensors' rows")
        found = []
        for both in zip(*tensors, strict=True):
            shapes = [tuple(it.shape) for it in both]
            is_rows = [shape[:1] for shape in shapes] == [(size,) for size in sizes]
            if shapes[0][is_rows:] != shapes[1][is_rows:]:
                raise NotRowsError(
                    f"of what comes out, {shapes[0]} for {sizes[0]} rows and {shapes[1]} for {sizes[1]}, the "
                    "first dimension is no batch"
                )
            found.append(is_rows)
        return tuple(found)

    def _succeeds(self, chosen: frozenset[int], size: int) -> bool:
        try:
            self._follow(chosen, size)
        except CannotFollowError:
            return False
        return True

    def _follow(self, chosen: frozenset[int], size: int) -> _Pass:
        """Follow the call with another length of these tensors."""
        resized = {
            id(it): _resized(it, size if number in chosen else None) for number, it in enumerate(self.tensors)
        }
        args, kwargs = self.stated.for_slice(self.rows, size, self.args, self.kwargs)
        args, kwargs = with_tensors((args, kwargs), lambda it: resized[id(it)])
        # In containers of its own, into which it may write.
        args, kwargs = tree_map(lambda it: it, (args, kwargs))
        before = _contents((args, kwargs))
        following = _Following()
        try:
            model = skeleton_of(self.module)
            with torch.no_grad(), torch.device("cpu"), following:
                output = getattr(model, self.entry)(*args, **kwargs)
        except NotRowsError:
            raise
        except Exception as error:  # whatever a model raises
            raise CannotFollowError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
        if _contents((args, kwargs)) != before:
            raise NotRowsError(
                "it writes into what it is given, where slices would write one after the other"
            )
        used = {number for number, it in enumerate(self.tensors) if id(resized[id(it)]) in following.used}
        return _Pass(output, used)

    def _sizes(self) -> Iterator[int]:
        """Lengths of other batches: longer than whatever may be keyed by row, and no other dimension's."""
        lengths = [len(it) for it in plain_values_in((self.args, self.kwargs)) if isinstance(it, range)]
        dims = {size for tensor in self.tensors for size in tensor.shape}
        for items in itertools.count(max(self.rows // self.together, *lengths) + 1):
            if all(items % it for it in range(2, items)) and items * self.together not in dims:
                yield items * self.together

    def _check_keys(self) -> None:
        leaves, _ = tree_flatten_with_path((self.args, self.kwargs))
        for path, leaf in leaves:
            keys = [it.key for it in path if isinstance(it, MappingKey)]
            if isinstance(leaf, Tensor) and any(isinstance(it, int) for it in keys):
                raise NotRowsError(
                    f"it is given tensors under the numbers of a dict ({keys[-1]!r}), as of rows"
                )

    def _flags(self, chosen: frozenset[int]) -> tuple[bool, ...]:
        return tuple(number in chosen for number in range(len(self.tensors)))

    def _name(self, number: int) -> str:
        """Return what a tensor is called, by the argument that it is in."""
        wanted = self.tensors[number]
        for name, value in self.stated.given(self.args, self.kwargs).items():
            if any(it is wanted for it in tensors_in(value)):
                return repr(name)
        return "a tensor"


@frozen
class _Pass:
    """What a pass puts out, and the numbers of the tensors that it has computed with."""

    output: Any
    used: set[int]


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations without data, but for those on integers alone: a mask may decide what a call does.

    Attributes:
        used: Ids of the tensors that were computed with.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation on one device, whatever each tensor is on.

        Raises:
            NotRowsError: It draws random numbers.
        """
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRowsError(
                f"it draws random numbers ({func.overloadpacket.__name__}), which would be others for slices "
                "than for the whole batch; `model.eval()` turns dropout off"
            )
        given = [it for it in tree_leaves((args, kwargs)) if isinstance(it, Tensor)]
        self.used.update(map(id, given))
        if given:
            device = torch.device("meta" if any(it.is_meta for it in given) else "cpu")
            kwargs = {**kwargs, **({"device": device} if "device" in kwargs else {})}
            args, kwargs = tree_map_only(Tensor, lambda it: it.to(device), (args, kwargs))
        elif "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


def _contents(value: Any) -> tuple[list[int], list[object]]:
    return [id(it) for it in tensors_in(value)], plain_values_in(value)


def _is_as_long(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows


def _resized(tensor: Tensor, rows: int | None) -> Tensor:
    """A tensor with another number of rows, without data where that is no integers."""
    if tensor.is_floating_point() or tensor.is_complex():
        shape = tuple(tensor.shape) if rows is None else (rows, *tensor.shape[1:])
        dtype = tensor.dtype if tensor.is_complex() else torch.float32
        return torch.empty(shape, dtype=dtype, device="meta")
    own = tensor.detach().cpu()
    return own.clone() if rows is None else own[torch.arange(rows) % len(own)]
