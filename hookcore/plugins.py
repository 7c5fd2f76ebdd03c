"""Finds the plugins, keeps blocked and broken ones out, and asks the others.

Hooks are called one plugin at a time rather than through pluggy's own call loop, so that an error can name
the plugin that it comes from. The order is pluggy's: `tryfirst` and `trylast`, and otherwise a plugin that
was found later is asked earlier, so that others can answer before hookcore's own.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.metadata
import inspect
import os
import threading
import traceback
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import pluggy
from attrs import evolve, frozen
from torch import nn

from hookcore import hookspecs
from hookcore.attention import AttentionFunction
from hookcore.conventions import ForeignMechanism, ModelConventions, OpenedTarget
from hookcore.errors import HookcoreError, HookcoreWarning, PluginError, has_origin
from hookcore.hookspecs import PROJECT
from hookcore.technique import Technique, check_complete
from hookcore.units import is_snake_case

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from importlib.metadata import EntryPoint
    from pathlib import Path

    import torch

    from hookcore.plan import Plan
    from hookcore.target import Component

ALLOW_LIST = "HOOKCORE_PLUGINS"
"""Environment variable: comma separated names of the only plugins to load; empty loads none."""
BLOCK_LIST = "HOOKCORE_DISABLED_PLUGINS"
"""Environment variable: comma separated names of plugins not to load; it wins over `ALLOW_LIST`."""


@frozen
class PluginInfo:
    """What is known about one plugin.

    Attributes:
        name: Name of its entry point, or a name that only an environment variable has.
        distribution: The distribution that declares it; None where none does, or it does not say.
        version: That distribution's version; None likewise.
        techniques: Names of the techniques that it brings; empty unless it is active.
        state: `"active"`; `"blocked"` by an environment variable, and not imported; `"broken"`, and wholly
            left out; `"not found"`, when an environment variable names it and no distribution has it.
        problem: Why it is not active, as a reason or a traceback; None when it is.
    """

    name: str
    distribution: str | None
    version: str | None
    techniques: tuple[str, ...] = ()
    state: Literal["active", "blocked", "broken", "not found"] = "active"
    problem: str | None = None


class PluginHost:
    """The plugins of one process and what they bring.

    Attributes:
        listing: Every plugin found or named: hookcore's own first, then by name, at the end the unknown.
        techniques: Name to class, of all active plugins; read-only.
        attention_functions: Name to function, of all active plugins; read-only.
    """

    listing: tuple[PluginInfo, ...]
    techniques: Mapping[str, type[Technique]]
    attention_functions: Mapping[str, AttentionFunction]

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._techniques: dict[str, type[Technique]] = {}
        self.techniques = MappingProxyType(self._techniques)
        self._attention_functions: dict[str, AttentionFunction] = {}
        self.attention_functions = MappingProxyType(self._attention_functions)
        self.listing = ()

    @classmethod
    def discover(cls) -> PluginHost:
        """Load every installed plugin that is not blocked. A broken one is listed and blocks nothing."""
        host = cls()
        allowed, disabled = _names_in(ALLOW_LIST), _names_in(BLOCK_LIST) or ()
        for found, entry_point in _installed():
            if found.name in disabled:
                info = evolve(found, state="blocked", problem=f"{BLOCK_LIST} names it")
            elif allowed is not None and found.name not in allowed:
                info = evolve(found, state="blocked", problem=f"{ALLOW_LIST} does not name it")
            else:
                info = host._load(found, entry_point)
            host.listing += (info,)
        installed = {info.name for info in host.listing}
        named_by = dict.fromkeys(disabled, BLOCK_LIST) | dict.fromkeys(allowed or (), ALLOW_LIST)
        for name, variable in named_by.items():
            if name not in installed:
                problem = f"{variable} names it, and no installed plugin does{_near(name, installed)}"
                host.listing += (PluginInfo(name, None, None, state="not found", problem=problem),)
        return host

    def technique(self, name: str) -> type[Technique]:
        """Look up a technique by its registered name.

        Raises:
            PluginError: No active plugin brings it.
        """
        if name in self.techniques:
            return self.techniques[name]
        message = f"no technique is named {name!r}{_near(name, self.techniques)}; "
        message += f"there are: {', '.join(sorted(self.techniques)) or 'none'}"
        if inactive := [f"{info.name} ({info.state})" for info in self.listing if info.state != "active"]:
            message += (
                f". These plugins are not active and may bring it: {', '.join(inactive)}; "
                "`hookcore plugins` says why"
            )
        raise PluginError(message)

    def open_target(self, target: object) -> OpenedTarget | None:
        """Ask what models an object holds; None when no plugin knows it.

        Raises:
            PluginError: A plugin failed, or returned neither an `OpenedTarget` nor a mapping.
            HookcoreError: A plugin refuses the object.
        """
        answers = self._answers("hookcore_open_target", _one(OpenedTarget, Mapping), target=target)
        answer: OpenedTarget | Mapping[str, nn.Module] | None = next(answers, None)
        return OpenedTarget(answer) if isinstance(answer, Mapping) else answer

    def describe(self, component: Component) -> ModelConventions:
        """Ask what the model's library declares about it, and merges the answers.

        Raises:
            PluginError: A plugin failed, or returned something else than `ModelConventions`.
            HookcoreError: A plugin refuses the model.
        """
        asked = self._answers(
            "hookcore_describe_model",
            _one(ModelConventions),
            model=component.module,
            modules=component.modules,
        )
        answers = list(asked)
        return functools.reduce(ModelConventions.merged, answers) if answers else ModelConventions()

    def find_foreign(self, component: Component) -> list[ForeignMechanism]:
        """Ask what else already changes calls in this tree.

        Raises:
            PluginError: A plugin failed, or returned something else than `ForeignMechanism`s.
            HookcoreError: A plugin refuses the model.
        """
        answers = self._answers(
            "hookcore_find_foreign",
            _several(ForeignMechanism),
            model=component.module,
            modules=component.modules,
        )
        return [mechanism for answer in answers for mechanism in answer]

    def review(self, plan: Plan) -> list[str]:
        """Ask for notes on a finished plan.

        Raises:
            PluginError: A plugin failed, or returned something else than strings.
            PlanError: A plugin refuses the plan.
        """
        answers = self._answers("hookcore_review_plan", _several(str), plan=plan)
        return [note for answer in answers for note in answer]

    def observe(self, event: str, /, **details: Any) -> None:
        """Tell what happened. A plugin that fails in it only causes a `HookcoreWarning`."""
        self._tell("hookcore_observe", event=event, details=MappingProxyType(details))

    def build_model(
        self, model_class: type[nn.Module], folder: Path, config_overrides: Mapping[str, Any]
    ) -> nn.Module | None:
        """Ask for a model made from the config in a folder; None when no plugin knows the class.

        Raises:
            PluginError: A plugin failed, or returned no module.
            HookcoreError: A plugin refuses the class, the folder or the overrides.
        """
        answers = self._answers(
            "hookcore_build_model",
            _one(nn.Module),
            model_class=model_class,
            folder=folder,
            config_overrides=config_overrides,
        )
        model: nn.Module | None = next(answers, None)
        return model

    def loading_dtypes(self, model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Ask what is loaded in another dtype than the one asked for, by regular expression.

        Raises:
            PluginError: A plugin failed, or returned no mapping.
            HookcoreError: A plugin refuses the model.
        """
        answers = self._answers("hookcore_loading_dtypes", _one(Mapping), model=model, dtype=dtype)
        return {pattern: kept for answer in answers for pattern, kept in answer.items()}

    def register_commands(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Let plugins add commands. One that fails in it only causes a `HookcoreWarning`."""
        self._tell("hookcore_register_commands", commands=subparsers)

    def _load(self, found: PluginInfo, entry_point: EntryPoint) -> PluginInfo:
        """Import and register one plugin; leave nothing of it when anything is wrong with it."""
        if self._manager.has_plugin(found.name):
            problem = f"plugin {_full_name(self._active(found.name))} has this name already"
            return evolve(found, state="broken", problem=problem)
        try:
            techniques, functions = self._register(found.name, entry_point)
        except (_RefusedError, pluggy.PluginValidationError) as error:
            problem = str(error)
        except (Exception, SystemExit):  # noqa: BLE001  # a broken plugin blocks nothing else
            problem = traceback.format_exc().rstrip()
        else:
            self._techniques.update(techniques)
            self._attention_functions.update(functions)
            return evolve(found, techniques=tuple(techniques))
        if self._manager.has_plugin(found.name):
            self._manager.unregister(name=found.name)
        return evolve(found, state="broken", problem=problem)

    def _active(self, name: str) -> PluginInfo:
        return next(info for info in self.listing if info.name == name and info.state == "active")

    def _register(
        self, name: str, entry_point: EntryPoint
    ) -> tuple[dict[str, type[Technique]], dict[str, AttentionFunction]]:
        """Register a plugin's hooks and return its techniques and attention functions by name.

        Raises:
            _RefusedError: Its techniques, functions or hooks are not as they have to be.
            PluginValidationError: Likewise, found by pluggy.
        """
        plugin = entry_point.load()
        if inspect.isclass(plugin):
            plugin = plugin()  # so that its hooks can be methods
        self._manager.register(plugin, name)
        self._manager.check_pending()
        callers = self._manager.get_hookcallers(plugin)
        if not callers:
            raise _RefusedError(
                f"{entry_point.value} has no hook; mark each implementation with @hookcore.hookimpl"
            )
        for caller in callers:
            if any(hook.wrapper or hook.hookwrapper for hook in caller.get_hookimpls()):
                raise _RefusedError(
                    f"{caller.name} is a hook wrapper; plugins are asked one at a time, so write a plain hook"
                )
        techniques: dict[str, type[Technique]] = {}
        for technique in self._brought(name, "hookcore_register_techniques"):
            _check_technique(technique)
            if technique.name in techniques or technique.name in self._techniques:
                raise _RefusedError(self._name_taken(technique))
            techniques[technique.name] = technique
        functions: dict[str, AttentionFunction] = {}
        for function in self._brought(name, "hookcore_register_attention_functions"):
            _check_attention_function(function)
            if function.name in functions or function.name in self._attention_functions:
                raise _RefusedError(
                    f"it brings an attention function {function.name!r}, and there is one of that name "
                    "already; give it another name"
                )
            functions[function.name] = function
        return techniques, functions

    def _brought(self, plugin: str, hook: str) -> Iterator[Any]:
        """Return what one plugin returns from a hook."""
        for implementation in self._hooks(hook):
            if implementation.plugin_name == plugin:
                yield from _call(implementation)

    def _name_taken(self, technique: type[Technique]) -> str:
        bringers = [_full_name(info) for info in self.listing if technique.name in info.techniques]
        return (
            f"{technique.__module__}.{technique.__qualname__} is named {technique.name!r}, and so is a "
            f"technique of {bringers[0] if bringers else 'this plugin itself'}; give it another name"
        )

    def _hooks(self, hook: str) -> list[pluggy.HookImpl]:
        """All implementations of a hook in the order of pluggy's calls, which is its list's backwards."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller.get_hookimpls()[::-1]

    def _answers(self, hook: str, read: Callable[[Any], Any], **arguments: Any) -> Iterator[Any]:
        """Ask one plugin after another, as far as the caller wants to know; None is no answer.

        Args:
            hook: Name of the hook.
            read: Checks an answer and takes it in, so that a generator's errors are the plugin's as well.
            **arguments: The hook's arguments.
        """
        for implementation in self._hooks(hook):
            try:
                answer = _call(implementation, **arguments)
                if answer is not None:
                    answer = read(answer)
            except HookcoreError:
                raise
            except Exception as error:
                if has_origin(error):  # of a technique that the plugin only looked at
                    raise
                raise PluginError(self._failure(implementation, hook, error)) from error
            if answer is not None:
                yield answer

    def _tell(self, hook: str, **arguments: Any) -> None:
        """Call a hook of every plugin whatever happens in it."""
        for implementation in self._hooks(hook):
            try:
                _call(implementation, **arguments)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # it becomes a warning
                message = self._failure(implementation, hook, error)
                if has_origin(error):  # of a technique that the plugin only looked at
                    message = "\n".join([f"{type(error).__name__}: {error}", *error.__notes__])
                # stacklevel: _tell, observe or register_commands, and then who called it.
                warnings.warn(message, HookcoreWarning, stacklevel=3)

    def _failure(self, implementation: pluggy.HookImpl, hook: str, error: BaseException) -> str:
        plugin = self._active(implementation.plugin_name)
        return (
            f"plugin {_full_name(plugin)} failed in {hook}: {type(error).__name__}: {error}. "
            f"Tell its authors, or leave it out: {BLOCK_LIST}={plugin.name}"
        )


@functools.cache
def _host() -> PluginHost:
    return PluginHost.discover()


# Reentrant, since a plugin may ask for the plugins while it is imported.
_discovering = threading.RLock()


def plugins() -> PluginHost:
    """The plugins of this process; discovered at the first call, and once."""
    with _discovering:
        return _host()


def attention_functions() -> Mapping[str, AttentionFunction]:
    """All ways to compute attention that plugins bring, by name."""
    return plugins().attention_functions


class _RefusedError(Exception):
    """A plugin is broken in a way that its message says in full, so that no traceback is needed."""


def _names_in(variable: str) -> tuple[str, ...] | None:
    """Read a comma separated environment variable; None where it is not set."""
    value = os.environ.get(variable)
    return None if value is None else tuple(filter(None, map(str.strip, value.split(","))))


def _installed() -> list[tuple[PluginInfo, EntryPoint]]:
    """All entry points of the group: hookcore's own, then others, each by name; the same every time."""
    found = [
        (_info(entry_point), entry_point) for entry_point in importlib.metadata.entry_points(group=PROJECT)
    ]
    return sorted(
        found,
        key=lambda pair: (
            pair[0].distribution != PROJECT,
            pair[0].name,
            pair[0].distribution or "",
            pair[1].value,
        ),
    )


def _info(entry_point: EntryPoint) -> PluginInfo:
    distribution = version = None
    if entry_point.dist is not None:
        # What an uninstall left behind may have entry points and no readable metadata.
        with contextlib.suppress(Exception):
            distribution, version = entry_point.dist.name, entry_point.dist.version
    return PluginInfo(entry_point.name, distribution, version)


def _full_name(plugin: PluginInfo) -> str:
    """Name, distribution and version, for messages."""
    origin = f"{plugin.distribution} {plugin.version}" if plugin.distribution else "an unknown distribution"
    return f"{plugin.name!r} of {origin}"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _check_technique(technique: object) -> None:
    """Refuse what is no technique class; most of what can be wrong with one is refused when it is made."""
    if not (inspect.isclass(technique) and issubclass(technique, Technique)):
        raise _RefusedError(f"{technique!r} is no technique: expected a subclass of hookcore.Technique")
    try:
        check_complete(technique)
    except TypeError as error:
        raise _RefusedError(str(error)) from None


def _check_attention_function(function: object) -> None:
    """Refuse what is no attention function, or one without a name in snake_case."""
    if not isinstance(function, AttentionFunction):
        raise _RefusedError(f"{function!r} is no hookcore.AttentionFunction")
    if not is_snake_case(function.name):
        raise _RefusedError(
            f"an attention function has the name {function.name!r}; expected snake_case, such as 'chunked'"
        )


def _call(implementation: pluggy.HookImpl, **arguments: Any) -> Any:
    """Call one implementation with as many of the arguments as it takes."""
    return implementation.function(*(arguments[name] for name in implementation.argnames))


def _one(*kinds: type[Any]) -> Callable[[object], Any]:
    """Make a reader of answers that have to be of one of some kinds."""

    def read(answer: object) -> object:
        if not isinstance(answer, kinds):
            expected = " or a ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"it returned {answer!r}, expected a {expected}")
        return answer

    return read


def _several(kind: type[Any]) -> Callable[[object], list[Any]]:
    """Make a reader of answers that have to hold any number of things of a kind."""
    read_item = _one(kind)

    def read(answer: object) -> list[Any]:
        # A lone string is iterable too, and no list of strings.
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise TypeError(f"it returned {answer!r}, expected several of {kind.__name__}")
        return [read_item(item) for item in answer]

    return read
