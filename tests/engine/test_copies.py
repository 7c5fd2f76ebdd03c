"""Copies and pickles of hooked models are plain models; the original stays hooked."""

import copy
import functools
import io
import pickle
import types
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from techniques import Moving, PushingHook, Recording, toy
from torch import nn
from torch.nn.utils import parametrizations

import hookcore
from hookcore import Binding
from hookcore.stack import HookStack
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import same_bits


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_torch}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def calling():
    """A technique whose hooks leave nothing on the module but themselves."""
    return [Recording(), Moving()]


def traces(model):
    """What hooks have left in the attributes of any module."""
    return [
        (fqn, name)
        for fqn, module in model.named_modules()
        for name, value in vars(module).items()
        if name in ("__reduce_ex__", "__deepcopy__", "forward", "encode", "decode")
        or "hookcore" in repr(type(value))
    ]


def assert_plain(copied, bare):
    assert traces(copied) == []
    assert [(fqn, list(vars(module))) for fqn, module in copied.named_modules()] == [
        (fqn, list(vars(module))) for fqn, module in bare.named_modules()
    ]


@ways
@given(case=module_trees(), layout=st.sampled_from(["model", "list", "dict", "child", "partial"]))
@settings(max_examples=30)
def test_a_copy_is_a_plain_model_that_computes_the_same_with_weights_of_its_own(way, case, layout):
    model, bare = case.build(), case.build()
    hookcore.apply(model, calling())
    wrapped = {
        "model": model,
        "list": [model, model],
        "dict": {"model": model},
        "child": nn.Sequential(nn.Identity(), model),
        "partial": partial(case.call, model),
    }[layout]
    copied = way(wrapped)
    copied = {
        "model": lambda: copied,
        "list": lambda: copied[0] if copied[0] is copied[1] else None,
        "dict": lambda: copied["model"],
        "child": lambda: copied[1],
        "partial": lambda: copied.args[0],
    }[layout]()
    assert_plain(copied, bare)
    hooked = hookcore.status(model).techniques
    assert hooked == ("moving", "recording")
    assert hookcore.status(copied).techniques == ()
    memory = {it.untyped_storage().data_ptr() for it in (*model.parameters(), *model.buffers())} - {0}
    assert memory.isdisjoint(
        it.untyped_storage().data_ptr() for it in (*copied.parameters(), *copied.buffers())
    )
    for entry in case.entries:
        expected = case.call(bare, entry)
        assert all(map(same_bits, case.call(copied, entry), expected))
        assert all(map(same_bits, case.call(model, entry), expected))
    hookcore.apply(copied, calling())
    hookcore.remove(copied)
    assert_plain(copied, bare)
    hookcore.remove(model)
    assert_plain(model, bare)


@given(module_trees())
@settings(max_examples=30)
def test_state_dicts_are_those_of_the_bare_model(case):
    model, bare = case.build(), case.build()
    hookcore.apply(model, calling())
    for entry in case.entries:
        case.call(model, entry)
        case.call(bare, entry)
    assert list(model.state_dict()) == list(bare.state_dict())
    assert all(map(same_bits, model.state_dict().values(), bare.state_dict().values()))
    fresh = case.build()
    fresh.load_state_dict(through_torch(model.state_dict()))
    assert all(map(same_bits, fresh.state_dict().values(), bare.state_dict().values()))


def test_a_shallow_copy_is_plain_and_shares_the_weights():
    model = nn.Linear(2, 2)
    hookcore.apply(model, calling())
    copied = copy.copy(model)
    assert_plain(copied, nn.Linear(2, 2))
    assert copied.weight is model.weight
    x = torch.ones(1, 2)
    assert torch.equal(copied(x), model(x))


@ways
def test_a_copy_has_the_callable_that_the_instance_itself_held(way):
    model = nn.Linear(2, 2)
    model.forward = partial(torch.mul, torch.tensor(3.0))
    hookcore.apply(model, calling())
    copied = way(model)
    assert type(vars(copied)["forward"]) is partial
    assert copied(torch.ones(2)).tolist() == [3, 3]


# Classes with a way of their own


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


class OwnDeepcopy(Plain):
    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


class ShallowDeepcopy(Plain):
    """Copies what it knows of, and takes the rest as it is."""

    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(vars(self))
        made._modules = copy.deepcopy(self._modules, memo)
        return made


class Single(Plain):
    """There is only one of it."""

    def __deepcopy__(self, memo):
        return self


class Exchanged(Plain):
    """Deep copies are of another kind."""

    def __deepcopy__(self, memo):
        return types.SimpleNamespace(inner=copy.deepcopy(self.inner, memo))


class OwnGetstate(Plain):
    def __getstate__(self):
        return {**vars(self), "version": 2}

    def __setstate__(self, state):
        assert state.pop("version") == 2
        super().__setstate__(state)


class NestedState(Plain):
    """Its state is no dictionary of attributes, but holds one."""

    def __getstate__(self):
        return [2, dict(vars(self))]

    def __setstate__(self, state):
        vars(self).update(state[1])


class OwnReduce(Plain):
    def __reduce__(self):
        return type(self), (), vars(self).copy()


class ReduceToArguments(Plain):
    """As torch.fx.GraphModule does: its attributes are an argument."""

    def __reduce__(self):
        return rebuild, (type(self), vars(self).copy())


def rebuild(kind, attributes):
    made = kind()
    vars(made).update(attributes)
    return made


class ReduceToName(Plain):
    def __reduce__(self):
        return "THE_ONLY"


THE_ONLY = ReduceToName()


class Slotted(Plain):
    __slots__ = ("extra",)

    def __init__(self):
        super().__init__()
        self.extra = "kept"

    def __getstate__(self):
        return vars(self), {"extra": self.extra}

    def __setstate__(self, state):
        super().__setstate__(state[0])
        self.extra = state[1]["extra"]


class OwnReduceEx(Plain):
    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol)


@ways
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(
    "kind",
    [Plain, OwnDeepcopy, ShallowDeepcopy, OwnGetstate, OwnReduce, ReduceToArguments, Slotted, OwnReduceEx],
)
def test_classes_with_a_way_of_their_own_are_copied_in_it_and_plain(kind, way, wrap):
    model, bare = kind(), kind()
    if wrap:
        for module in (model, bare):
            module.forward = partial(kind.forward, module)  # as accelerate and peft leave it
    bare.load_state_dict(model.state_dict())
    hookcore.apply(model, calling())
    copied = way(model)
    assert type(copied) is kind
    if not wrap:
        assert_plain(copied, bare)
    assert not any(isinstance(value, HookStack) for value in vars(copied).values())
    assert not {"__reduce_ex__", "__deepcopy__"} & vars(copied).keys()
    x = torch.ones(1, 2)
    expected = bare(x)
    assert torch.equal(copied(x), expected)
    if kind is Slotted:
        assert copied.extra == "kept"
    with torch.no_grad():
        copied.inner.weight.add_(1)
    assert torch.equal(model(x), expected)
    assert not torch.equal(copied(x), expected)  # also a forward in the instance runs on its own weights
    assert hookcore.status(model).techniques == ("moving", "recording")
    hookcore.remove(model)
    assert list(vars(model)) == list(vars(bare))


@ways
def test_a_state_that_hides_the_attributes_still_gives_a_copy_that_computes_the_same(way):
    model = NestedState()
    hookcore.apply(model, calling())
    copied = way(model)
    x = torch.ones(1, 2)
    assert torch.equal(copied(x), model(x))
    assert not any(isinstance(value, HookStack) for value in vars(copied).values())
    with torch.no_grad():
        copied.inner.weight.add_(1)
    assert not torch.equal(copied(x), model(x))


def test_what_is_not_copied_or_becomes_something_else_is_let_be():
    only, exchanged = Single(), Exchanged()
    hookcore.apply(only, calling())
    hookcore.apply(exchanged, calling())
    assert copy.deepcopy(only) is only
    assert HookStack.at(only, "forward") is not None
    assert type(copy.deepcopy(exchanged)) is types.SimpleNamespace
    hookcore.apply(THE_ONLY, calling())
    assert through_pickle(THE_ONLY) is THE_ONLY
    assert HookStack.at(THE_ONLY, "forward") is not None
    hookcore.remove(THE_ONLY)


@pytest.mark.parametrize(("first", "last"), [("forward", "extra_repr"), ("extra_repr", "forward")])
def test_copies_are_plain_until_the_last_hook_is_off_and_the_class_s_own_then(first, last):
    model = nn.Linear(2, 2)
    for entry in (first, last):
        HookStack.set(model, entry, [PushingHook(entry)])
    HookStack.set(model, first, [])
    assert_plain(copy.deepcopy(model), nn.Linear(2, 2))
    HookStack.set(model, last, [])
    assert "__reduce_ex__" not in vars(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_stays_when_somebody_has_put_another_forward_in_place_of_the_hooks(wrapped):
    model = nn.Linear(2, 2)
    HookStack.set(model, "forward", [PushingHook("")])
    model.forward = functools.wraps(model.forward)(lambda x: x) if wrapped else (lambda x: x)
    HookStack.set(model, "forward", [])
    del model.forward
    assert vars(model).keys() == vars(nn.Linear(2, 2)).keys()


def test_an_instance_with_a_reduction_of_its_own_keeps_it():
    model = nn.Linear(2, 2)
    model.__dict__["__reduce_ex__"] = own = lambda _protocol: (types.SimpleNamespace, ())
    applied = hookcore.apply(model, calling())
    assert type(copy.deepcopy(model)) is types.SimpleNamespace
    applied.remove()
    assert vars(model)["__reduce_ex__"] is own


def test_a_parametrized_module_is_copied_plain():
    """torch gives it a class of its own with a `__deepcopy__` that takes all attributes along."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    hookcore.apply(model, [Recording()])
    copied = copy.deepcopy(model)
    assert_plain(copied, parametrized())
    x = torch.ones(1, 2)
    assert torch.equal(copied(x), model(x))


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))


@ways
def test_a_graph_module_is_copied_plain(way):
    bare = torch.fx.symbolic_trace(Plain())
    model = copy.deepcopy(bare)
    hookcore.apply(model, [Recording()])
    copied = way(model)
    assert traces(copied) == []
    x = torch.ones(1, 2)
    assert torch.equal(copied(x), bare(x))
    assert torch.equal(model(x), bare(x))


def test_attributes_that_a_technique_leaves_on_a_module_are_its_own_business():
    """The engine takes away its own traces only: what attach put there is data like any other."""
    model = nn.Identity()
    hookcore.apply(model, [toy("marks", lambda _: [Binding("", PushingHook("mark"))])])
    assert copy.deepcopy(model)._pile == ["mark"]
    assert traces(copy.deepcopy(model)) == []
