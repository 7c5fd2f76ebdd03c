"""What has to be known of an operator to run it on the simulated device: all from its schema."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

if TYPE_CHECKING:
    from torch._ops import OpOverload

FlopCount = Callable[[Any, torch.Tensor], float]

# Indices and masks may lie on the CPU, as on a real device.
_INDEXING = ("aten::index", "aten::_index_put", "aten::_unsafe_index")
_UNINITIALISED = ("aten::empty", "aten::new_empty")


def _matrix_product(position: int) -> FlopCount:
    return lambda args, out: 2.0 * out.numel() * args[position].size(-1)


_FLOPS: dict[str, FlopCount] = {
    "aten::mm": _matrix_product(0),
    "aten::bmm": _matrix_product(0),
    "aten::addmm": _matrix_product(1),
    "aten::baddbmm": _matrix_product(1),
    "aten::convolution": lambda args, out: 2.0 * out.numel() * args[1].numel() / args[1].size(0),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (
        lambda args, out: 4.0 * out.numel() * args[1].size(-2)
    ),
}


@frozen(eq=False)
class OperatorFacts:
    """What a kernel needs to know of an operator.

    Attributes:
        name: As torch writes it.
        names: Names of its arguments, in order.
        written: Names of the arguments that it changes.
        tensors: Names of the arguments that are tensors, or may have some in them.
        results: For each result, the position and name of the argument that it is; None for a new tensor.
        is_view: Whether it only looks at memory in another way.
        is_out: Whether it resizes what it writes to.
        is_indexing: Whether indices and masks may lie on the CPU.
        is_uninitialised: Whether it makes tensors without values.
        has_result_on_host: Whether the host has to know values to go on, and so waits for the stream.
        takes_numbers: Whether it can be called with a number for a tensor.
        flops: Counts its operations, from its arguments and its first result; None for few.
    """

    name: str
    names: tuple[str, ...]
    written: frozenset[str]
    tensors: frozenset[str]
    results: tuple[tuple[int, str] | None, ...]
    is_view: bool
    is_out: bool
    is_indexing: bool
    is_uninitialised: bool
    has_result_on_host: bool
    takes_numbers: bool
    flops: FlopCount | None


@functools.cache
def facts_of(operator: OpOverload) -> OperatorFacts:
    """Read an operator's schema."""
    schema = operator._schema
    written = [it for it in schema.arguments if it.alias_info is not None and it.alias_info.is_write]
    is_indexing = schema.name.startswith(_INDEXING)
    value_dependent = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return OperatorFacts(
        name=str(operator),
        names=tuple(it.name for it in schema.arguments),
        written=frozenset(it.name for it in written),
        tensors=frozenset(it.name for it in schema.arguments if "Tensor" in str(it.type)),
        results=tuple(_argument_returned(schema, it) for it in schema.returns),
        is_view=any(it.alias_info is not None and not it.alias_info.is_write for it in schema.returns),
        is_out=any(it.kwarg_only for it in written),
        is_indexing=is_indexing,
        is_uninitialised=schema.name.startswith(_UNINITIALISED),
        has_result_on_host=not is_indexing and not value_dependent.isdisjoint(operator.tags),
        takes_numbers=torch._C._should_allow_numbers_as_tensors(schema.name.partition("::")[2]),
        flops=_FLOPS.get(schema.name),
    )


def _argument_returned(schema: Any, result: Any) -> tuple[int, str] | None:
    """The argument that an in-place operator gives back as its result."""
    if result.alias_info is None or not result.alias_info.is_write:
        return None
    for position, argument in enumerate(schema.arguments):
        alias = argument.alias_info
        if alias is not None and alias.before_set & result.alias_info.before_set:
            return position, argument.name
    return None
