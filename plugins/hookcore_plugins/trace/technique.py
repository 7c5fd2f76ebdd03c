"""The technique `Trace`: its options and its binding."""

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
"""Resources that no other technique may hold below, where a trace makes no calls: all weights have to be in
place at once, and an attention backend would stay in the trace for good."""

Examples = tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]


def _examples(value: object) -> Examples:
    """Return positional and named arguments."""
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
    """Return examples in a form that can be compared and hashed."""
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

    The trace serves calls with arguments like the example's: of the same shapes, dtypes and other values,
    whether they are given by position, by name or by default. Any other call runs without it, and is counted
    with the first difference. On another device, in training, or with gradients where there were none, the
    call is traced anew. Outputs keep their class, and the model all its attributes.

    Hooks of modules below would become part of the trace and are refused.

    torch recommends `torch.compile` (the technique `compile`) or `torch.export` instead.

    Attributes:
        example_inputs: Arguments of a call: a tensor, a tuple of positional ones, or a dict by name. If they
            lie on the model's device and nothing else is on the model, the call is traced at once, otherwise
            when it is first made.
        entry: The method to trace.
        path: A file for the trace, without weights: loaded if it exists, otherwise written when the call is
            traced. It holds TorchScript, which is a program: load only files that you trust.
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
        """Yield one hook, at the entry.

        Raises:
            PlanError: The entry does not exist, the example does not fit it, or the file's folder is missing.
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
        if self.path is not None and not self.path.parent.is_dir():
            raise PlanError(f"the folder of path='{self.path}' does not exist. Make it first")
        hook = TraceHook(signature, example, self.entry, self.path)
        claims = (Claim(Resource.CODE), Claim(Resource.ATTENTION))
        yield Binding("", hook, self.entry, claims, forbids_below=FROZEN_BELOW, encloses=True)
