"""What happens at one call, against an interpreter of hooks that is as plain as can be."""

import copy
import functools
import gc
import inspect
import linecache
import sys
import weakref

import pytest
from attrs import field, frozen
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from hookcore import Hook
from hookcore.stack import HookStack

STEPS = ("pre_forward", "around_before", "around_after", "post_forward")


class InjectedError(Exception):
    pass


class InjectedInterrupt(BaseException):
    """Stands for KeyboardInterrupt, which no `except Exception` catches."""


@frozen
class Behaviour:
    """What one hook does.

    Attributes:
        overrides: Which methods it brings itself.
        changes: Whether they return something new; None otherwise, where that is possible.
        calls: How often `around_forward` calls what is inside.
        swallows: Whether `around_forward` turns an error from inside into an output.
        fails: At which step it raises.
        on_error_fails: Whether `on_error` raises, too.
    """

    overrides: frozenset[str] = frozenset({"pre_forward", "post_forward", "around_forward", "on_error"})
    changes: bool = False
    calls: int = 1
    swallows: bool = False
    fails: str | None = None
    on_error_fails: bool = False


@frozen
class Scenario:
    """Hooks, outermost first, around an entry that may fail."""

    behaviours: tuple[Behaviour, ...] = field(converter=tuple)
    entry_fails: bool = False
    error: type[BaseException] = InjectedError


def behaviours():
    return st.builds(
        Behaviour,
        overrides=st.frozensets(
            st.sampled_from(["pre_forward", "post_forward", "around_forward", "on_error"])
        ),
        changes=st.booleans(),
        calls=st.sampled_from([1, 1, 1, 0, 2]),
        swallows=st.sampled_from([False, False, True]),
        fails=st.sampled_from([None, None, None, *STEPS]),
        on_error_fails=st.booleans(),
    )


def scenarios():
    return st.builds(
        Scenario,
        st.lists(behaviours(), max_size=5),
        entry_fails=st.booleans(),
        error=st.sampled_from([InjectedError, InjectedInterrupt]),
    )


class World:
    """What the hooks and the entry of a scenario do; used by the stack and by the reference alike.

    Values are strings that say what happened to them, so that an output tells its whole history.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.log: list[str] = []
        self.errors: list[BaseException] = []

    def fail(self, where: str) -> None:
        self.log.append(f"fail {where}")
        raise self.scenario.error(where)

    def entry(self, x, *, key="key"):
        self.log.append(f"entry {x} {key}")
        if self.scenario.entry_fails:
            self.fail("entry")
        return f"out({x},{key})"

    def pre(self, index, args, kwargs):
        behaviour = self.scenario.behaviours[index]
        self.log.append(f"pre {index} {args} {kwargs}")
        if behaviour.fails == "pre_forward":
            self.fail(f"pre {index}")
        return ((f"{args[0]}<{index}",), {"key": f"k{index}"}) if behaviour.changes else None

    def post(self, index, output):
        behaviour = self.scenario.behaviours[index]
        self.log.append(f"post {index} {output}")
        if behaviour.fails == "post_forward":
            self.fail(f"post {index}")
        return f"{output}>{index}" if behaviour.changes else None

    def around(self, index, call, args, kwargs):
        behaviour = self.scenario.behaviours[index]
        self.log.append(f"around {index} {args} {kwargs}")
        if behaviour.fails == "around_before":
            self.fail(f"around_before {index}")
        output = "not called"
        for _ in range(behaviour.calls):
            try:
                output = call(*((f"{args[0]}[{index}",) if behaviour.changes else args), **kwargs)
            except self.scenario.error:
                if not behaviour.swallows:
                    raise
                output = "swallowed"
        if behaviour.fails == "around_after":
            self.fail(f"around_after {index}")
        return f"{output}]{index}"

    def on_error(self, index, error):
        self.log.append(f"error {index} {error}")
        self.errors.append(error)
        if self.scenario.behaviours[index].on_error_fails:
            raise RuntimeError(f"on_error {index}")


def make_hook(world: World, index: int) -> Hook:
    methods = {
        "pre_forward": lambda self, module, args, kwargs: world.pre(index, args, kwargs),
        "post_forward": lambda self, module, output: world.post(index, output),
        "around_forward": lambda self, module, call, /, *args, **kwargs: world.around(
            index, call, args, kwargs
        ),
        "on_error": lambda self, module, error: world.on_error(index, error),
    }
    chosen = {name: methods[name] for name in world.scenario.behaviours[index].overrides}
    return type(f"Hook{index}", (Hook,), chosen)()


def interpret(world: World, index: int, args, kwargs):
    """The meaning of hooks: the one at `index` around all further ones around the entry."""
    if index == len(world.scenario.behaviours):
        return world.entry(*args, **kwargs)
    behaviour = world.scenario.behaviours[index]
    if "pre_forward" in behaviour.overrides:
        changed = world.pre(index, args, kwargs)
        if changed is not None:
            args, kwargs = changed
    try:
        if "around_forward" in behaviour.overrides:
            output = world.around(
                index, lambda *args, **kwargs: interpret(world, index + 1, args, kwargs), args, kwargs
            )
        else:
            output = interpret(world, index + 1, args, kwargs)
    except BaseException as error:
        if "on_error" in behaviour.overrides:
            try:
                world.on_error(index, error)
            except RuntimeError as another:
                error.add_note(f"hookcore: Hook{index}.on_error failed too: {another!r}")
        raise
    if "post_forward" in behaviour.overrides:
        changed = world.post(index, output)
        if changed is not None:
            output = changed
    return output


def outcome(call):
    """What a call came to, as plain values."""
    try:
        return "returned", call(), ()
    except BaseException as error:
        if not isinstance(error, (InjectedError, InjectedInterrupt)):
            raise
        return type(error).__name__, str(error), tuple(getattr(error, "__notes__", ()))


class Named(nn.Module):
    """Its forward is whatever the test says."""

    def __init__(self, world):
        super().__init__()
        self._world = world

    def forward(self, x, *, key="key"):
        """Says what it does."""
        return self._world.entry(x, key=key)


@given(scenarios())
@example(Scenario((Behaviour(), Behaviour(), Behaviour())))
@example(Scenario((Behaviour(calls=2), Behaviour(changes=True)), entry_fails=True))
def test_a_call_means_what_the_interpreter_says(scenario):
    real, reference = World(scenario), World(scenario)
    module = Named(real)
    HookStack.set(module, "forward", [make_hook(real, index) for index in range(len(scenario.behaviours))])
    assert outcome(lambda: module("x")) == outcome(lambda: interpret(reference, 0, ("x",), {}))
    assert real.log == reference.log
    # Once more: nothing of the first call, failed or not, is left.
    real.log.clear()
    reference.log.clear()
    assert outcome(lambda: module("y", key="z")) == outcome(
        lambda: interpret(reference, 0, ("y",), {"key": "z"})
    )
    assert real.log == reference.log


@given(st.lists(behaviours(), min_size=1, max_size=4), st.data())
def test_a_failure_at_any_step_tells_exactly_the_hooks_inside_of_which_the_call_was(behaviours, data):
    """Stated apart from the interpreter: each hook that was entered is left or told, and never both."""
    plain = [
        Behaviour(
            b.overrides | {"pre_forward", "post_forward", "on_error"}, fails=None, changes=b.changes, calls=1
        )
        for b in behaviours
    ]
    steps = [
        (index, step)
        for index, b in enumerate(plain)
        for step in STEPS
        if "around" not in step or "around_forward" in b.overrides
    ]
    where = data.draw(st.sampled_from([*steps, None]))
    if where is not None:
        index, step = where
        plain[index] = Behaviour(plain[index].overrides, changes=plain[index].changes, fails=step)
    scenario = Scenario(plain, entry_fails=where is None)
    world = World(scenario)
    module = Named(world)
    HookStack.set(module, "forward", [make_hook(world, index) for index in range(len(plain))])
    with pytest.raises(InjectedError) as caught:
        module("x")
    assert all(error is caught.value for error in world.errors)  # the exception itself, not a copy
    words = [line.split() for line in world.log]
    failed = next(word for word in words if word[0] == "fail")
    for index in range(len(plain)):
        entered = ["pre", str(index)] in [w[:2] for w in words] and failed[1:] != ["pre", str(index)]
        left = ["post", str(index)] in [w[:2] for w in words]
        told = ["error", str(index)] in [w[:2] for w in words]
        assert told == (entered and not left)
    told_in_order = [int(word[1]) for word in words if word[0] == "error"]
    assert told_in_order == sorted(told_in_order, reverse=True)


def test_an_interrupt_in_a_hook_ends_the_call_like_one_in_the_entry():
    world = World(Scenario([Behaviour(), Behaviour(fails="pre_forward")], error=KeyboardInterrupt))
    module = Named(world)
    HookStack.set(module, "forward", [make_hook(world, 0), make_hook(world, 1)])
    with pytest.raises(KeyboardInterrupt):
        module("x")
    assert world.log[-1] == "error 0 pre 1"


def test_an_interrupt_in_on_error_reaches_the_caller_after_all_hooks_were_told():
    world = World(Scenario([Behaviour(), Behaviour(), Behaviour()], entry_fails=True))
    hooks = [make_hook(world, index) for index in range(3)]
    told = type(hooks[1]).on_error

    def interrupted(self, module, error):
        told(self, module, error)
        raise KeyboardInterrupt

    type(hooks[1]).on_error = interrupted
    module = Named(world)
    HookStack.set(module, "forward", hooks)
    with pytest.raises(KeyboardInterrupt):
        module("x")
    assert [line.split()[1] for line in world.log if line.startswith("error")] == ["2", "1", "0"]


def test_an_interrupt_before_the_first_hook_tells_none():
    world = World(Scenario([Behaviour()]))
    module = Named(world)
    HookStack.set(module, "forward", [make_hook(world, 0)])

    def interrupt(frame, event, _):
        if frame.f_code is HookStack.__call__.__code__ and event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            if line.strip() == "for step in pre:":
                raise KeyboardInterrupt
        return interrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            module("x")
    finally:
        sys.settrace(before)
    assert world.log == []


class Silent(Hook):
    def pre_forward(self, module, args, kwargs):
        return None


class Autoencoder(nn.Module):
    """Has several entries, of which some call others."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def encode(self, x, scale: float = 1.0):
        """Encodes."""
        return [*x, f"encode*{scale}"]

    def decode(self, z, /, *more, flag=False, **options):
        """Decodes."""
        return [*z, "decode"]

    def forward(self, x):
        """Encodes and decodes."""
        return self.decode(self.encode(x))


ENTRIES = ("forward", "encode", "decode")


def instance_forwards():
    """What people put in an instance's `forward`, given the module."""
    return st.sampled_from(
        [
            lambda module: functools.partial(type(module).forward, module),
            lambda module: lambda x: type(module).forward(module, x),
            lambda module: functools.wraps(type(module).forward)(lambda x: type(module).forward(module, x)),
            lambda module: type(module).forward.__get__(module),
        ]
    )


@given(
    st.none() | instance_forwards(),
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from(ENTRIES), st.integers(0, 3)), max_size=8),
)
def test_vars_are_as_before_whatever_was_hooked_in_between(instance_forward, position, changes):
    module = Autoencoder()
    if instance_forward is not None:
        vars(module)["before"] = 1
        module.forward = instance_forward(module)
        vars(module)["after"] = 2
    before = list(vars(module).items())
    expected = module(["x"])
    for entry, count in changes:
        HookStack.set(module, entry, [Silent() for _ in range(count)])
        assert module(["x"]) == expected
    hooked = {entry for entry, count in dict(changes).items() if count}
    assert {entry for entry in ENTRIES if HookStack.at(module, entry)} == hooked
    for entry in ENTRIES:
        HookStack.set(module, entry, [])
    after = list(vars(module).items())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(now is then for (_, now), (_, then) in zip(after, before, strict=True))
    assert module(["x"]) == expected


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("count", [1, 3])
def test_name_documentation_and_signature_are_those_of_the_entry(entry, count):
    module, bare = Autoencoder(), Autoencoder()
    HookStack.set(module, entry, [Silent() for _ in range(count)])
    hooked, plain = getattr(module, entry), getattr(bare, entry)
    assert inspect.signature(hooked) == inspect.signature(plain)
    assert inspect.unwrap(hooked).__func__ is plain.__func__
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__func__"):
        assert getattr(hooked, name) == getattr(plain, name)
    assert hooked.__self__ is module
    with pytest.raises(AttributeError):
        _ = hooked.no_such_name


def test_each_entry_has_hooks_of_its_own():
    module, log = Autoencoder(), []

    def recording(name):
        return type(name, (Hook,), {"pre_forward": lambda self, module, args, kwargs: log.append(name)})()

    for entry in ENTRIES:
        HookStack.set(module, entry, [recording(entry)])
    module(["x"])
    module.decode(["x"])
    assert log == ["forward", "encode", "decode", "decode"]


def test_a_change_of_hooks_during_a_call_takes_effect_at_the_next_one():
    log = []

    class Changing(nn.Module):
        def forward(self, x):
            HookStack.set(self, "forward", [recording("new"), recording("newer")])
            return x

    def recording(name):
        return type(
            name,
            (Hook,),
            {
                "pre_forward": lambda self, module, args, kwargs: log.append(f"pre {name}"),
                "post_forward": lambda self, module, output: log.append(f"post {name}"),
            },
        )()

    module = Changing()
    HookStack.set(module, "forward", [recording("old")])
    module(1)
    assert log == ["pre old", "post old"]
    log.clear()
    module(1)
    assert log == ["pre new", "pre newer", "post newer", "post new"]


def test_who_kept_the_forward_of_a_hooked_module_runs_no_hook_after_removal():
    world = World(Scenario([Behaviour()]))
    module = Named(world)
    HookStack.set(module, "forward", [make_hook(world, 0)])
    kept = module.forward
    HookStack.set(module, "forward", [])
    assert kept("x") == "out(x,key)"
    assert world.log == ["entry x key"]


@pytest.mark.parametrize("hooks", [0, 1])
def test_hooks_are_found_inside_what_another_library_wrapped_round_them(hooks):
    """As accelerate does: it puts a wrapper in `forward` and keeps what was there in `_old_forward`."""
    world = World(Scenario([Behaviour(overrides={"pre_forward"})] * 2))
    module = Named(world)
    before = list(vars(module))
    HookStack.set(module, "forward", [make_hook(world, 0)])
    old = module.forward
    module.forward = functools.wraps(old)(lambda x: f"wrapped {old(x)}")
    HookStack.set(module, "forward", [make_hook(world, 1)] * hooks)
    assert module("x") == "wrapped out(x,key)"
    assert [line[:5] for line in world.log] == ["pre 1"] * hooks + ["entry"]
    if hooks:
        module.forward = old  # what accelerate does when it takes its wrapper off
    else:
        del module.forward
    HookStack.set(module, "forward", [])
    assert list(vars(module)) == before


def test_a_stack_of_another_module_is_not_taken_for_its_own():
    """As `DataParallel.replicate` does: it copies the attributes of a module to another object."""
    world = World(Scenario([Behaviour(overrides={"pre_forward"})]))
    module, other = Named(world), Named(world)
    HookStack.set(module, "forward", [make_hook(world, 0)])
    other.forward = module.forward
    assert HookStack.at(other, "forward") is None


def test_hooks_and_what_they_need_live_as_long_as_the_stack_and_no_longer():
    class Needed:
        pass

    module, needed, hook = Named(World(Scenario([]))), Needed(), Silent()
    gone = weakref.ref(needed), weakref.ref(hook)
    HookStack.set(module, "forward", [hook], owners=[needed])
    del needed, hook
    gc.collect()
    assert all(reference() is not None for reference in gone)
    HookStack.set(module, "forward", [])
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_a_hooked_model_that_is_dropped_is_freed():
    module = Named(World(Scenario([])))
    HookStack.set(module, "forward", [Silent()])
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_methods_that_are_not_overridden_are_not_called():
    """The base class would fail: its around_forward raises. And an empty hook changes nothing."""
    world = World(Scenario([]))
    module = Named(world)
    HookStack.set(module, "forward", [Hook(), Hook()])
    assert module("x") == "out(x,key)"


def test_the_base_of_all_hooks_does_nothing():
    hook, module = Hook(), nn.Identity()
    before = copy.copy(vars(module))
    hook.attach(module)
    hook.detach(module)
    hook.reset(module)
    assert hook.pre_forward(module, (), {}) is None
    assert hook.post_forward(module, 1) is None
    assert hook.on_error(module, ValueError()) is None
    assert hook.loss_on_detach(module) is None
    assert hook.report(module) == {}
    assert vars(module) == before


def test_all_eight_kinds_of_hooks_are_in_the_right_order():
    """By hand, once, so that the order can be read: A and B outside, C nests, D inside."""
    log = []

    def hook(name, *methods):
        made = {
            "pre_forward": lambda self, module, args, kwargs: log.append(f"pre {name}"),
            "post_forward": lambda self, module, output: log.append(f"post {name}"),
            "around_forward": lambda self, module, call, /, *args, **kwargs: (
                log.append(f"before {name}"),
                call(*args, **kwargs),
                log.append(f"after {name}"),
            )[1],
        }
        return type(name, (Hook,), {method: made[method] for method in methods})()

    module = nn.Identity()
    HookStack.set(
        module,
        "forward",
        [
            hook("A", "pre_forward", "post_forward"),
            hook("B", "post_forward"),
            hook("C", "pre_forward", "around_forward", "post_forward"),
            hook("D", "pre_forward"),
            hook("E", "around_forward"),
        ],
    )
    assert module(7) == 7
    assert log == [
        "pre A", "pre C", "before C", "pre D", "before E", "after E", "after C", "post C", "post B", "post A",
    ]  # fmt: skip
    assert len(HookStack.at(module, "forward").hooks) == 5
