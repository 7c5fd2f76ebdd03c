"""Which tensors move together, and who needs them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hookcore import Component, ModelConventions, PlanError
from hookcore.memory import find_blocks, leaf_units, make_groups, merge_neighbours, slots_below
from hookcore.testing.modules import module_trees

UNTIMED = settings(deadline=None)


def component_of(module: nn.Module, **conventions) -> Component:
    return Component("", module, lambda _: ModelConventions(**conventions))


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(2, 2) for _ in range(count)]


class Holding(nn.Module):
    """Children under names of one's choice."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Block(Holding):
    pass


LEVELS = st.sampled_from(["block", "leaf"])


def units_of(component: Component, level: str, size: int = 1):
    return merge_neighbours(find_blocks(component), size) if level == "block" else leaf_units(component)


@UNTIMED
@given(module_trees(), LEVELS, st.integers(1, 3))
def test_every_tensor_is_in_one_group_and_held_by_a_call_around_each_of_its_places(case, level, size):
    component = component_of(case.build(), entries=case.entries)
    groups = make_groups(component, units_of(component, level, size), component.slots)
    assert sorted(slot.name for group in groups for slot in group.slots) == sorted(
        slot.name for slot in component.slots
    )
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        holders = {component.module.get_submodule(fqn): entry for fqn, entry in group.holders}
        # Entries hold all or nothing, and whatever else holds is called by its own forward.
        assert {entry for fqn, entry in group.holders if not fqn} in (set(), set(case.entries))
        assert all(entry == "forward" for fqn, entry in group.holders if fqn)
        for fqn in (fqn for slot in group.slots for fqn in slot.fqns):
            path = fqn.split(".")[:-1]
            above = {component.module.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)}
            assert above & set(holders)


@UNTIMED
@given(module_trees())
def test_at_leaf_level_a_group_holds_no_more_than_one_leaf(case):
    component = component_of(case.build())
    for group in make_groups(component, leaf_units(component), component.slots):
        tops = {component.module.get_submodule(fqn) for fqn, _ in group.holders}
        whole = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        for slot in group.slots:
            owners = {owner for owner, _ in slot.owners}
            assert owners & tops or any(isinstance(top, whole) for top in tops)


def test_declared_modules_come_before_all_other_rules():
    model = Holding(
        a=nn.ModuleList(linears(2)), b=Holding(many=nn.ModuleList(linears(2)), one=nn.Linear(2, 2)), c=Block()
    )
    component = component_of(model, group_modules=("a", "b", "no_such"), block_classes=("Block",))
    # The lists in a declared module are blocks, as in diffusers.
    assert find_blocks(component) == (("a.0", "a.1"), ("b",), ("b.many.0", "b.many.1"))


def test_declared_classes_are_blocks_and_only_the_outermost_ones():
    model = Holding(
        one=Block(inner=Block(l=nn.Linear(2, 2))),
        stage=Holding(x=Block(l=nn.Linear(2, 2)), y=Block(l=nn.Linear(2, 2))),
        empty=Block(),
        other=nn.ModuleList(linears(3)),
    )
    assert find_blocks(component_of(model, block_classes=("Block",))) == (("one",), ("stage.x", "stage.y"))


def test_elements_of_the_outermost_containers_are_blocks():
    model = Holding(
        single=nn.Sequential(nn.Sequential(*linears(2))),
        deep=Holding(layers=nn.ModuleDict({"p": nn.Sequential(*linears(2)), "q": nn.Linear(2, 2)})),
        quiet=nn.Sequential(nn.ReLU(), nn.Linear(2, 2)),
    )
    assert find_blocks(component_of(model)) == (
        ("single.0.0", "single.0.1"),
        ("deep.layers.p", "deep.layers.q"),
        ("quiet.1",),
    )


def test_a_list_in_a_list_is_no_block_since_nobody_calls_it():
    model = Holding(
        blocks=nn.ModuleList([nn.ModuleList(linears(2)), nn.Linear(2, 2), nn.ModuleList(linears(1))])
    )
    assert find_blocks(component_of(model)) == (
        ("blocks.0.0", "blocks.0.1"),
        ("blocks.2.0",),
        ("blocks.1",),
    )


def test_siblings_of_one_class_are_blocks_where_there_are_no_containers():
    model = Holding(
        stem=nn.LayerNorm(2), body=Holding(a=Block(l=nn.Linear(2, 2)), b=Block(l=nn.Linear(2, 2)))
    )
    assert find_blocks(component_of(model)) == (("body.a", "body.b"),)
    assert find_blocks(component_of(Holding(a=nn.ReLU(), b=nn.ReLU(), c=nn.Linear(2, 2)))) == ()


def test_a_block_that_stands_twice_is_one_block():
    block = nn.Linear(2, 2)
    component = component_of(nn.Sequential(block, nn.Linear(2, 2), block))
    assert find_blocks(component) == (("0", "1"),)
    (first, second) = make_groups(component, merge_neighbours(find_blocks(component), 1), component.slots)
    assert first.holders == (("0", "forward"),)
    assert second.holders == (("1", "forward"),)


@given(st.lists(st.integers(1, 7), max_size=4), st.integers(1, 8))
def test_only_neighbours_in_one_container_are_merged(lengths, size):
    runs = [tuple(f"{which}.{index}" for index in range(length)) for which, length in enumerate(lengths)]
    units = merge_neighbours(runs, size)
    assert [fqn for unit in units for fqn in unit] == [fqn for run in runs for fqn in run]
    for unit in units:
        assert len({fqn.split(".")[0] for fqn in unit}) == 1
    for run in runs:
        sizes = [len(unit) for unit in units if unit[0] in run]
        assert all(it == size for it in sizes[:-1])
        assert 1 <= sizes[-1] <= size


def test_leaves_that_read_their_children_are_whole():
    model = Holding(
        attention=nn.MultiheadAttention(2, 1),
        encoder=nn.TransformerEncoderLayer(2, 1, 4),
        decoder=nn.TransformerDecoderLayer(2, 1, 4),
        plain=nn.Linear(2, 2),
    )
    assert leaf_units(component_of(model)) == (("attention",), ("encoder",), ("decoder",), ("plain",))


def test_modules_that_read_their_children_are_not_divided_into_blocks():
    assert find_blocks(component_of(nn.TransformerEncoderLayer(2, 1, 4))) == ()


def test_tensors_of_what_is_never_called_belong_to_the_module_above():
    class Reader(Holding):
        pass

    model = Holding(reader=Reader(scales=nn.ParameterList([torch.ones(2)]), inner=nn.Linear(2, 2)))
    assert leaf_units(component_of(model)) == (("reader",), ("reader.inner",))


def test_what_two_blocks_share_is_a_group_of_its_own_that_both_hold():
    model = nn.Sequential(*linears(3))
    model[2].weight = model[0].weight
    component = component_of(model)
    groups = make_groups(component, merge_neighbours(find_blocks(component), 1), component.slots)
    assert {group.name: [slot.name for slot in group.slots] for group in groups} == {
        "0 & 2": ["0.weight"],
        "0": ["0.bias"],
        "1": ["1.weight", "1.bias"],
        "2": ["2.bias"],
    }
    assert groups[0].holders == (("0", "forward"), ("2", "forward"))


def test_what_is_outside_of_all_blocks_is_held_by_the_entries():
    class Model(Holding):
        def encode(self, x):
            return x

    model = Model(stem=nn.Linear(2, 2), blocks=nn.ModuleList(linears(2)))
    component = component_of(model, entries=("forward", "encode", "no_such"))
    groups = make_groups(component, merge_neighbours(find_blocks(component), 2), component.slots)
    assert [(group.name, group.holders) for group in groups] == [
        ("the rest", (("", "forward"), ("", "encode"))),
        ("blocks.0..blocks.1", (("blocks.0", "forward"), ("blocks.1", "forward"))),
    ]
    assert groups[0].nbytes == 4 * 6
    assert groups[1].nbytes == 2 * 4 * 6


@UNTIMED
@given(module_trees(), st.data())
def test_slots_below_are_those_that_the_modules_register(case, data):
    component = component_of(case.build())
    names = data.draw(st.sets(st.sampled_from([fqn for fqns in component.fqns.values() for fqn in fqns])))
    below = {
        tensor
        for name in names
        for module in [component.module.get_submodule(name)]
        for tensor in (*module.parameters(), *module.buffers())
    }
    assert {tensor for slot in slots_below(component, names) for tensor in slot.tensors} >= below
    for slot in slots_below(component, names):
        assert below & set(slot.tensors)


def test_an_unknown_module_is_refused_with_near_matches():
    component = component_of(Holding(blocks=nn.ModuleList(linears(2))))
    with pytest.raises(
        PlanError, match=r"'Holding' has no module named 'block.0'; near matches are 'blocks.0'"
    ):
        slots_below(component, ["block.0"])
    with pytest.raises(PlanError, match="'zzz'; give the FQN of a module"):
        slots_below(component, ["zzz"])
