"""Finds the modules of a model that compute attention, by the names in their code.

Planning calls no model. The code itself says which functions a module's forward names, which functions of its
class and package these name, and so on. Attention that is hidden better than that needs
`AttentionBackend(modules=...)`.
"""

from __future__ import annotations

import inspect
import re
import sys
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from torch import nn
from torch.nn import functional

from hookcore import Skipped
from hookcore_plugins.attention_backend.temporary_attribute import ChangedPart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hookcore import Component

_TORCH = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
_DIFFUSERS = "dispatch_attention_fn"
_TRANSFORMERS = "ALL_ATTENTION_FUNCTIONS"
_READS = "get_active_backend"
"""What code names that asks which of diffusers' backends is set, but for the code that computes by it."""

_NAMES = _TORCH | {_DIFFUSERS, _TRANSFORMERS, _READS}
_EXTRA = re.compile(r"softcap|sinks?(_|$)|s_aux")
"""Names of what transformers' own attention has beside masks: a cap of the scores, sinks beside the keys."""

_DEPTH = 4  # calls from a forward to what it names, as in forward -> processor -> helper

_FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""They may call a fused kernel instead of their submodules; torch does not while functions are overridden."""


@frozen
class AttentionModule:
    """A module that computes attention.

    Attributes:
        fqn: Its FQN.
        entry: The method that computes attention.
        computes: Whether the module itself computes attention; False if only modules in it do.
        changed_part: The part to change during the module's calls so that it calls torch's function, if any.
        reads_backend: Whether its library's code computes otherwise for other settings of the backend.
        head_size: Features of each head; None if the module doesn't tell.
    """

    fqn: str
    entry: str = "forward"
    computes: bool = True
    changed_part: ChangedPart | None = None
    reads_backend: bool = False
    head_size: int | None = field(default=None, eq=False)


def find_attention(
    component: Component, patterns: tuple[str, ...] | None
) -> Iterator[AttentionModule | Skipped]:
    """Yield the modules that compute attention, and those whose attention cannot be redirected.

    Args:
        component: Where to look.
        patterns: Regular expressions, searched in FQNs: take the modules that match, also if their code names
            no attention, unless a module around or inside them is taken. None for all modules that name it.
    """
    reader = _Reader()
    places: set[str] = set()
    unknown: list[str] = []
    for fqn, module in component.modules.items():
        if patterns is not None and not any(re.search(pattern, fqn) for pattern in patterns):
            continue
        entries = ("forward", *component.conventions.entries) if not fqn else ("forward",)
        reached = {entry: names for entry in entries if (names := reader.names(module, entry)) - {_READS}}
        for entry, names in reached.items():
            places.add(fqn)
            yield _described(component, fqn, module, entry, names)
        if reached:
            continue
        if isinstance(module, _FUSED):
            places.add(fqn)
            yield AttentionModule(fqn, computes=False)
        elif reason := _computes_otherwise(module):
            places.add(fqn)
            yield Skipped(fqn, reason)
        else:
            unknown.append(fqn)
    if patterns is None:
        return
    for fqn in unknown:  # the user knows more than the code tells
        module = component.modules[fqn]
        if type(module).forward is not nn.Module.forward and not any(_related(fqn, it) for it in places):
            places.add(fqn)
            yield AttentionModule(fqn, head_size=_head_size(module))


def _related(one: str, other: str) -> bool:
    """Return whether one of two modules is inside the other, or both are the same."""
    return not one or not other or f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _described(
    component: Component, fqn: str, module: nn.Module, entry: str, names: frozenset[str]
) -> AttentionModule | Skipped:
    changed_part: ChangedPart | Skipped | None = None
    if _TRANSFORMERS in names:
        changed_part = _of_transformers(component, fqn, module)
    elif _DIFFUSERS in names:
        changed_part = _of_diffusers(fqn, module)
    if isinstance(changed_part, Skipped):
        return changed_part
    reads = _READS in names and hasattr(getattr(module, "processor", None), "_attention_backend")
    if reads and (reason := set_backend(module)):
        return Skipped(fqn, reason)
    return AttentionModule(
        fqn, entry, changed_part=changed_part, reads_backend=reads, head_size=_head_size(module)
    )


def set_backend(module: nn.Module) -> str | None:
    """Return why attention that reads which of diffusers' backends is set cannot be redirected now."""
    dispatch = sys.modules["diffusers.models.attention_dispatch"]
    backend: Any = module.processor._attention_backend  # type: ignore[union-attr]
    if backend is None:
        backend, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    if backend == dispatch.AttentionBackendName.NATIVE:
        return None
    return (
        f"it computes otherwise for diffusers' backend {str(getattr(backend, 'value', backend))!r}, which is "
        "set: call model.set_attention_backend('native')"
    )


# Reading code


class _Reader:
    """Reads the code of each class once."""

    def __init__(self) -> None:
        self._known: dict[object, frozenset[str]] = {}

    def names(self, module: nn.Module, entry: str) -> frozenset[str]:
        """Return the names of attention that a module's method reaches."""
        key = type(module), entry, *(type(it) for it in _callables(module).values())
        if key not in self._known:
            method = getattr(type(module), entry, None)
            self._known[key] = frozenset(_reached(method, module, set(), _DEPTH))
        return self._known[key]


def _callables(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that have a `__call__` of their own.

    diffusers' attention processors are such attributes, and some of them are modules.
    """
    held = {**vars(module), **module._modules}
    return {
        name: value
        for name, value in held.items()
        if callable(value) and _is_written(type(value).__call__) and name not in vars(nn.Module)
    }


def _is_written(function: object) -> bool:
    """Return whether a function is Python code outside of torch and hookcore."""
    return isinstance(function, FunctionType) and not function.__module__.startswith(("torch.", "hookcore."))


def _reached(function: object, owner: object, seen: set[CodeType], depth: int) -> Iterator[str]:
    """Yield the names of attention in a function, and in the functions that it names.

    Args:
        function: The function.
        owner: The object whose methods and parts the attribute names in the code may be.
        seen: Code that was read before; added to.
        depth: How many calls to follow.
    """
    function = inspect.unwrap(function) if callable(function) else function
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return
    seen.add(function.__code__)
    named = set(_names_in(function.__code__))
    yield from named & _NAMES
    # torch's own modules name torch's functions, which is as far as there is to look.
    if not depth or function.__module__.startswith("torch."):
        return
    package = function.__module__.partition(".")[0]
    parts = _callables(owner) if isinstance(owner, nn.Module) else {}
    for name in named:
        if name in parts:
            part = parts[name]
            yield from _reached(type(part).__call__, part, seen, depth - 1)
            continue
        if name == "forward" or name not in vars(nn.Module):
            for kind in type(owner).__mro__:  # all of them, since a method may call that of its base
                yield from _reached(vars(kind).get(name), owner, seen, depth - 1)
        other = function.__globals__.get(name)
        if other is functional.scaled_dot_product_attention:  # imported by another name
            yield "scaled_dot_product_attention"
        if name == _DIFFUSERS:
            continue  # it asks which backend is set in order to compute by it
        if inspect.isfunction(other) and other.__module__.partition(".")[0] == package:
            yield from _reached(other, None, seen, depth - 1)


def _names_in(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function within the function
            yield from _names_in(constant)


# Libraries


def _of_transformers(component: Component, fqn: str, module: nn.Module) -> ChangedPart | Skipped | None:
    """Return the change that a module needs whose function comes from transformers' table."""
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if chosen in {None, "sdpa"}:
        return None
    if chosen != "eager":
        return Skipped(
            fqn,
            f"its attn_implementation is {chosen!r}, which takes other masks than torch's function: call "
            "model.set_attn_implementation('sdpa') before",
        )
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    parts = fqn.split(".")
    above = (component.modules.get(".".join(parts[:end])) for end in range(len(parts), -1, -1))
    model = next((it for it in above if isinstance(it, base)), None)
    if model is not None and not getattr(model, "_supports_sdpa", False):
        return Skipped(fqn, f"{type(model).__name__} has no way to compute attention but its own ('eager')")
    extra = next((name for name, value in _held(module) if value is not None and _EXTRA.search(name)), None)
    if extra is not None:
        return Skipped(fqn, f"it has {extra!r} change its scores, which torch's function cannot do")
    # Masks made for 'eager' are added to scores, which torch's function can do too.
    return ChangedPart("config", "_attn_implementation_internal", "sdpa")


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from vars(module).items()
    yield from module._parameters.items()
    yield from module._buffers.items()
    yield from module._modules.items()


def _of_diffusers(fqn: str, module: nn.Module) -> ChangedPart | Skipped | None:
    """Return the change that a module needs whose processor calls diffusers' table of backends."""
    processor = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    if getattr(processor, "_parallel_config", None) is not None:
        return Skipped(fqn, "diffusers splits its attention over several devices (context parallelism)")
    if (only := getattr(type(processor), "_attention_backend", None)) is not None:
        return Skipped(
            fqn,
            f"its processor, {type(processor).__name__}, computes attention by diffusers' backend {only!r} "
            "alone, with masks that no other takes",
        )
    native = sys.modules["diffusers.models.attention_dispatch"].AttentionBackendName.NATIVE
    # Over whatever model.set_attention_backend() has set, for this model or for the process.
    return ChangedPart("processor", "_attention_backend", native)


def _computes_otherwise(module: nn.Module) -> str | None:
    """Return why an attention module does not call torch's function; None for any other module."""
    processor = getattr(module, "processor", None)
    if processor is not None and callable(getattr(module, "set_processor", None)):
        kind = type(processor).__name__
        return (
            f"its processor, {kind}, computes attention in its own way: call model.set_attn_processor(...) "
            "with one that calls torch's function (AttnProcessor2_0) before"
        )
    return None


def _head_size(module: nn.Module) -> int | None:
    """Return the features of each head, under the names that torch, transformers and diffusers use."""
    for name in ("head_dim", "attention_head_size", "dim_head", "key_value_proj_dim"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    features, heads = getattr(module, "inner_dim", None), getattr(module, "heads", None)
    if isinstance(features, int) and isinstance(heads, int) and heads:
        return features // heads
    return None
