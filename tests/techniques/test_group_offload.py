"""Group offloading: the same bits, from copies that are there only when they are needed."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from attrs import frozen
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hookcore
from hookcore import Component, Hook, ModelConventions, Phase, PlanError, Technique, UnsupportedModelError
from hookcore.memory import (
    Group,
    GroupMover,
    Placement,
    SynchronousMover,
    current_tensors,
    find_blocks,
)
from hookcore.memory.device import synchronous_mover
from hookcore.memory.tensor_memory import is_on
from hookcore.memory.watched_reads import WatchedTensors
from hookcore.testing import models
from hookcore.testing.modules import Counter, Recipe, Scaled, TreeModel, WeightReader, module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits
from hookcore_plugins.group_offload import GroupOffload

FEWER = settings(max_examples=50)


@st.composite
def techniques(draw):
    return GroupOffload(
        "cpu",
        offload_type=draw(st.sampled_from(["block_level", "leaf_level"])),
        num_blocks_per_group=draw(st.integers(1, 3)),
    )


def own_tensors(model):
    return [*model.parameters(), *model.buffers()]


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


class OnlyCopies(TorchDispatchMode):
    """Lets no operator touch offloaded memory, and counts the bytes of the copies.

    On the CPU all memory can be used wherever it lies, so that a weight that was not brought would go
    unnoticed but for this.

    Attributes:
        order: Names of the groups, in the order in which they were brought.
        peak: The most bytes of copies that were alive at once.
    """

    def __init__(self, model):
        super().__init__()
        self._kept = [tensor.data for tensor in own_tensors(model)]  # or addresses would be used again
        self.offloaded = {storage(tensor) for tensor in self._kept if tensor.numel()}
        self.order = []
        self.copies = {}
        self.peak = 0
        self._moving = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._moving and not func.is_view:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor) and value.numel():
                    assert storage(value) not in self.offloaded, f"{func} uses offloaded memory"
        return func(*args, **(kwargs or {}))

    def alive(self):
        return sum(nbytes for ref, nbytes in self.copies.items() if not ref.expired())

    def __enter__(self):
        onload, offload = SynchronousMover.onload, SynchronousMover.offload

        def counted_onload(mover, group):
            with self._exempt():
                onload(mover, group)
            self.order.append(group.name)
            for tensor in {storage(it): it for slot in group.slots for it in current_tensors(slot)}.values():
                assert not tensor.numel() or storage(tensor) not in self.offloaded
                self.copies[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.alive())

        def exempt_offload(mover, group):
            with self._exempt():
                offload(mover, group)

        self._patches = contextlib.ExitStack()
        self._patches.enter_context(patch.object(SynchronousMover, "onload", counted_onload))
        self._patches.enter_context(patch.object(SynchronousMover, "offload", exempt_offload))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    @contextlib.contextmanager
    def _exempt(self):
        self._moving = True
        try:
            yield
        finally:
            self._moving = False


def largest_held(plan):
    """The most bytes that a call, and the calls around it, hold; from the plan alone."""
    (step,) = plan.steps
    root = step.component.module
    held = {}
    for binding in step.bindings:
        held.setdefault(root.get_submodule(binding.fqn), set()).update(getattr(binding.hook, "_groups", ()))
    most = 0
    for fqn, _ in root.named_modules(remove_duplicate=False):
        path = fqn.split(".") if fqn else []
        above = (root.get_submodule(".".join(path[:length])) for length in range(len(path) + 1))
        groups = set().union(*(held.get(module, ()) for module in above))
        most = max(most, sum(group.nbytes for group in groups))
    return most


def contains(recipe, kind):
    return recipe.kind is kind or any(contains(child, kind) for child in recipe.children)


# The same bits


@given(
    module_trees(), techniques(), st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode])
)
def test_every_call_gives_the_bits_of_the_bare_model_and_removing_restores_it(case, technique, mode):
    model, bare = case.build(), case.build()
    before = ModelSnapshot.take(model, twin=bare)
    applied = hookcore.apply(model, [technique])
    for seed in range(2):
        for entry in case.entries:
            with mode():
                outputs, expected = case.call(model, entry, seed), case.call(bare, entry, seed)
            assert all(map(same_bits, outputs, expected))
            # What a call changes is in the model at once, and not only after removing.
            assert all(map(same_bits, model.state_dict().values(), bare.state_dict().values()))
    applied.remove()
    before.assert_restored(model)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", models.real_models())
def test_real_models_compute_the_same_from_copies_alone_in_bounded_memory(name, offload_type):
    case = models.real_models()[name]()
    model, bare = case.build(), case.build()
    before = ModelSnapshot.take(model, twin=bare)
    applied = hookcore.apply(model, [GroupOffload("cpu", offload_type=offload_type)])
    bound = largest_held(applied.plan)
    if (name, offload_type) == ("clip_text", "leaf_level"):
        bound += model.embeddings.position_embedding.weight.nbytes  # its parent asks for the shape
    with torch.no_grad():
        for entry in case.entries:
            with OnlyCopies(model) as seen:
                outputs = case.call(model, entry)
            assert all(map(same_bits, outputs, case.call(bare, entry)))
            del outputs
            assert 0 < seen.peak <= bound
            assert seen.alive() == 0
    applied.remove()
    before.assert_restored(model)


@FEWER
@given(module_trees(), techniques())
def test_operators_see_copies_only_and_no_more_than_running_calls_hold(case, technique):
    # A reader's child is brought for the reader's call though the reader doesn't hold it: as a leaf, or as
    # part of another block that it is tied to.
    holds_all = technique.offload_type == "block_level" and not case.blueprint.ties
    assume(holds_all or not contains(case.blueprint.tree, WeightReader))
    model = case.build()
    applied = hookcore.apply(model, [technique])
    with torch.no_grad(), OnlyCopies(model) as seen:
        outputs = case.call(model)
    bound = largest_held(applied.plan) if own_tensors(model) else 0
    assert seen.peak <= bound
    del outputs
    assert seen.alive() == 0


@FEWER
@given(module_trees(), techniques())
def test_gradients_are_those_of_the_bare_model(case, technique):
    model, bare = case.build(), case.build()
    hookcore.apply(model, [technique])
    for each in (model, bare):
        outputs = [out for out in case.call(each) if out.requires_grad]
        sum((out.square().sum() for out in outputs), start=torch.zeros((), requires_grad=True)).backward()
    for (name, parameter), other in zip(model.named_parameters(), bare.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        assert other.grad is None or same_bits(parameter.grad, other.grad), name


def test_a_model_made_in_inference_mode_works_and_stays_one():
    with torch.inference_mode():
        model, bare = (nn.Sequential(nn.Linear(4, 4), Counter(4), nn.BatchNorm1d(4)).eval() for _ in range(2))
        bare.load_state_dict(model.state_dict())
    with hookcore.apply(model, [GroupOffload("cpu")]):
        with torch.inference_mode():
            for _ in range(2):
                assert same_bits(model(torch.ones(2, 4)), bare(torch.ones(2, 4)))
        with torch.no_grad():
            assert same_bits(model[2](torch.ones(2, 4)), bare[2](torch.ones(2, 4)))
    assert all(tensor.is_inference() for tensor in own_tensors(model))
    assert model[1].count == 2


def test_a_batch_norm_trains():
    # torch does not count its changes to the running statistics.
    model, bare = (nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).train() for _ in range(2))
    hookcore.apply(model, [GroupOffload("cpu")])
    for seed in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        assert same_bits(model(x), bare(x))
    assert all(map(same_bits, model.state_dict().values(), bare.state_dict().values()))
    assert not same_bits(model[0].running_mean, torch.zeros(4))


# Between calls


def edit_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def edit_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data + 1


def other_values(model):
    return {
        name: value * 2 if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
    }


def load(model):
    model.load_state_dict(other_values(model))


def load_assigned(model):
    model.load_state_dict(other_values(model), assign=True)


def convert(model):
    model.double().float()


def replace(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 3, requires_grad=parameter.requires_grad))


EDITS = [edit_in_place, edit_data, load, load_assigned, convert, replace]


@given(module_trees(), techniques(), st.lists(st.sampled_from(EDITS), min_size=1, max_size=3))
def test_edits_between_calls_are_seen(case, technique, edits):
    model, bare = case.build(), case.build()
    applied = hookcore.apply(model, [technique])
    with torch.no_grad():
        for edit in edits:
            case.call(model)
            case.call(bare)
            edit(model)
            edit(bare)
            assert all(map(same_bits, case.call(model), case.call(bare)))
            assert all(map(same_bits, model.state_dict().values(), bare.state_dict().values()))
    applied.remove()
    assert all(map(same_bits, model.state_dict().values(), bare.state_dict().values()))
    assert all(type(vars(it)[kind]) is dict for it in model.modules() for kind in ("_parameters", "_buffers"))


@FEWER
@given(module_trees(), techniques())
def test_copies_are_plain_models_that_share_nothing(case, technique):
    model, bare = case.build(), case.build()
    hookcore.apply(model, [technique])
    with torch.no_grad():
        case.call(model)
        case.call(bare)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert not any(
            isinstance(value, WatchedTensors) for it in copied.modules() for value in vars(it).values()
        )
        assert not {storage(it) for it in own_tensors(copied) if it.numel()} & {
            storage(it) for it in own_tensors(model) if it.numel()
        }
        twin = copy.deepcopy(bare)
        with torch.no_grad():
            assert all(map(same_bits, case.call(copied), case.call(twin)))


# Reads outside of a holder's call


class Shared(nn.Module):
    """Uses weights in every way but a call of their module."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.scales = nn.ParameterList([torch.rand(4), torch.rand(4)])
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        second = self.second
        match self.how:
            case "attribute":
                x = F.linear(self.first(x), second.weight, second.bias)
            case "before and after its call":
                x = second(x @ second.weight) @ second.weight
            case "get":
                x = x @ second._parameters.get("weight") + (second._parameters.get("none") or 0)
            case "list":
                x = x * self.scales[0] + self.scales[1]
        return x


@pytest.mark.parametrize(
    "how",
    ["attribute", "before and after its call", "get", "list"],
)
def test_a_weight_read_in_a_call_is_brought(how):
    torch.manual_seed(0)
    model = Shared(how)
    bare = copy.deepcopy(model)
    hookcore.apply(model, [GroupOffload("cpu", offload_type="leaf_level")])
    offloaded = storage(model.second.weight)
    with torch.no_grad(), OnlyCopies(model) as seen:
        outputs = model(torch.ones(2, 4))
    assert same_bits(outputs, bare(torch.ones(2, 4)))
    assert seen.order
    assert seen.alive() == 0
    assert storage(model.second.weight) == offloaded  # a read between calls finds the weight where it lies


def test_to_learn_the_dtype_from_all_parameters_brings_nothing():
    class Careful(nn.Sequential):
        def forward(self, x):
            assert {it.dtype for it in self.parameters()} == {it.dtype for it in self.buffers()} | {
                torch.float32
            }
            return super().forward(x)

    model = Careful(*(nn.Linear(4, 4) for _ in range(3)))
    hookcore.apply(model, [GroupOffload("cpu")])
    with torch.no_grad(), OnlyCopies(model) as seen:
        model(torch.ones(1, 4))
    assert seen.order == ["0", "1", "2"]
    assert seen.peak == 80


def test_a_buffer_that_the_call_returns_is_not_pulled_from_under_the_caller():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x):
            self.last = x * 2
            return self.last

    model = Cache()
    hookcore.apply(model, [GroupOffload("cpu")])
    first = model(torch.ones(3))
    assert same_bits(model.last, torch.full((3,), 2.0))
    model(torch.zeros(3))
    assert same_bits(first, torch.full((3,), 2.0))


def test_data_that_a_call_gives_a_weight_stays():
    class Doubling(nn.Linear):
        def forward(self, x):
            self.weight.data = self.weight.data * 2
            return super().forward(x)

    model = Doubling(2, 2)
    weight, before = model.weight, model.weight.detach().clone()
    with hookcore.apply(model, [GroupOffload("cpu")]):
        for _ in range(2):
            model(torch.ones(1, 2))
    assert model.weight is weight
    assert same_bits(model.weight, before * 4)


# When things go wrong


class NoRoomError(Exception):
    pass


@given(module_trees(), techniques(), st.integers(0, 10), st.booleans())
def test_after_an_error_nothing_is_there_and_the_next_call_is_right(case, technique, when, in_copying):
    model, bare = case.build().eval(), case.build().eval()
    before = {fqn: storage(tensor) for fqn, tensor in model.state_dict().items()}
    applied = hookcore.apply(model, [technique])
    copy_memory = synchronous_mover.copy_memory
    count = 0

    def fail(*args):
        nonlocal count
        count += 1
        if count > when:
            raise NoRoomError
        return copy_memory(*args) if in_copying else None

    assume(
        not any(
            type(module).__name__ in ("Reassigned", "Counter", "MovingMean") for module in model.modules()
        )
    )
    failing = (
        patch.object(synchronous_mover, "copy_memory", fail)
        if in_copying
        else closing(nn.modules.module.register_module_forward_hook(fail))
    )
    with torch.no_grad():
        seen = OnlyCopies(model)
        with contextlib.suppress(NoRoomError), failing, seen:
            case.call(model)
        assert seen.alive() == 0
        assert {fqn: storage(tensor) for fqn, tensor in model.state_dict().items()} == before
        with OnlyCopies(model) as seen:
            outputs = case.call(model)
        assert all(map(same_bits, outputs, case.call(bare)))
        del outputs
        assert seen.alive() == 0
    applied.remove()
    assert all(map(same_bits, model.state_dict().values(), bare.state_dict().values()))


@contextlib.contextmanager
def closing(handle):
    try:
        yield
    finally:
        handle.remove()


# The order of bringing and dropping, with a mover that moves nothing


class Ledger(GroupMover):
    """A mover that keeps books."""

    def __init__(self):
        self.there = set()
        self.brought = []
        self.attached = []
        self.fails_at = None

    def attach(self, group, *, resident):
        if group.name == self.fails_at:
            raise NoRoomError
        self.attached.append(group.name)

    def detach(self, group):
        if group.name == self.fails_at:
            raise NoRoomError
        self.attached.remove(group.name)

    def onload(self, group):
        assert group not in self.there
        self.there.add(group)
        self.brought.append(group.name)

    def offload(self, group):
        self.there.remove(group)

    def report(self, group, *, resident):
        return {"resident" if resident else "offloaded": 1}

    def begin(self):
        assert not self.there

    def end(self):
        assert not self.there

    def finalize(self, group):
        pass

    def reset(self):
        pass


def placed(groups, resident=()):
    ledger = Ledger()
    component = Component("", nn.Identity(), lambda _: ModelConventions())
    return Placement(component, groups, resident, ledger, torch.device("cpu")), ledger


GROUPS = [Group(str(number), (), (("", "forward"),)) for number in range(4)]


@given(
    st.lists(
        st.one_of(
            st.lists(st.sampled_from(GROUPS), unique=True, max_size=3).map(lambda it: ("enter", tuple(it))),
            st.just(("leave", ())),
            st.sampled_from(GROUPS).map(lambda it: ("read", (it,))),
        ),
        max_size=30,
    )
)
def test_what_calls_hold_is_there_and_at_most_one_group_more(steps):
    place, ledger = placed(GROUPS)
    running = []
    for step, groups in steps:
        if step == "enter":
            place.enter(groups, (), {})
            running.append(set(groups))
        elif step == "read" and running:
            place._before_read(groups[0])
            if not any(groups[0] in held for held in running):
                running[-1].add(groups[0])
        elif step == "leave" and running:
            place.leave()
            running.pop()
        held = set().union(*running)
        assert held <= ledger.there
        assert len(ledger.there - held) <= (1 if running else 0)


def test_blocks_that_share_a_group_bring_it_once():
    first, second = GROUPS[:2]
    place, ledger = placed([first, second])
    place.enter((), (), {})
    for group in (first, first, second, second):
        place.enter((group,), (), {})
        place.leave()
    place.leave()
    assert ledger.brought == ["0", "1"]


def test_what_lingers_is_not_dropped_for_what_the_same_call_needs_besides():
    first, second = GROUPS[:2]
    place, ledger = placed([first, second])
    place.enter((), (), {})
    place.enter((first,), (), {})
    place.leave()
    place.enter((second, first), (), {})
    assert ledger.brought == ["0", "1"]


def test_what_is_read_while_it_lingers_stays_for_the_call():
    first, second = GROUPS[:2]
    place, ledger = placed([first, second])
    place.enter((), (), {})
    place.enter((first,), (), {})
    place.leave()
    place._before_read(first)
    place.enter((second,), (), {})
    assert ledger.there == {first, second}


def test_merged_blocks_are_brought_once_a_call():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    hookcore.apply(model, [GroupOffload("cpu", num_blocks_per_group=2)])
    with torch.no_grad(), OnlyCopies(model) as seen:
        model(torch.ones(1, 4))
    assert seen.order == ["0..1", "2..3", "4"]
    assert seen.peak == 2 * 4 * 20


@given(st.integers(0, 4), st.booleans())
def test_attaching_and_detaching_are_all_or_nothing(which, detaching):
    resident = Group("resident", (), ())
    place, ledger = placed(GROUPS, [resident])
    names = ["resident", *(group.name for group in GROUPS)]
    if detaching:
        place.attach()
        assert ledger.attached == names
    ledger.fails_at = names[which]
    if detaching:
        with pytest.raises(NoRoomError):
            place.detach()
        assert sorted(ledger.attached) == sorted(names)
    else:
        with pytest.raises(NoRoomError):
            place.attach()
        assert ledger.attached == []
    assert place.report() == {"resident": 1, "offloaded": 4}


class Pair(NamedTuple):
    x: Any
    y: Any


def test_inputs_of_the_outermost_call_are_moved_and_containers_kept_where_nothing_moves():
    component = Component("", nn.Identity(), lambda _: ModelConventions())
    place = Placement(component, GROUPS, (), Ledger(), torch.device("meta"))
    tensor, cache, settings_ = torch.ones(2), [None, 1], {"a": (1, 2)}
    args, kwargs = place.enter(
        (), (tensor, cache, Pair(tensor, "y"), [tensor]), {"s": settings_, "t": {"x": tensor}}
    )
    assert args[0].device.type == kwargs["t"]["x"].device.type == "meta"
    assert args[1] is cache
    assert kwargs["s"] is settings_
    assert isinstance(args[2], Pair)
    assert (args[2].x.device.type, args[2].y) == ("meta", "y")
    assert isinstance(args[3], list)
    assert args[3][0].device.type == "meta"
    assert place.enter((), (tensor,), {}) is None  # an inner call's inputs are there already


# Options, planning, reporting


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_blocks_per_group": 0}, ValueError, "num_blocks_per_group is 0, expected an int of 1 or more"),
        ({"num_blocks_per_group": 1.5}, ValueError, "num_blocks_per_group is 1.5"),
        (
            {"offload_type": "layer_level"},
            ValueError,
            "'layer_level'; choose 'auto' or 'block_level'",
        ),
        ({"offload_device": "meta"}, ValueError, "'meta', which holds no data"),
        ({"offload_device": "no such"}, ValueError, "torch cannot use 'no such'"),
        ({"exclude_modules": [nn.Linear(1, 1)]}, TypeError, "expected FQNs of modules"),
    ],
)
def test_bad_options_fail_at_once(options, error, message):
    with pytest.raises(error, match=message):
        GroupOffload("cpu", **options)


def test_excluded_modules_stay_where_they_are_and_count_as_resident():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    kept = storage(model[1].weight)
    applied = hookcore.apply(model, [GroupOffload("cpu", exclude_modules="1")])
    with torch.no_grad(), OnlyCopies(nn.Sequential(model[0], model[2])) as seen:
        model(torch.ones(1, 4))
    assert seen.order == ["0", "2"]
    assert storage(model[1].weight) == kept
    (step,) = applied.plan.steps
    (leader,) = [binding for binding in step.bindings if not binding.fqn]
    assert leader.hook.report(model) == {"resident on cpu": 80, "offloaded on cpu": 160}
    claimed = [claim.tensor for binding in step.bindings for claim in binding.claims]
    assert sorted(claimed) == sorted(name for name, _ in model.named_parameters())


def test_an_unknown_excluded_module_is_refused():
    with pytest.raises(PlanError, match="no module named '3'"):
        hookcore.apply(nn.Sequential(nn.Linear(1, 1)), [GroupOffload("cpu", exclude_modules=["3"])])


def test_tensors_without_data_or_of_foreign_kinds_are_refused():
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"'0.weight' is on the meta device .* Load the weights first"):
        hookcore.apply(empty, [GroupOffload("cpu")])

    class Quantised(torch.Tensor):
        pass

    wrapping = nn.Sequential(nn.Linear(2, 2))
    wrapping[0].weight = nn.Parameter(torch.ones(2, 2).as_subclass(Quantised))
    with pytest.raises(UnsupportedModelError, match=r"'0\.weight' is a Quantised"):
        hookcore.apply(wrapping, [GroupOffload("cpu")])
    # Where it computes already it need not move.
    with hookcore.apply(wrapping, [GroupOffload("cpu", exclude_modules="0")]):
        assert wrapping(torch.ones(1, 2)).shape == (1, 2)

    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(UnsupportedModelError, match=r"'table' .* layout torch\.sparse_coo"):
        hookcore.apply(sparse, [GroupOffload("cpu")])

    mixed = nn.Module()
    mixed.register_buffer("floats", torch.ones(4))
    mixed.register_buffer("bytes", mixed.floats.view(torch.uint8))
    with pytest.raises(UnsupportedModelError, match="'floats' and 'bytes' share memory but differ in dtype"):
        hookcore.apply(mixed, [GroupOffload("cpu")])


def test_a_model_without_tensors_is_left_alone():
    plan = hookcore.plan(nn.Sequential(nn.ReLU()), [GroupOffload("cpu")])
    assert not plan.steps[0].bindings
    assert plan.steps[0].skipped[0].reason == "it has no parameters or buffers"


def test_the_blocks_of_real_models_are_those_that_their_libraries_declare():
    found = {}
    for name, make in models.real_models().items():
        model = make().build()
        found[name] = find_blocks(Component("", model, hookcore.plugins.plugins().describe))
    assert found["flux"] == (
        ("transformer_blocks.0", "transformer_blocks.1"),
        tuple(f"single_transformer_blocks.{index}" for index in range(3)),
    )
    assert found["bert"] == (("embeddings",), ("encoder.layer.0", "encoder.layer.1"))
    assert ("encoder",) in found["autoencoder"]
    assert all(found.values())


class _Spy(Hook):
    def __init__(self, seen):
        self.seen = seen

    def pre_forward(self, module, args, kwargs):
        self.seen.append(storage(module.weight))


def test_hooks_inside_find_the_copy():
    seen = []

    @frozen
    class Spying(Technique):
        name = "spying"
        phase = Phase.COMPUTE

        def bind(self, component):
            yield hookcore.Binding("0", _Spy(seen))

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    hookcore.apply(model, [Spying(), GroupOffload("cpu")])
    model(torch.ones(1, 2))
    assert seen != [storage(model[0].weight)]


def test_weights_of_the_same_memory_share_it_in_the_copy_too():
    model = TreeModel(Recipe(Scaled, (Recipe(WeightReader), Recipe(WeightReader))), width=4).make()
    first, second = model.inner[0].child, model.inner[1].child
    second.weight = nn.Parameter(first.weight.detach().t())
    second.bias = nn.Parameter(first.weight.detach()[1])
    seen = []
    F_linear = F.linear

    def linear(x, weight, bias):
        seen.append(storage(weight) == storage(second.bias))
        return F_linear(x, weight, bias)

    hookcore.apply(model, [GroupOffload("cpu")])
    with patch.object(F, "linear", linear):
        model(torch.ones(3, 4))
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("there", "asked", "on"),
    [
        ("cpu", "cpu", True),
        ("cuda:0", "cuda", True),
        ("cuda:1", "cuda", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:1", "cuda:0", False),
        ("cuda:0", "cpu", False),
        ("cpu", "cuda", False),
    ],
)
def test_a_device_without_an_index_stands_for_any_of_its_type(there, asked, on):
    assert is_on(SimpleNamespace(device=torch.device(there)), torch.device(asked)) is on
