"""apply and remove as transactions, and what holds around a call: locks, gradients, losses."""

import contextlib
import re
import threading
import warnings
from collections import Counter

import pytest
import torch
from attrs import field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from techniques import ENTRIES, Moving, Pushing, PushingHook, Recording, Scaling, toy
from torch import nn
from torch.utils.checkpoint import checkpoint

import hookcore
from hookcore import (
    Binding,
    ConcurrentCallError,
    ConflictError,
    ForeignMechanism,
    Hook,
    HookcoreWarning,
    LossyRemovalError,
    Phase,
    PlanError,
    PluginError,
    Skipped,
    UnsupportedModelError,
)
from hookcore.testing.modules import module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits


class InjectedError(Exception):
    pass


def call(case, model):
    return [case.call(model, entry, seed) for entry in case.entries for seed in (0, 1)]


def same(first, second):
    return len(first) == len(second) and all(
        same_bits(*pair)
        for one, other in zip(first, second, strict=True)
        for pair in zip(one, other, strict=True)
    )


# All or nothing


class Faults:
    """Raises at the n-th step of a kind, counted over all hooks; and at others after it, where asked."""

    def __init__(self, **at):
        self.at = at
        self.counts = Counter()

    def step(self, kind):
        self.counts[kind] += 1
        if self.counts[kind] in self.at.get(kind, ()):
            raise InjectedError(f"{kind} {self.counts[kind]}")


class FaultyHook(PushingHook):
    """Lays its name on a pile, unless a fault is due; says that it works at each call."""

    def __init__(self, name, faults):
        super().__init__(name)
        self.faults = faults

    def attach(self, module):
        self.faults.step("attach")
        super().attach(module)

    def detach(self, module):
        self.faults.step("detach")
        super().detach(module)

    def after_removal(self, module):
        self.faults.step("after_removal")

    def pre_forward(self, module, args, kwargs):
        assert self.name in vars(module)["_pile"]


def faulty(name, faults, **attributes):
    def bind(component):
        for fqn in component.modules:
            yield Binding(fqn, FaultyHook(name, faults))

    return toy(name, bind, **attributes)


def model_of_five():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def hooks_on(model):
    return hookcore.status(model).techniques


def piles(model):
    return [vars(module).get("_pile") for module in model.modules()]


@pytest.mark.parametrize("nth", range(1, 16))
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failing_attach_leaves_everything_as_before(nth, earlier):
    """Three techniques of five hooks each; each attach fails once. What was there before stays and works."""
    model, x = model_of_five(), torch.ones(2, 3)
    expected = model(x)
    pristine = ModelSnapshot.take(model)
    kept = Faults()
    if earlier:
        applied = hookcore.apply(model, [faulty("earlier", kept, phase=Phase.CAST)])
    faults = Faults(attach=[nth])
    techniques = [
        faulty("place", faults, phase=Phase.PLACE),
        *(faulty(name, faults) for name in ("one", "two")),
    ]
    with pytest.raises(InjectedError, match=rf"attach {nth}\n") as caught:
        hookcore.apply(model, techniques)
    assert len(caught.value.__notes__) == 1  # whose it is, and nothing of undoing
    assert faults.counts["detach"] == nth - 1
    assert hooks_on(model) == (("earlier",) if earlier else ())
    assert torch.equal(model(x), expected)
    if earlier:
        assert piles(model) == [["earlier"]] * 5
        applied.remove()
    pristine.assert_restored(model, same_storage=True)


@pytest.mark.parametrize("nth", range(1, 11))
@pytest.mark.parametrize("step", ["detach", "after_removal"])
def test_a_failing_removal_leaves_everything_on(nth, step):
    """The outer and the middle one of three are removed; the inner one is never touched for it."""
    model, x = model_of_five(), torch.ones(2, 3)
    expected = model(x)
    pristine = ModelSnapshot.take(model)
    inner, faults = Faults(), Faults()
    hookcore.apply(model, [faulty("inner", inner)])
    applied = hookcore.apply(
        model, [faulty("outer", faults, phase=Phase.PLACE), faulty("middle", faults, phase=Phase.CAST)]
    )
    faults.at[step] = [nth]
    with pytest.raises(InjectedError, match=rf"{step} {nth}\n") as caught:
        applied.remove()
    assert [note.split()[1] for note in caught.value.__notes__] == ["raised", "nothing"]  # was removed
    assert hooks_on(model) == ("outer", "middle", "inner")
    assert piles(model) == [["inner", "middle", "outer"]] * 5
    assert inner.counts == {"attach": 5}
    assert torch.equal(model(x), expected)
    applied.remove()
    hookcore.remove(model)
    pristine.assert_restored(model, same_storage=True)


@pytest.mark.parametrize("nth", range(1, 6))
def test_a_failure_while_undoing_is_noted_and_what_cannot_be_put_back_is_taken_off(nth):
    """The removal fails, and so does attaching the hooks again: of one technique, then the other stays."""
    model, x = model_of_five(), torch.ones(2, 3)
    expected = model(x)
    pristine = ModelSnapshot.take(model)
    outer_faults, middle_faults = Faults(), Faults()
    applied = hookcore.apply(
        model,
        [
            faulty("outer", outer_faults, phase=Phase.PLACE),
            faulty("middle", middle_faults, phase=Phase.CAST),
            Recording(label="inner"),
        ],
    )
    outer_faults.at["attach"] = [5 + nth]  # the nth of the five that are put back
    middle_faults.at["detach"] = [3]
    with pytest.raises(InjectedError, match=r"detach 3\n") as caught:
        applied.remove()
    origin, *notes, remedy = caught.value.__notes__
    assert "remove(force=True)" in remedy
    assert origin == "hookcore: raised in FaultyHook.detach() of middle at '1'"
    assert [note.partition(", raised in FaultyHook.attach() of outer at")[0] for note in notes] == [
        f"hookcore: undoing failed in part: InjectedError('attach {5 + nth}')",
        "hookcore: outer could not be put back and has been removed",
    ]
    assert hooks_on(model) == ("middle", "recording")
    assert piles(model) == [["middle"]] * 5
    assert torch.equal(model(x), expected)
    applied.remove()
    assert repr(applied) == "<Applied: removed>"
    pristine.assert_restored(model, same_storage=True)


def test_a_hook_that_can_neither_be_put_back_nor_be_taken_off_hides_neither_error():
    model = nn.Identity()
    first, second = Faults(), Faults()

    def two(component):
        yield Binding("", FaultyHook("a", first))
        yield Binding("", FaultyHook("b", second))

    applied = hookcore.apply(model, [toy("stuck", two)])
    first.at["detach"] = [1, 2]
    second.at["attach"] = [2]
    with pytest.raises(InjectedError, match="detach 1") as caught:
        applied.remove()
    origin, *notes, remedy = caught.value.__notes__
    assert "remove(force=True)" in remedy
    assert origin == "hookcore: raised in FaultyHook.detach() of stuck at 'Identity'"
    assert [
        note.partition(", raised in FaultyHook.attach() of stuck at 'Identity'")[0] for note in notes
    ] == [
        "hookcore: undoing failed in part: InjectedError('attach 2')",
        "hookcore: stuck could not be put back and has been removed",
    ]
    assert "forward" not in vars(model)


@given(
    st.sets(st.integers(1, 10)),
    st.sets(st.integers(1, 10)),
    st.sampled_from(["handle", "function"]),
    st.booleans(),
)
def test_removal_by_force_gives_up_on_what_fails_and_takes_the_rest_off(detach, after_removal, how, inside):
    model, x = model_of_five(), torch.ones(2, 3)
    expected = model(x)
    faults = Faults(detach=detach, after_removal=after_removal)
    techniques = [faulty("outer", faults, phase=Phase.PLACE), faulty("middle", faults, phase=Phase.CAST)]
    if inside:
        hookcore.apply(model, [toy("inner", lambda on: [Binding(fqn, Around()) for fqn in on.modules])])
    applied = hookcore.apply(model, techniques)
    failing = len(detach) + len(after_removal)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        applied.remove(force=True) if how == "handle" else hookcore.remove(model, force=True)
    assert len(warned) == (failing > 0)
    for warning in warned:
        assert warning.category is HookcoreWarning
        assert warning.filename == __file__ or how == "function"
        text = str(warning.message)
        # What stands inside of a hook that failed finds its module otherwise than it left it, and fails, too.
        count = int(re.match("removed by force, although ([0-9]+) of the hooks failed in it: ", text)[1])
        assert failing <= count <= 2 * failing
        assert "raised in FaultyHook." in text
        assert "may be left" in text
    assert faults.counts["detach"] == faults.counts["after_removal"] == 10
    assert sum(len(pile or ()) for pile in piles(model)) >= len(detach)
    assert hooks_on(model) == (("inner",) if inside and how == "handle" else ())
    assert torch.equal(model(x), expected)
    assert repr(applied) == "<Applied: removed>"
    hookcore.remove(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_removal_by_force_is_undone_where_another_technique_fails():
    """The inner one is removed by force, and the outer one, which stays, fails to be taken off for it."""
    model = model_of_five()
    pristine = ModelSnapshot.take(model)
    outer, inner = Faults(), Faults()
    first = hookcore.apply(model, [faulty("outer", outer, phase=Phase.PLACE)])
    second = hookcore.apply(model, [faulty("inner", inner)])
    outer.at["detach"] = [outer.counts["detach"] + 2]
    with pytest.raises(InjectedError):
        second.remove(force=True)
    outer.at["attach"] = [outer.counts["attach"] + 3]
    inner.at["detach"] = [inner.counts["detach"] + 2]
    with pytest.raises(InjectedError):
        second.remove(force=True)
    assert hooks_on(model) == ("outer", "inner")
    assert piles(model) == [["inner", "outer"]] * 5
    first.remove()
    second.remove()
    pristine.assert_restored(model, same_storage=True)


def test_what_cannot_say_what_it_would_lose_can_be_removed_by_force():
    class Speechless(Hook):
        def loss_on_detach(self, module):
            raise InjectedError("no words")

        def detach(self, module):
            raise InjectedError("stuck")

    model = nn.Identity()
    applied = hookcore.apply(model, [toy("speechless", lambda _: [Binding("", Speechless())])])
    with pytest.raises(
        InjectedError, match="no words(.|\n)*nothing was removed.*remove\\(force=True\\).*allow_lossy=True"
    ):
        applied.remove(force=True)
    with pytest.warns(HookcoreWarning, match="1 of the hooks failed in it: .*stuck"):
        applied.remove(force=True, allow_lossy=True)
    assert vars(model) == vars(nn.Identity())


@given(case=module_trees(), data=st.data())
@settings(max_examples=30)
def test_one_hook_object_on_two_models_is_refused(case, data):
    """Nor on two components of one, nor twice on one; when the first is taken off, it may be used again."""
    hook = Hook()
    technique = toy("reusing", lambda on: [Binding(data.draw(st.sampled_from(list(on.modules))), hook)])
    first, second = case.build(), case.build()
    message = "^reusing binds a hook object to .* that stands at .*make new ones each time"
    applied = hookcore.apply(first, [technique])
    for verb in (hookcore.plan, hookcore.apply):
        for target in (second, first, {"first": second, "second": case.build()}):
            before = ModelSnapshot.take(second)
            with pytest.raises((PluginError, ConflictError), match=message):
                verb(target, [technique])
            before.assert_restored(second, same_storage=True)
    applied.remove()
    with hookcore.apply(second, [technique]):
        assert hooks_on(second) == ("reusing",)


@pytest.mark.parametrize("nth", range(1, 6))
def test_removing_from_the_middle_undoes_what_is_around_when_that_cannot_be_put_back(nth):
    """Taking the inner one off takes the outer one off and on again, and that fails at the nth hook."""
    model = model_of_five()
    pristine = ModelSnapshot.take(model)
    outer, inner = Faults(), Faults()
    first = hookcore.apply(model, [faulty("outer", outer, phase=Phase.PLACE)])
    second = hookcore.apply(model, [faulty("inner", inner)])
    outer.at["attach"] = [outer.counts["attach"] + nth]
    with pytest.raises(InjectedError):
        second.remove()
    assert hooks_on(model) == ("outer", "inner")
    assert piles(model) == [["inner", "outer"]] * 5
    first.remove()
    second.remove()
    pristine.assert_restored(model, same_storage=True)


@given(module_trees(), st.permutations(range(4)), st.integers(0, 4))
@settings(max_examples=40)
def test_removal_in_any_order_gives_the_model_back(case, order, resets):
    model, twin = case.build(), case.build()
    pristine = ModelSnapshot.take(model, twin=twin)
    calls = Counter()
    techniques = [
        Moving(), Scaling(), Pushing(calls=calls), toy("around", lambda on: [Binding("", Around())])
    ]  # fmt: skip
    handles = [hookcore.apply(model, [technique]) for technique in techniques]
    for handle in [handles[0]] * resets:
        handle.reset()
    for index in order:
        assert same(call(case, model), call(case, twin))
        handles[index].remove()
        handles[index].remove()  # a second time does nothing
    pristine.assert_restored(model)


class Around(Hook):
    def around_forward(self, module, call, /, *args, **kwargs):
        return call(*args, **kwargs)


def test_a_block_gives_the_model_back_even_when_it_raises():
    model = model_of_five()
    pristine = ModelSnapshot.take(model)
    with pytest.raises(InjectedError), hookcore.apply(model, [Scaling(), Pushing()]) as applied:
        assert "scaling" in repr(applied)
        raise InjectedError
    assert repr(applied) == "<Applied: removed>"
    pristine.assert_restored(model)


def test_applying_nothing_is_possible():
    with hookcore.apply(nn.Identity(), []) as applied:
        assert repr(applied) == "<Applied: nothing>"
    assert str(applied.plan) == "nothing to apply"


# Losses


class LossyHook(PushingHook):
    loss = "weights were rounded to float8"

    def loss_on_detach(self, module):
        return self.loss


def lossy(hooks):
    def bind(component):
        for fqn in component.modules:
            yield Binding(fqn, hooks.setdefault(fqn, LossyHook("lossy")))

    return toy("lossy", bind)


@pytest.mark.parametrize("how", ["handle", "remove", "with"])
def test_a_lossy_removal_is_refused_before_any_change(how):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    pristine, hooks = ModelSnapshot.take(model), {}
    hookcore.apply(model, [Pushing()])
    applied = hookcore.apply(model, [lossy(hooks)])
    before = ModelSnapshot.take(model)
    with pytest.raises(LossyRemovalError) as caught:
        {"handle": applied.remove, "remove": lambda: hookcore.remove(model), "with": applied.__enter__}[how]()
    assert str(caught.value) == (
        "removing lossy cannot give back the original weights: at 'Sequential', weights were rounded to "
        "float8 (and so for 2 more modules). Nothing was removed. hookcore.remove(model, "
        "allow_lossy=True) goes on with the weights as they are now"
    )
    before.assert_restored(model, same_storage=True)
    assert hooks_on(model) == ("pushing", "lossy")
    hooks["0"].loss = hooks["1"].loss = None
    with pytest.raises(LossyRemovalError, match=r"to float8\. Nothing was removed"):
        applied.remove()
    applied.remove(allow_lossy=True)
    hookcore.remove(model, allow_lossy=True)
    pristine.assert_restored(model, same_storage=True)


def test_the_inner_of_two_can_be_removed_below_a_lossy_one():
    """The lossy one comes off and on again for it; that loses nothing, or it must not be used with others."""
    model = nn.Identity()
    inner = hookcore.apply(model, [Pushing()])
    hookcore.apply(model, [lossy({})])
    inner.remove()
    assert hooks_on(model) == ("lossy",)
    hookcore.remove(model, allow_lossy=True)


# Removing by target


def test_remove_takes_off_everything_inside_and_nothing_beside():
    model, beside = model_of_five(), model_of_five()
    pristine = ModelSnapshot.take(model)
    for target in (beside, model, model[1], model[1][0]):
        hookcore.apply(target, [toy(f"t{id(target)}", lambda _: [Binding("", PushingHook("it"))])])
    hookcore.remove(model[1])
    assert len(hooks_on(model)) == 1
    hookcore.remove(model)
    hookcore.remove(model)
    assert hooks_on(model) == ()
    assert len(hooks_on(beside)) == 1
    pristine.assert_restored(model, same_storage=True)


def test_remove_refuses_what_belongs_to_a_model_around():
    model = model_of_five()
    hookcore.apply(model, [Pushing()])
    before = ModelSnapshot.take(model)
    with pytest.raises(PlanError) as caught:
        hookcore.remove(model[1])
    assert str(caught.value) == (
        "pushing was put on Sequential, which holds the target. Call hookcore.remove() on that model, or "
        "remove() on the handle of its apply()"
    )
    before.assert_restored(model, same_storage=True)
    hookcore.remove(model)


def test_remove_lets_a_neighbour_be_that_shares_a_tensor_only():
    """Two heads with one tied weight: what is on one of them is not on the other."""
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    hookcore.apply(one, [Recording()])
    hookcore.remove(other)
    assert hooks_on(one) == ("recording",)
    assert hooks_on(other) == ("recording",)  # what shares a tensor with it has to be known


# Threads


class Meeting(nn.Module):
    """Its forward waits until the other thread has tried."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inside, self.tried = threading.Event(), threading.Event()

    def forward(self, x, *, wait=True):
        if wait:
            self.inside.set()
            assert self.tried.wait(20)
        return self.inner(x)


@contextlib.contextmanager
def a_call_under_way(model):
    """A call in another thread that is inside `forward` for the length of the block."""
    results = []
    thread = threading.Thread(target=lambda: results.append(model(torch.ones(1, 2))))
    thread.start()
    assert model.inside.wait(20)
    try:
        yield results
    finally:
        model.tried.set()
        thread.join(20)
        model.inside.clear()
        model.tried.clear()


@pytest.mark.parametrize("target", ["whole", "part"])
@pytest.mark.parametrize("swapping", [Moving(), Scaling()])
def test_two_threads_in_a_model_whose_weights_move_get_an_error(swapping, target):
    model = Meeting()
    x = torch.ones(1, 2)
    expected = model.inner(x)
    hookcore.apply(model, [swapping])
    called = model if target == "whole" else model.inner
    if target == "part":
        hookcore.apply(model.inner, [toy("swap", lambda _: [Binding("", Swapping())])])
    with a_call_under_way(model) as results, pytest.raises(ConcurrentCallError) as caught:
        called(x, wait=False) if called is model else called(x)
    assert str(caught.value) == (
        f"called {type(called).__name__} while another thread is calling the same model. Its weights are "
        "moved or cast during a call, so one call at a time is possible: put a lock round the calls, or give "
        "each thread a model of its own (copy.deepcopy)"
    )
    assert torch.equal(results[0], expected)
    assert torch.equal(model(x, wait=False), expected)
    hookcore.remove(model)


class Swapping(Hook):
    swaps_weights = True

    def pre_forward(self, module, args, kwargs):
        return None


def test_hooks_that_swap_no_weights_let_threads_in():
    model = Meeting()
    log = []
    hookcore.apply(model, [Recording(log)])
    x = torch.ones(1, 2)
    with a_call_under_way(model) as results:
        inner = model(x, wait=False)
    assert torch.equal(results[0], inner)
    assert Counter(log)["post", "recording", "", "forward"] == 2


@pytest.mark.parametrize("verb", ["apply", "remove", "reset", "remove all"])
def test_changing_what_is_on_a_model_that_another_thread_is_calling_is_refused(verb):
    model = Meeting()
    applied = hookcore.apply(model, [Moving()])
    verbs = {
        "apply": lambda: hookcore.apply(model, [Pushing()]),
        "remove": applied.remove,
        "remove all": lambda: hookcore.remove(model),
        "reset": applied.reset,
    }
    with a_call_under_way(model) as results:
        with pytest.raises(
            ConcurrentCallError, match="^cannot apply, remove or reset techniques on 'Meeting' during one of"
        ):
            verbs[verb]()
        assert hooks_on(model) == ("moving",)
    assert len(results) == 1
    verbs[verb]()
    hookcore.remove(model)


@pytest.mark.parametrize("verb", ["apply", "remove", "reset", "remove all"])
def test_changing_what_is_on_a_model_from_inside_its_call_is_refused(verb):
    class Changing(nn.Module):
        def forward(self, x):
            verbs[verb]()
            return x

    model = nn.Sequential(nn.Linear(2, 2), Changing())
    applied = hookcore.apply(model, [Moving()])
    verbs = {
        "apply": lambda: hookcore.apply(model, [Pushing()]),
        "remove": applied.remove,
        "remove all": lambda: hookcore.remove(model),
        "reset": applied.reset,
    }
    with pytest.raises(ConcurrentCallError) as caught:
        model(torch.ones(1, 2))
    assert str(caught.value) == (
        "cannot apply, remove or reset techniques on 'Sequential' during one of its calls. Do it after the "
        "call has returned"
    )
    applied.remove()


def test_disjoint_models_are_independent_also_after_they_were_connected():
    one, other = Meeting(), Meeting()
    both = nn.ModuleList([one, other])
    for model in (one, other):
        hookcore.apply(model, [Moving()])
    connecting = hookcore.apply(both, [Pushing()])
    with a_call_under_way(one), pytest.raises(ConcurrentCallError):
        other(torch.ones(1, 2), wait=False)
    connecting.remove()
    with a_call_under_way(one) as results:
        other(torch.ones(1, 2), wait=False)
        hookcore.remove(other)
    assert len(results) == 1
    hookcore.remove(both)


def test_threads_that_apply_at_once_do_not_lose_each_others_hooks():
    """Each binds only after the other has begun, so that both would plan on a bare model."""
    model = nn.Identity()
    barrier = threading.Barrier(2)

    def bind(_):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(0.3)  # passes only if both may plan at once
        return [Binding("", PushingHook("it"))]

    techniques = [toy(name, bind) for name in ("one", "two")]
    threads = [
        threading.Thread(target=lambda technique=technique: hookcore.apply(model, [technique]))
        for technique in techniques
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(hooks_on(model)) == ["one", "two"]
    assert len(vars(model)["forward"].hooks) == 2
    hookcore.remove(model)


# Gradients


def gradients(case, model, entry):
    """Gradients of an input and of all parameters, after the call and the swapping are over."""
    args, kwargs = case.inputs(entry)
    x = args[0].clone().requires_grad_()
    method = model if entry == "forward" else getattr(model, entry)
    output = method(x, *args[1:], **kwargs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(output.square().sum(), [x, *trained], allow_unused=True)


def same_gradients(first, second):
    return all(
        one is other if one is None or other is None else same_bits(one, other)
        for one, other in zip(first, second, strict=True)
    )


@given(module_trees(), st.sampled_from([[Moving()], [Scaling()], [Moving(), Scaling()]]))
@settings(max_examples=60)
def test_gradients_are_those_of_the_bare_model(case, techniques):
    """Autograd saves weights; what it saved must not be what lay in the parameter after the call."""
    for entry in case.entries:
        model, bare = case.build(), case.build()
        hookcore.apply(model, techniques)
        assert same_gradients(gradients(case, model, entry), gradients(case, bare, entry))


class Checkpointed(nn.Module):
    """Runs its child under activation checkpointing, which calls it again in the backward pass."""

    def __init__(self, inner, **options):
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, x):
        return checkpoint(self.inner, x, **self.options)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("technique", [Moving(), Scaling(), Recording()])
def test_activation_checkpointing_keeps_working(technique, reentrant):
    """With hooks on the checkpointed part, which has its weights swapped in again when it is recomputed."""

    def build():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 3))
        return Checkpointed(inner, use_reentrant=reentrant)

    def train(model):
        x = torch.ones(2, 3, requires_grad=True)
        model(x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters())]

    model, bare = build(), build()
    hookcore.apply(model.inner, [technique])
    assert same_gradients(train(model), train(bare))


@pytest.mark.parametrize("technique", [Moving(), Scaling()])
def test_saved_tensor_hooks_of_the_user_see_what_they_always_see(technique):
    """Even if they keep the very tensor that they are given."""

    def train(model):
        packed = []

        def pack(tensor):
            packed.append(tensor.detach().clone())
            return tensor

        x = torch.ones(2, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x)
        output.square().sum().backward()
        return packed, x.grad

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 3))
    packed, gradient = train(model)
    hookcore.apply(model, [technique])
    assert same([train(model)[0]], [packed])
    assert torch.equal(train(model)[1], gradient)


def test_no_hooks_for_saved_tensors_are_left_behind_by_a_call():
    model = nn.Sequential(nn.Linear(2, 2), Failing())
    hookcore.apply(model, [Moving()])
    for _ in range(2):
        with pytest.raises(InjectedError):
            model(torch.ones(1, 2))
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    hookcore.remove(model)


class Failing(nn.Module):
    def forward(self, x):
        raise InjectedError


def test_a_model_is_not_locked_for_ever_where_torch_forbids_hooks_for_saved_tensors():
    model = nn.Linear(2, 2)
    hookcore.apply(model, [Moving()])
    x = torch.ones(1, 2)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        with pytest.raises(RuntimeError, match="not here"):
            model(x)
        with torch.no_grad():
            model(x)
    model(x)
    hookcore.remove(model)


# Targets and techniques


def test_a_mapping_gives_each_component_its_own():
    parts = {"one": nn.Linear(2, 2), "other": nn.Linear(2, 2), "third": nn.Linear(2, 2)}
    with hookcore.apply(parts, {"one": [Pushing()], "other": [Moving(), Pushing()], "third": []}):
        assert [hooks_on(part) for part in parts.values()] == [("pushing",), ("moving", "pushing"), ()]
    with hookcore.apply(parts, [Pushing()], components=["one", "third"]):
        assert [hooks_on(part) for part in parts.values()] == [("pushing",), (), ("pushing",)]
    assert hooks_on(parts) == ()


@pytest.mark.parametrize(
    ("techniques", "error", "message"),
    [
        (Pushing(), TypeError, r"^techniques is a list .* found Pushing\(.*\)\. Write \[Pushing"),
        ("pushing", TypeError, r"found 'pushing'\. Write \['pushing'\]$"),
        ({"": Pushing()}, TypeError, r"^techniques is a list of techniques or names"),
        ([1], TypeError, "^a technique is a Technique object or a registered name; found 1$"),
        ([Pushing], TypeError, "^a technique is a Technique object or a registered name; found <class"),
        (["no_such_technique"], PluginError, "^no technique is named 'no_such_technique'"),
        (
            {"vae": []},
            PlanError,
            "^techniques are given for 'vae', but the target has ''. Name one of these$",
        ),
    ],
)
def test_what_is_no_list_of_techniques_is_refused(techniques, error, message):
    with pytest.raises(error, match=message):
        hookcore.apply(nn.Identity(), techniques)


class Plugins:
    """Stands for the plugins of this process."""

    def __init__(self, *, technique=None, foreign=(), notes=()):
        self.found, self.foreign, self.notes, self.events = technique, foreign, notes, []

    def technique(self, name):
        return self.found

    def open_target(self, target):
        return None

    def describe(self, component):
        return hookcore.ModelConventions()

    def find_foreign(self, component):
        return list(self.foreign)

    def review(self, plan):
        return list(self.notes)

    def observe(self, event, **details):
        self.events.append((event, details))


@pytest.fixture
def use_plugins(monkeypatch):
    import sys

    def use(plugins):
        for module in ("hookcore.apply", "hookcore.applied"):
            monkeypatch.setattr(sys.modules[module], "plugins", lambda: plugins)
        return plugins

    return use


def test_a_name_stands_for_a_technique_without_options(use_plugins):
    use_plugins(Plugins(technique=Pushing))
    model = nn.Identity()
    hookcore.apply(model, ["pushing"]).remove()

    @frozen
    class Needy(Pushing):
        size: int = field(kw_only=True)

    use_plugins(Plugins(technique=Needy))
    with pytest.raises(
        PlanError, match=r"^'needy' needs options, so a name is not enough \(.*size.*Pass Needy\("
    ):
        hookcore.apply(model, ["needy"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_foreign_mechanism_is_refused_with_its_remedy(use_plugins, count):
    found = [
        ForeignMechanism(f"{index}", "an alien hook", "call alien.remove(model)") for index in range(count)
    ]
    use_plugins(Plugins(foreign=found))
    model = model_of_five()
    before = ModelSnapshot.take(model)
    others = "" if count == 1 else " (and 2 more)"
    with pytest.raises(ConflictError) as caught:
        hookcore.apply(model, [Pushing()])
    assert str(caught.value) == (
        f"'0' already has an alien hook{others}, which hookcore cannot see through. Nothing was touched. "
        "To take it off: call alien.remove(model)"
    )
    before.assert_restored(model, same_storage=True)


def test_plugins_are_told_and_their_notes_are_shown(use_plugins):
    plugins = use_plugins(Plugins(notes=["mind the gap"]))
    model = nn.Identity()
    applied = hookcore.apply(model, [Pushing()])
    assert str(applied.plan).endswith("\nnote: mind the gap")
    applied.reset()
    applied.remove()
    applied.remove()
    assert [event for event, _ in plugins.events] == ["applied", "reset", "removed"]
    assert plugins.events[0][1]["plan"] is applied.plan
    assert plugins.events[2][1]["techniques"] == [applied.plan.steps[0].technique]


def test_a_target_that_nothing_opens_is_refused():
    with pytest.raises(
        UnsupportedModelError, match="^cannot put techniques on a int: expected a torch.nn.Module"
    ):
        hookcore.apply(3, [])


# What people see


def test_the_tables():
    class Weighing(PushingHook):
        def report(self, module):
            return {"on cpu": 2048, "on disk": 3}

    def bind(component):
        for fqn in ("0", "1"):
            yield Binding(fqn, Weighing("it"))
        for index in range(5):
            yield Skipped(f"block.{index}", "a norm")
        yield Skipped("head", "tied")

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    technique = toy("weighing", bind, phase=Phase.CAST)
    skipped = (
        "skipped by weighing: block.0, block.1, block.2 and 2 more: a norm\nskipped by weighing: head: tied"
    )
    assert str(hookcore.plan({"vae": model}, [technique])) == (
        "component  technique  phase  hooks on\n"
        "---------  ---------  -----  -------------\n"
        "vae        weighing   CAST   2 x forward()\n" + skipped
    )
    assert str(hookcore.status(model)) == "nothing applied"
    with hookcore.apply({"vae": model}, [technique]) as applied:
        assert repr(applied) == (
            "Applied\n"
            "component  technique  hooks on       bytes\n"
            "---------  ---------  -------------  ---------------------------\n"
            "vae        weighing   2 x forward()  4.0 KiB on cpu, 6 B on disk\n" + skipped
        )
        assert str(hookcore.status(model)) == repr(applied).removeprefix("Applied\n")
        assert hookcore.status(model).techniques == ("weighing",)


def test_a_technique_with_nothing_to_do_shows_so():
    with hookcore.apply(nn.Identity(), [toy("idle")]) as applied:
        assert repr(applied).splitlines()[-1] == "Identity   idle       nothing   -"


@given(module_trees())
@settings(max_examples=30)
def test_status_counts_the_bytes_of_ties_once(case):
    model = case.build()
    used = set()  # the address of each byte
    for it in (*model.state_dict().values(), *model.buffers()):
        if it.numel():
            last = sum((size - 1) * stride for size, stride in zip(it.shape, it.stride(), strict=True))
            used.update(range(it.data_ptr(), it.data_ptr() + (last + 1) * it.itemsize))
    assert hookcore.status({"one": model, "other": model}).nbytes.get("cpu", 0) == len(used)


def test_reset_reaches_every_hook_and_only_those_of_its_handle():
    model, calls, others = model_of_five(), Counter(), Counter()
    second = toy("second", lambda _: [Binding("", PushingHook("second", calls))])
    applied = hookcore.apply(model, [Pushing(calls=calls), second])
    hookcore.apply(model[0], [toy("other", lambda _: [Binding("", PushingHook("other", others))])])
    model(torch.ones(1, 3))
    assert calls.total() == 6
    applied.reset()
    assert calls.total() == 0
    assert others.total() == 1
    model(torch.ones(1, 3))
    assert calls.total() == 6
    applied.remove()
    applied.reset()  # after removal there is nothing to reset
    assert calls.total() == 6
    hookcore.remove(model)


def test_entries_beyond_forward_are_hooked_and_given_back():
    class Coder(nn.Module):
        def encode(self, x):
            return x + 1

        def decode(self, x):
            return x - 1

        def forward(self, x):
            return self.decode(self.encode(x))

    model, log = Coder(), []
    with hookcore.apply(model, [Recording(log)]):
        model(1)
        model.encode(1)
    assert [(what, entry) for what, _, _, entry in log] == [
        ("pre", "forward"), ("pre", "encode"), ("post", "encode"), ("pre", "decode"), ("post", "decode"),
        ("post", "forward"), ("pre", "encode"), ("post", "encode"),
    ]  # fmt: skip
    assert not set(ENTRIES) & vars(model).keys()
