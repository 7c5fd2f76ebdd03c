"""Components, tensors and ties, against brute force."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from hookcore import Component, ModelConventions, OpenedTarget, PlanError, UnsupportedModelError
from hookcore.target import byte_span, has_memory, open_components, own_tensors
from hookcore.testing.modules import module_trees


def component(module, name=""):
    return Component(name, module, lambda _: ModelConventions())


def named_tensors(module):
    """Every FQN of every tensor, found by another way than the code's."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def touched_bytes(tensor):
    """All addresses between the first and the last byte that a tensor uses."""
    if tensor.is_meta or tensor.numel() == 0:
        return set()
    elements = [
        tensor.data_ptr() + sum(map(int.__mul__, index, tensor.stride())) * tensor.element_size()
        for index in itertools.product(*map(range, tensor.shape))
    ]
    return set(range(min(elements), max(elements) + tensor.element_size()))


def ties(tensors):
    """Which FQNs share memory, by comparing all with all until nothing changes."""
    groups = [({fqn}, {id(tensor)}, touched_bytes(tensor)) for fqn, tensor in tensors.items()]
    merged = True
    while merged:
        merged = False
        for one, other in itertools.combinations(groups, 2):
            if one[1] & other[1] or one[2] & other[2]:
                groups = [group for group in groups if group is not one and group is not other]
                groups.append(tuple(a | b for a, b in zip(one, other, strict=True)))
                merged = True
                break
    return {frozenset(names) for names, _, _ in groups}


def check_slots(module):
    on, tensors = component(module), named_tensors(module)
    assert {frozenset(slot.fqns) for slot in on.slots} == ties(tensors)
    assert sorted(fqn for slot in on.slots for fqn in slot.fqns) == sorted(tensors)
    firsts = [list(tensors).index(slot.name) for slot in on.slots]
    assert set(on.slot_of) == set(tensors)
    for slot in on.slots:
        assert all(on.slot_of[fqn] is slot for fqn in slot.fqns)
        assert {id(it) for it in slot.tensors} == {id(tensors[fqn]) for fqn in slot.fqns}
        assert len({id(it) for it in slot.tensors}) == len(slot.tensors)
        holders = {
            (id(holder), name)
            for holder in module.modules()
            for name, tensor, _ in own_tensors(holder)
            if any(tensor is it for it in slot.tensors)
        }
        assert {(id(holder), name) for holder, name in slot.owners} == holders
        assert len(slot.owners) == len(holders)
        is_parameter = any(isinstance(it, nn.Parameter) for it in slot.tensors)
        assert slot.is_buffer == (not is_parameter)
        used = set().union(*map(touched_bytes, slot.tensors))
        if not slot.tensors[0].is_meta:
            assert slot.nbytes == len(used)
    return firsts


@given(module_trees())
def test_slots_of_random_models(case):
    module = case.build()
    check_slots(module)
    on = component(module)
    in_order = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, holder in module.named_modules(remove_duplicate=False)
        for name, _, _ in own_tensors(holder)
    ]
    firsts = [in_order.index(slot.name) for slot in on.slots]
    assert firsts == sorted(firsts)
    for slot in on.slots:
        assert in_order.index(slot.name) == min(map(in_order.index, slot.fqns))


@st.composite
def views(draw):
    """A view of one of two pieces of memory: any offset, shape and stride that fit."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64]))
    kind = draw(st.sampled_from(["view", "view", "view", "empty", "meta"]))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    row_stride, column_stride = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    return dtype, kind, draw(st.integers(0, 1)), draw(st.integers(0, 10)), (rows, columns), (
        row_stride,
        column_stride,
    )  # fmt: skip


def build_view(memories, recipe):
    dtype, kind, which, offset, shape, stride = recipe
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "empty":
        return memories[which].view(dtype)[offset:offset].reshape(0, 3)
    return memories[which].view(dtype).as_strided(shape, stride, offset)


@given(st.lists(st.tuples(views(), st.booleans()), max_size=6))
@example([((torch.float32, "view", 0, offset, (1, 2), (2, 1)), False) for offset in (0, 2, 4)])  # neighbours
@example(  # two that do not touch, inside a long one
    [
        ((torch.float32, "view", 0, offset, (1, columns), (0, 1)), False)
        for offset, columns in ((0, 3), (1, 1), (2, 1))
    ]
)
def test_slots_of_any_views_of_any_memory(recipes):
    """Neighbours in one storage, as safetensors makes them, are no ties; overlaps of any dtypes are."""
    memories = [torch.zeros(400, dtype=torch.uint8) for _ in range(2)]
    module = nn.Module()
    for index, (recipe, is_buffer) in enumerate(recipes):
        tensor = build_view(memories, recipe)
        if is_buffer or not tensor.is_floating_point():
            module.register_buffer(f"t{index}", tensor)
        else:
            module.register_parameter(f"t{index}", nn.Parameter(tensor, requires_grad=False))
    check_slots(module)


def test_two_storages_over_the_same_memory_are_a_tie():
    memory = bytearray(32)
    module = nn.Module()
    module.register_buffer("one", torch.frombuffer(memory, dtype=torch.uint8, count=16))
    module.register_buffer("other", torch.frombuffer(memory, dtype=torch.uint8, count=16, offset=8))
    assert component(module).slots[0].fqns == ("one", "other")
    assert component(module).slots[0].nbytes == 24


def test_a_buffer_tied_to_a_parameter_is_a_parameter():
    module = nn.Linear(2, 2)
    module.register_buffer("view", module.weight.detach()[0])
    assert component(module).slot_of["view"].is_buffer is False


def test_nothing_and_meta_and_empty_tensors_each_stand_alone():
    module = nn.Module()
    module.register_parameter("nothing", None)
    module.register_buffer("none", None)
    for name in ("one", "other"):
        module.register_buffer(f"meta_{name}", torch.empty(3, device="meta"))
        module.register_buffer(f"empty_{name}", torch.empty(0, 2))
    on = component(module)
    assert [slot.fqns for slot in on.slots] == [
        ("meta_one",),
        ("empty_one",),
        ("meta_other",),
        ("empty_other",),
    ]
    assert [slot.nbytes for slot in on.slots] == [12, 0, 12, 0]


def test_tensors_without_an_address_count_from_zero():
    sparse = torch.eye(2).to_sparse()
    assert not has_memory(sparse)
    assert not has_memory(torch.empty(2, device="meta"))
    assert byte_span(torch.empty(2, 3, device="meta")) == (0, 24)
    assert has_memory(nn.Parameter(torch.zeros(1)))


@given(module_trees())
def test_modules_and_their_names(case):
    module = case.build()
    on = component(module)
    everything = list(module.named_modules(remove_duplicate=False))
    assert list(on.modules.items()) == list(module.named_modules())
    assert list(on.fqns) == list(on.modules.values())
    for found, fqns in on.fqns.items():
        assert list(fqns) == [fqn for fqn, it in everything if it is found]
        assert on.modules[fqns[0]] is found
    tensors = named_tensors(module).values()
    assert on.identities == {id(it) for _, it in everything} | {id(it) for it in tensors}


def test_a_component_is_seen_once_and_can_be_seen_afresh():
    module = nn.Sequential(nn.Linear(2, 2))
    on = component(module, "unet")
    assert list(on.modules) == ["", "0"]
    module.append(nn.Linear(2, 2))
    assert list(on.modules) == ["", "0"]
    assert list(on.afresh().modules) == ["", "0", "1"]
    assert on.afresh().name == "unet"
    assert on.conventions == ModelConventions()


def test_labels():
    module = nn.Sequential(nn.Linear(2, 2))
    assert component(module).label("") == "Sequential"
    assert component(module).label("0") == "0"
    assert component(module, "vae").label("") == "vae"
    assert component(module, "vae").label("0") == "vae.0"


# Opening


def opened(target, names=None, answer=None, **more):
    answer = None if answer is None else OpenedTarget(answer, **more)
    return open_components(target, names, open_target=lambda _: answer, describe=lambda _: ModelConventions())


def test_modules_mappings_and_what_plugins_open_are_targets():
    module, other = nn.Identity(), nn.Identity()
    assert {name: it.module for name, it in opened(module).items()} == {"": module}
    assert {name: it.module for name, it in opened({"a": module, "b": other}).items()} == {
        "a": module,
        "b": other,
    }
    assert {name: it.name for name, it in opened(object(), answer={"c": other}).items()} == {"c": "c"}
    assert list(opened({"a": module, "b": other}, names=["b"])) == ["b"]
    assert list(opened({"a": module, "b": other}, names=iter(["b", "a"]))) == ["b", "a"]


@pytest.mark.parametrize(
    ("target", "names", "error", "message"),
    [
        (
            3,
            None,
            UnsupportedModelError,
            r"^cannot put techniques on a int: expected a torch\.nn\.Module, a map",
        ),
        ([nn.Identity()], None, UnsupportedModelError, "^cannot put techniques on a list"),
        (
            {"a": 3},
            None,
            UnsupportedModelError,
            r"^component 'a' is a int, expected .*; leave it out of the mapping",
        ),
        ({1: nn.Identity()}, None, UnsupportedModelError, "^component 1 is a Identity, expected"),
        (
            {"a": nn.Identity()},
            ["b", "c"],
            PlanError,
            "^no component named 'b', 'c'; this target has 'a'$",
        ),
        (nn.Identity(), ["b"], PlanError, "^no component named 'b'; this target is one module$"),
        ({}, ["b"], PlanError, "^no component named 'b'; this target has none$"),
        ({}, None, PlanError, "^there is no component to put techniques on$"),
        ({"a": nn.Identity()}, [], PlanError, "^there is no component to put techniques on$"),
    ],
)
def test_what_cannot_be_opened_is_refused(target, names, error, message):
    with pytest.raises(error, match=message):
        opened(target, names)


def test_components_that_were_opened_together_share_a_target_also_when_taken_afresh():
    modules = {"one": nn.Linear(1, 1), "two": nn.Linear(1, 1), "three": nn.Linear(1, 1)}

    def opened():
        return open_components(
            modules, ["two", "one"], open_target=lambda _: None, describe=lambda _: ModelConventions()
        )

    one, two = opened()["one"], opened()["two"]
    assert one.target is not two.target
    two, one = opened().values()
    assert one.target is two.target
    assert one.target.names == ("two", "one")
    assert one.afresh().target is one.target
    assert component(nn.Linear(1, 1)).target is not component(nn.Linear(1, 1)).target


def test_components_know_what_is_known_of_their_target():
    modules = {"one": nn.Linear(1, 1), "two": nn.Linear(1, 1), "three": nn.Linear(1, 1)}

    on = opened(
        object(),
        ["three", "one"],
        modules,
        sequence=["one", "two", "three"],
        denoisers=["two"],
    )
    target = on["one"].target
    assert target.sequence == ("one", "three")
    assert target.denoisers == ("two",)
    assert target.at_run_end is None


@pytest.mark.parametrize(
    ("names", "modules", "message"),
    [
        (
            ["b", "x"],
            {"a": nn.Identity()},
            r"^no component named 'b', 'x'; this target has 'a' \('b' is None\)$",
        ),
        (None, {}, r"^there is no component to put techniques on \('b' is None; 'c' is gone\)$"),
    ],
)
def test_what_is_no_component_is_explained(names, modules, message):
    with pytest.raises(PlanError, match=message):
        opened(object(), names, modules, absent={"b": "is None", "c": "is gone"})
