"""The technique: which call is traced, and with what."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field, frozen

from hookcore import Binding, Claim, Phase, PlanError, Resource, Technique, bare_entry
from hookcore_plugins.trace.hook import TraceHook
from hookcore_plugins.trace.inputs import Inputs

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from attrs import Attribute

    from hookcore import Component

FROZEN_BELOW = (Resource.PLACEMENT, Resource.STORAGE_DTYPE, Resource.ATTENTION)
"""What others may not have below, where a trace makes no calls: weights would have to be there all at once,
and an attention backend would be in the trace for good."""

Examples = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]


def _examples(value: object) -> Examples:
    """Positional and named arguments."""
    if isinstance(value, torch.Tensor):
        return (value,), ()
    if isinstance(value, tuple):
        return value, ()
    if isinstance(value, dict):
        return (), tuple(value.items())
    raise TypeError(
        f"example_inputs is a {type(value).__name__}; give a tensor, a tuple of positional arguments, or a "
        "dict of arguments by name"
    )


def _as_value(examples: Examples) -> Hashable:
    """Examples in a form that can be compared and hashed."""
    return tuple(map(_leaf_value, torch.utils._pytree.tree_leaves(list(examples))))


def _leaf_value(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        data = None if leaf.is_meta else leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return tuple(leaf.shape), leaf.dtype, leaf.device, None if data is None else bytes(data.tolist())
    return repr(leaf)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


@frozen
class Trace(Technique):
    """Records the operations of one call with `torch.jit.trace`, and runs these in the place of the call.

    The traced call is fixed: a call with other shapes, dtypes or other arguments than the example's, or in
    training where the model was not, is not traced but runs as ever, and is counted. On another device, or
    with gradients where there were none, it is traced anew. Outputs have the class that they had, and the
    model keeps all its attributes.

    Hooks of modules below would be frozen into the trace and are refused.

    torch recommends `torch.compile` (the technique `compile`) or `torch.export` instead.

    Attributes:
        example_inputs: Arguments of a call: a tensor, a tuple of positional ones, or a dict by name. Where
            they lie on the model's device, and nothing else is on the model, the call is traced at once, or
            else when it is first made.
        entry: The method that is traced.
        path: A file for the trace: loaded if it is there, otherwise written once the call is traced. It holds
            no weights.
    """

    name: ClassVar[str] = "trace"
    phase: ClassVar[Phase] = Phase.COMPUTE
    encloses: ClassVar[bool] = True
    replans: ClassVar[bool] = True

    example_inputs: Examples = field(converter=_examples, eq=_as_value, repr=False)
    entry: str = field(default="forward", kw_only=True)
    path: Path | None = field(default=None, converter=_path, kw_only=True)

    @entry.validator
    def _check_entry(self, _attribute: Attribute[str], value: object) -> None:
        if not isinstance(value, str) or not value.isidentifier():
            raise ValueError(f"entry is {value!r}; give the name of a method, such as 'decode'")

    def bind(self, component: Component) -> Iterator[Binding]:
        """Lists one hook, at the entry.

        Raises:
            PlanError: There is no such entry, or the example does not fit it.
        """
        model = component.module
        if not callable(getattr(model, self.entry, None)):
            raise PlanError(f"{component.label('')!r} ({type(model).__name__}) has no method {self.entry!r}")
        args, kwargs = self.example_inputs
        try:
            signature = inspect.signature(bare_entry(model, self.entry))
            example = Inputs.of(signature, args, dict(kwargs))
        except TypeError as error:
            raise PlanError(
                f"example_inputs do not fit {type(model).__name__}.{self.entry}(): {error}"
            ) from error
        if not example.tensors:
            raise PlanError("example_inputs has no tensor, so that there is nothing to trace")
        hook = TraceHook(signature, example, self.entry, self.path)
        claims = (Claim(Resource.CODE), Claim(Resource.ATTENTION))
        yield Binding("", hook, self.entry, claims, forbids_below=FROZEN_BELOW, encloses=True)
