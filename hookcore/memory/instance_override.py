"""Override members of a class for one instance.

A property, and a special method, can be answered for one instance only by its class. So the instance gets a
subclass of its class, under the same name, for as long as that is wanted.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn


def models_with(name: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Those modules whose class has a property of this name, by FQN."""
    kinds = {type(module) for module in modules.values()}  # few, of thousands of modules
    having = {it for it in kinds if isinstance(inspect.getattr_static(it, name, None), property)}
    return ((fqn, module) for fqn, module in modules.items() if type(module) in having)


def override_members(model: nn.Module, members: Mapping[str, Callable[..., Any]]) -> None:
    """Put a subclass of its class in the place of a model's class.

    Copies and pickles of the model are of the class that it had. The two classes compare equal, since
    diffusers' `from_pipe` asks for `type(model) in (A, B)`.

    Args:
        model: The model.
        members: What the model answers otherwise, by the name of a property or method of its class: a
            function that is given the model, the class's own function, and the arguments. Other instances of
            the subclass, as `type(model)(...)` makes them, answer as if there was none.
    """
    own_class: Any = type(model)
    reference = weakref.ref(model)

    def reduce(self: nn.Module, protocol: int) -> Any:
        # A copy or a pickle of the model is of its own class. From protocol 2 on, pickle insists that what
        # it makes is of the present one.
        reduced = own_class.__reduce_ex__(self, min(protocol, 1))
        if not isinstance(reduced, tuple):
            return reduced
        make, arguments, *rest = reduced
        return make, tuple(own_class if item is type(self) else item for item in arguments), *rest

    names: dict[str, Any] = {
        "__module__": own_class.__module__,
        "__qualname__": own_class.__qualname__,
        "__doc__": own_class.__doc__,
        "__reduce_ex__": reduce,
    }
    for name, function in members.items():
        names[name] = _answer(inspect.getattr_static(own_class, name), function, reference)
    answering: type[nn.Module] = _equal_to(own_class)(own_class.__name__, (own_class,), names)
    object.__setattr__(model, "__class__", answering)


def restore_class(model: nn.Module) -> None:
    """Give a model the class that it had before the last `override_members`."""
    object.__setattr__(model, "__class__", type(model).__bases__[0])


def call_own_to(
    model: nn.Module, own: Callable[..., nn.Module], *, non_blocking: bool, **options: Any
) -> nn.Module:
    """Call the `to` of a model's own class with those options that are not None, if there are any."""
    kept = {name: value for name, value in options.items() if value is not None}
    return own(model, non_blocking=non_blocking, **kept) if kept else model


def _answer(attribute: Any, function: Callable[..., Any], reference: weakref.ref[nn.Module]) -> Any:
    """Put a function in the place of a property or a method, for one instance."""
    is_property = isinstance(attribute, property)
    own: Any = attribute.fget if is_property else attribute

    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, own, *args, **kwargs) if self is reference() else own(self, *args, **kwargs)

    answer.__doc__ = own.__doc__
    return property(answer) if is_property else answer


def _equal_to(own_class: Any) -> Any:
    """A metaclass whose classes are equal to the given one."""
    metaclass: Any = type(own_class)

    def equal(cls: type, other: object) -> Any:
        return cls is other or own_class == other

    def hashed(_cls: type) -> int:
        return hash(own_class)

    return type(metaclass.__name__, (metaclass,), {"__eq__": equal, "__hash__": hashed})
