"""The technique `AttentionBackend`: its options, its checks, and its bindings."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from attrs import field, frozen

import hookcore
from hookcore import Binding, Claim, Objection, Phase, PlanError, Resource, Skipped, Technique
from hookcore.memory import wanted_dtype
from hookcore_plugins.attention_backend.compiled import TraceableMethods
from hookcore_plugins.attention_backend.counts import AttentionCounts
from hookcore_plugins.attention_backend.discovery import AttentionModule, find_attention
from hookcore_plugins.attention_backend.dispatch import AttentionDispatch, refusal
from hookcore_plugins.attention_backend.hook import AttentionHook

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

    from hookcore import AttentionFunction, Component


def _patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@frozen
class AttentionBackend(Technique):
    """Computes the attention of one model, and of no other, by a backend of the user's choice.

    Code that calls `torch.nn.functional.scaled_dot_product_attention` during a call of one of the model's
    attention modules calls the backend instead: diffusers' processors, transformers' attention,
    `nn.MultiheadAttention`, and modules of the user's own. The libraries' own settings
    (`set_attention_backend`, `attn_implementation="eager"`) don't matter while the technique is applied.

    Attributes:
        backend: Name of the backend: "sdpa" (torch's own choice), "math", "flash", "efficient", "cudnn",
            "flex", "chunked", "xformers", "flash_attn", "sage", or a plugin's
            (`hookcore.attention_functions()`).
        fallback: Name of the backend that computes what the first one cannot; None to raise an error.
        modules: Regular expressions, searched in module FQNs: redirect attention only in calls of modules
            that match. None for all modules whose code names attention.

    Raises:
        TypeError: A name is not a string.
        ValueError: A pattern is not a regular expression, or the fallback is the backend itself.
    """

    name: ClassVar[str] = "attention_backend"
    phase: ClassVar[Phase] = Phase.COMPUTE
    replans: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("compile",)

    backend: str = field()
    fallback: str | None = field(default=None, kw_only=True)
    modules: tuple[str, ...] | None = field(default=None, converter=_patterns, kw_only=True)

    @backend.validator
    def _check_backend(self, _attribute: object, backend: object) -> None:
        if not isinstance(backend, str):
            raise TypeError(
                f"backend is the name of an attention backend, such as 'chunked', not {backend!r}"
            )

    @fallback.validator
    def _check_fallback(self, _attribute: object, fallback: object) -> None:
        if fallback is not None and not isinstance(fallback, str):
            raise TypeError(f"fallback is the name of an attention backend, such as 'math', not {fallback!r}")
        if fallback == self.backend:
            raise ValueError(f"fallback is {fallback!r}, which is the backend itself; name another one")

    @modules.validator
    def _check_modules(self, _attribute: object, patterns: tuple[Any, ...] | None) -> None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"modules has {pattern!r}, no regular expression: {error}") from error

    def skip_unless_named(self, component: Component) -> str | None:
        """Return why a component of a pipeline is left alone unless it is named: it has no attention."""
        found = list(find_attention(component, self.modules))
        if any(isinstance(item, AttentionModule) and item.computes for item in found):
            return None
        reasons = [item.reason for item in found if isinstance(item, Skipped)]
        return reasons[0] if reasons else "nothing in it calls torch's attention function"

    def bind(self, component: Component) -> Iterator[Binding | Skipped]:
        """Yield a hook for each module that computes attention.

        Raises:
            PlanError: No module or backend of that name exists, or the backend cannot be used here or with
                these modules, and there is no fallback that can.
        """
        known = hookcore.attention_functions()
        backend = _look_up(self.backend, known)
        fallback = None if self.fallback is None else _look_up(self.fallback, known)
        found = list(find_attention(component, self.modules))
        skipped = [item for item in found if isinstance(item, Skipped)]
        places = [item for item in found if isinstance(item, AttentionModule)]
        if not any(item.computes for item in places):
            raise PlanError(self._nothing(component, skipped))
        unavailable = _unavailable(backend)
        self._check(component, places, (backend, fallback))
        yield from skipped
        if unavailable is not None and self.fallback is not None:
            yield Skipped("", f"{unavailable.found}: {self.fallback!r} computes instead of {self.backend!r}")
        dispatch = AttentionDispatch(backend, fallback, unavailable, AttentionCounts(self.backend))
        methods = TraceableMethods(dispatch)
        for item in places:
            label = component.label(item.fqn)
            hook = AttentionHook(item, label, dispatch, methods, reports=item is places[0])
            claims = [Claim(Resource.ATTENTION)] if item.computes else []
            yield Binding(item.fqn, hook, item.entry, claims=claims)

    def _check(
        self,
        component: Component,
        places: list[AttentionModule],
        functions: tuple[AttentionFunction | None, ...],
    ) -> None:
        """Refuse modules whose weights show that no call of them can be computed."""
        for item in places:
            if not item.computes:
                continue
            module = component.modules[item.fqn]
            objections = []
            for function in filter(None, functions):
                objection = _unavailable(function) or _objection(function, module, item.head_size)
                if objection is None:
                    break
                objections.append((function, objection))
            else:
                raise PlanError(refusal(component.label(item.fqn), objections))

    def _nothing(self, component: Component, skipped: list[Skipped]) -> str:
        text = f"{self.name} finds nothing in {component.label('')!r} that calls torch's attention function"
        if self.modules is not None:
            return f"{text} and matches modules={self.modules!r}. Give a pattern that is found in an FQN"
        reasons = "; ".join(f"{component.label(item.fqn)!r}: {item.reason}" for item in skipped[:3])
        more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        return (
            f"{text}. "
            + (f"It skips {reasons}{more}. " if skipped else "")
            + "Name the modules that do, as modules=['attn'], or leave this component out"
        )


def _look_up(name: str, known: Mapping[str, AttentionFunction]) -> AttentionFunction:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known)
    guess = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    raise PlanError(f"no attention backend is named {name!r}{guess}; there are: {', '.join(sorted(known))}")


def _unavailable(function: AttentionFunction) -> Objection | None:
    """Return why a backend cannot be used in this process; None if it can."""
    missing = function.unavailable()
    if missing is None and function.devices is not None and not any(map(_is_here, function.devices)):
        return Objection(f"there is no device {' or '.join(map(repr, function.devices))} here")
    return missing


def _is_here(device: str) -> bool:
    if device == "cpu":
        return True
    try:
        return bool(torch.get_device_module(device).is_available())
    except (AttributeError, RuntimeError):  # this torch does not know such devices
        return False


def _objection(function: AttentionFunction, module: nn.Module, head_size: int | None) -> Objection | None:
    """Return why a backend cannot compute a module's attention, as far as its weights tell."""
    weights = [weight for weight in module.parameters() if weight.dtype.is_floating_point]
    for kind in {weight.device.type for weight in weights} - {"cpu", "meta"}:  # from there they may be moved
        if objection := function.objection_to_device(kind):
            return objection
    # Weights of one byte are cast before they are used.
    dtypes = {dtype for weight in weights if (dtype := wanted_dtype(weight)).itemsize > 1}
    if dtypes and not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        objections = [function.objection_to_dtype(dtype) for dtype in sorted(dtypes, key=str)]
        if all(objections):
            return objections[0]
    return None if head_size is None else function.objection_to_head_size(head_size)
