"""Which attachments belong together, and how long they live."""

import gc
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from techniques import Moving, Pushing, PushingHook, toy
from torch import nn

import hookcore
import hookcore_plugins
from hookcore import Binding, Hook, Phase
from hookcore.registry import HookRegistry


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5),
    st.data(),
)
@settings(max_examples=60)
def test_a_registry_holds_exactly_what_is_connected(edges, data):
    """Targets have two of six modules each; those that share one are connected, also through others."""
    parts = [nn.Identity() for _ in range(6)]
    targets = [nn.ModuleDict({"a": parts[a], "b": parts[b]}) for a, b in edges]
    for target in targets:
        target.forward = len  # an entry to hook
        hookcore.apply(target, [toy(f"t{id(target)}", lambda _: [Binding("", Hook())])])
    start = data.draw(st.integers(0, len(edges) - 1))
    reached = {start}
    while more := {
        index
        for index, edge in enumerate(edges)
        if index not in reached and any(set(edge) & set(edges[it]) for it in reached)
    }:
        reached |= more
    found = HookRegistry(hookcore.status(targets[start]).components).attachments
    assert [item.component.module for item in found] == [targets[index] for index in sorted(reached)]
    locks = {id(item.lock) for item in found}
    assert len(locks) == 1
    for target in targets:
        hookcore.remove(target)


def test_the_registry_finds_what_is_connected_through_others():
    """a-b and b-c share a module each: a change at a has to see what is on c."""
    parts = [nn.Identity() for _ in range(4)]
    targets = [nn.ModuleList(parts[index : index + 2]) for index in range(3)]
    far = nn.ModuleList([nn.Identity()])
    for target in (*targets, far):
        target.forward = len  # an entry to hook
        hookcore.apply(target, [toy(f"t{id(target)}", lambda _: [Binding("", Hook())])])
    found = HookRegistry(hookcore.status(targets[0]).components).attachments
    assert [item.component.module for item in found] == targets
    for target in (*targets, far):
        hookcore.remove(target)


def test_a_dropped_model_takes_its_techniques_with_it():
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    hookcore.apply(model, [Pushing(), Moving()])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("technique", [Pushing(), Moving(), hookcore_plugins.GroupOffload("cpu")])
def test_removing_leaves_no_cycles_for_the_garbage_collector(technique):
    """Thousands of objects for each model would wait for it, and be looked at by it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    hookcore.apply(model, [technique]).remove()  # the first time loads plugins
    gc.collect()
    hookcore.apply(model, [technique]).remove()
    assert gc.collect() == 0


def test_without_hooks_a_technique_is_on_as_long_as_its_handle_lives():
    model = nn.Identity()
    applied = hookcore.apply(model, [toy("idle")])
    assert hookcore.status(model).techniques == ("idle",)
    del applied
    gc.collect()
    assert hookcore.status(model).techniques == ()


def test_what_need_not_move_is_left_alone():
    """Only what stands outside of a change comes off for it, and only where something was prepared."""
    model, counts = nn.Identity(), []

    class Counting(PushingHook):
        def attach(self, module):
            counts.append(f"+{self.name}")
            super().attach(module)

        def detach(self, module):
            counts.append(f"-{self.name}")
            super().detach(module)

    def counting(name, phase):
        return toy(name, lambda _: [Binding("", Counting(name))], phase=phase)

    outer = hookcore.apply(model, [counting("outer", Phase.SPLIT)])
    inner = hookcore.apply(model, [counting("inner", Phase.COMPUTE)])
    middle = hookcore.apply(model, [counting("middle", Phase.CAST), toy("idle", phase=Phase.PLACE)])
    assert counts == ["+outer", "-outer", "+inner", "+outer", "-outer", "+middle", "+outer"]
    counts.clear()
    middle.remove()
    assert counts == ["-outer", "-middle", "+outer"]
    counts.clear()
    outer.remove()
    inner.remove()
    assert counts == ["-outer", "-inner"]
