"""Order and conflicts, against brute force."""

import itertools

import pytest
import torch
from attrs import frozen
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from techniques import toy
from torch import nn

import hookcore
from hookcore import (
    Binding,
    Claim,
    Component,
    ConflictError,
    Hook,
    ModelConventions,
    OrderError,
    Phase,
    PlanError,
    PluginError,
    Resource,
    Skipped,
    Technique,
)
from hookcore.conflicts import check_conflicts
from hookcore.errors import HookSite
from hookcore.plan import PlanStep, make_step, ordered
from hookcore.testing.modules import Reassigned, module_trees
from hookcore.testing.snapshot import ModelSnapshot


def component(module, name=""):
    return Component(name, module, lambda _: ModelConventions())


def step(technique, on):
    return make_step(technique, on)


# Order

NAMES = ("a", "b", "c", "d", "e")


@frozen
class Wish:
    name: str
    phase: Phase
    before: tuple[str, ...]
    after: tuple[str, ...]
    module: int


def wishes(modules=1):
    def wish(name):
        others = st.lists(st.sampled_from(NAMES), max_size=1).map(tuple)
        return st.builds(
            Wish, st.just(name), st.sampled_from(Phase), others, others, st.integers(0, modules - 1)
        )

    return st.permutations(NAMES).flatmap(
        lambda names: st.integers(0, len(names)).flatmap(
            lambda count: st.tuples(*(wish(name) for name in names[:count]))
        )
    )


def has_to_stand_outside(first, second):
    return first is not second and (
        first.phase < second.phase
        or (first.module == second.module and (second.name in first.before or first.name in second.after))
    )


def make_steps(wishes, modules):
    return [
        step(
            toy(wish.name, phase=wish.phase, before=wish.before, after=wish.after),
            component(modules[wish.module]),
        )
        for wish in wishes
    ]


def constrained(first, second):
    return first.module == second.module and has_to_stand_outside(first, second)


def fits(order, wishes):
    return not any(
        constrained(wishes[later], wishes[earlier]) for earlier, later in itertools.combinations(order, 2)
    )


@given(wishes(modules=2))
def test_the_order_is_the_first_that_fits_phases_then_names_then_the_users_order(wishes):
    modules = [nn.Identity(), nn.Identity()]
    steps = make_steps(wishes, modules)
    fitting = [order for order in itertools.permutations(range(len(wishes))) if fits(order, wishes)]
    if not fitting:
        with pytest.raises(OrderError):
            ordered(steps)
        event("cycle")
        return
    found = tuple(steps.index(item) for item in ordered(steps))
    # Of all orders that fit, the one that stays closest to phase and then to what the user wrote: at each
    # place, whatever may stand there and comes first.
    assert found == min(fitting, key=lambda order: [(wishes[index].phase, index) for index in order])


@given(wishes())
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_cycle_is_named_by_exactly_its_members(wishes):
    steps = make_steps(wishes, [nn.Identity()])
    try:
        ordered(steps)
    except OrderError as error:
        named = str(error).split(": ")[1].split(". ")[0].split(" outside ")
    else:
        assume(False)
    by_name = {wish.name: wish for wish in wishes}
    assert named[0] == named[-1]
    assert len(set(named)) == len(named) - 1
    for outer, inner in itertools.pairwise(named):
        assert has_to_stand_outside(by_name[outer], by_name[inner])


def test_a_technique_may_name_itself():
    """Two of one kind, such as on disjoint submodules of two overlapping components, keep their order."""
    module = nn.Identity()
    again = [step(toy("a", before=("a",), after=("a",)), component(module)) for _ in range(2)]
    assert ordered(again) == again


def test_techniques_on_disjoint_modules_do_not_constrain_each_other():
    first, second = toy("first", before=("second",)), toy("second", before=("first",))
    apart = [step(first, component(nn.Identity())), step(second, component(nn.Identity()))]
    assert ordered(apart) == apart
    module = nn.Identity()
    with pytest.raises(OrderError, match=r"first outside second outside first|second outside first outside"):
        ordered([step(first, component(module)), step(second, component(module))])


@given(module_trees(), st.data())
def test_components_share_what_modules_and_tensors_they_have_in_common(case, data):
    model = case.build()
    fqns = st.sampled_from(list(dict(model.named_modules())))
    one, other = (model.get_submodule(data.draw(fqns)) for _ in range(2))

    def things(module):
        return {id(it) for it in (*module.modules(), *module.parameters(), *module.buffers())}

    expected = bool(things(one) & things(other))
    first, second = component(one), component(other)
    tied_by_views = any(
        set(map(id, slot.tensors)) & things(one) and set(map(id, slot.tensors)) & things(other)
        for slot in component(model).slots
        if len(slot.tensors) > 1
    )
    assume(expected or not tied_by_views)
    steps = [step(toy("x", before=("y",)), second), step(toy("y", before=("x",)), first)]
    if expected:
        with pytest.raises(OrderError):
            ordered(steps)
    else:
        assert ordered(steps) == steps


# Conflicts


@frozen
class Wanted:
    """What one technique wants: claims by index of the model's tensors or modules."""

    name: str
    tensors: tuple[int, ...]
    entries: tuple[int, ...]
    resource: str
    root: int


def wanted(name):
    indices = st.lists(st.integers(0, 30), max_size=2).map(tuple)
    resources = st.sampled_from([Resource.PLACEMENT, Resource.STORAGE_DTYPE, "my own"])
    return st.builds(Wanted, st.just(name), indices, indices, resources, st.integers(0, 30))


def bind_wanted(want, on):
    """Claims on each tensor through the module that holds it, and on entries of modules."""
    names = list(on.slot_of)
    fqns = list(on.modules)
    for index in dict.fromkeys(want.tensors):
        if names:
            yield Binding(
                "", Hook(), f"entry{index}", claims=[Claim(want.resource, names[index % len(names)])]
            )
    for index in dict.fromkeys(index % len(fqns) for index in want.entries):
        yield Binding(fqns[index], Hook(), claims=[Claim(want.resource)])


def things_of(want, on):
    """Everything a technique owns, as keys: reference for conflicts."""
    names, fqns = list(on.slot_of), list(on.modules)
    owned = set()
    for index in want.tensors:
        if names:
            for tensor in on.slot_of[names[index % len(names)]].tensors:
                owned.add((want.resource, id(tensor)))
    for index in want.entries:
        owned.add((want.resource, id(on.modules[fqns[index % len(fqns)]]), "forward"))
    return owned


@given(module_trees(), wanted("first"), wanted("second"), st.booleans())
def test_techniques_conflict_exactly_when_they_claim_the_same_thing(case, first, second, existing):
    """Whole trees and subtrees, tied tensors and shared modules; on the model already, or with it."""
    model = case.build()
    for module in model.modules():
        for index in range(31):
            vars(module)[f"entry{index}"] = len  # an entry for each claim on a tensor
    fqns = list(dict(model.named_modules()))
    steps = []
    for want in (first, second):
        on = component(model.get_submodule(fqns[want.root % len(fqns)]))
        steps.append(step(toy(want.name, lambda on, want=want: bind_wanted(want, on)), on))
    overlap = set.intersection(
        *(things_of(want, it.component) for want, it in zip((first, second), steps, strict=True))
    )
    event("overlap" if overlap else "none")
    new, old = (steps[1:], steps[:1]) if existing else (steps, [])
    if not overlap:
        check_conflicts(new, old)
        return
    with pytest.raises(ConflictError) as caught:
        check_conflicts(new, old)
    error = caught.value
    assert error.first in sites(steps[0])
    assert error.second in sites(steps[1])
    text = str(error)
    assert text.startswith(f"second cannot claim the {first.resource} of ")
    assert "first already holds it, through its hook at " in text
    remedy = "Call applied.remove() on the first" if existing else "Give only one of them"
    assert text.endswith(f"{remedy}, or leave the module out of one of them")


def sites(planned):
    """Where the hooks of a step stand, as errors say it."""
    on = planned.component.name
    return [HookSite(planned.technique.name, on, it.fqn, it.entry) for it in planned.bindings]


def claiming(name, claims=(), fqn="", entry="forward", **attributes):
    return toy(name, lambda _: [Binding(fqn, Hook(), entry, claims=claims)], **attributes)


def tied():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    model["other"].weight = model["one"].weight
    return model


def test_a_conflict_names_both_sides_the_thing_and_the_remedy():
    on = component(tied(), "unet")
    first = step(claiming("moves", [Claim(Resource.PLACEMENT, "one.weight")], "one"), on)
    second = step(claiming("streams", [Claim(Resource.PLACEMENT, "other.weight")], "other"), on)
    with pytest.raises(ConflictError) as caught:
        check_conflicts([first, second], [])
    assert str(caught.value) == (
        "streams cannot claim the placement of 'unet.other.weight': moves already holds it, through its hook "
        "at 'unet.one'. Give only one of them, or leave the module out of one of them"
    )
    held, wanted = caught.value.first, caught.value.second
    assert held == HookSite("moves", "unet", "one", "forward")
    assert wanted == HookSite("streams", "unet", "other", "forward")


def test_a_conflict_over_an_entry_names_the_entry():
    on = component(nn.Identity(), "vae")
    slices, tiles = (
        step(claiming(name, [Claim(Resource.SPATIAL_SPLIT)]), on) for name in ("slices", "tiles")
    )
    with pytest.raises(ConflictError) as caught:
        check_conflicts([tiles], [slices])
    assert str(caught.value) == (
        "tiles cannot claim the spatial split of forward() of 'vae': slices already holds it, through its "
        "hook at 'vae'. Call applied.remove() on the first, or leave the module out of one of them"
    )


@pytest.mark.parametrize(
    ("existing", "found"),
    [
        (1, "it has already been applied there. Call applied.remove() on the first"),
        (0, "it is given twice. Give only one of them"),
    ],
)
def test_one_technique_twice_on_one_entry_is_refused(existing, found):
    on = component(nn.Identity(), "vae")
    technique = claiming("slicing")
    steps = [step(technique, on) for _ in range(2)]
    with pytest.raises(ConflictError) as caught:
        check_conflicts(steps[existing:], steps[:existing])
    assert str(caught.value) == (
        f"slicing cannot claim forward() of 'vae': {found}, or leave the module out of one of them"
    )


@pytest.mark.parametrize(
    ("existing", "found"),
    [
        (1, "it has already been applied there, with other options. Call applied.remove() on the first"),
        (0, "it is given twice, with other options. Give only one of them"),
    ],
)
def test_two_of_one_name_conflict_where_they_claim_the_same(existing, found):
    on = component(nn.Identity(), "vae")
    steps = [step(claiming("slicing", [Claim(Resource.BATCH_SPLIT)]), on) for _ in range(2)]
    with pytest.raises(ConflictError) as caught:
        check_conflicts(steps[existing:], steps[:existing])
    assert str(caught.value) == (
        f"slicing cannot claim the batch split of forward() of 'vae': {found}, or leave the module out of "
        "one of them"
    )


class Affine(Hook):
    def __init__(self, factor, term):
        self.factor, self.term = factor, term

    def post_forward(self, module, output):
        return output * self.factor + self.term


@frozen
class Maps(Technique):
    """Maps what some entries of a module put out, which in another order gives something else."""

    name = "maps"
    phase = Phase.COMPUTE

    factor: int
    term: int
    entries: tuple = ("forward",)

    def bind(self, component):
        return [Binding("", Affine(self.factor, self.term), entry) for entry in self.entries]


maps = st.builds(
    Maps,
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([("forward",), ("decode",), ("forward", "decode")]),
)


@given(st.lists(maps, max_size=5), st.data())
def test_techniques_of_one_class_stand_at_one_entry_in_the_order_given(techniques, data):
    """However many calls of `apply` they are spread over, and whichever is taken off again."""
    model = nn.Identity()
    model.decode = model.forward
    on: list[Maps] = []
    handles = []
    for technique in techniques:
        again = any(it == technique for it in on)
        if again:
            with pytest.raises(ConflictError, match="it has already been applied there"):
                hookcore.apply(model, [technique])
        else:
            handles.append(hookcore.apply(model, [technique]))
            on.append(technique)
    if on and data.draw(st.booleans(), label="given at once"):
        for handle in handles:
            handle.remove()
        handles = [hookcore.apply(model, list(on))]
    elif on and data.draw(st.booleans(), label="one is taken off"):
        at = data.draw(st.integers(0, len(on) - 1), label="which")
        handles.pop(at).remove()
        on.pop(at)
    for entry in ("forward", "decode"):
        expected = 1
        for technique in reversed(on):  # the first stands outermost
            if entry in technique.entries:
                expected = expected * technique.factor + technique.term
        assert getattr(model, entry)(1) == expected


def test_one_technique_may_hook_different_entries_and_different_resources_of_one_module():
    module = nn.Identity()
    module.encode = module.forward
    on = component(module)
    check_conflicts([step(claiming("a"), on)], [step(claiming("a", entry="encode"), on)])
    check_conflicts(
        [step(claiming("a", [Claim(Resource.CODE)]), on)],
        [step(claiming("b", [Claim(Resource.ATTENTION)]), on)],
    )


def test_the_name_of_a_technique_is_no_resource():
    on = component(nn.Identity())
    named, claims = claiming("attention"), claiming("other", [Claim(Resource.ATTENTION)])
    check_conflicts([step(named, on), step(claims, on)], [])


def test_a_technique_does_not_conflict_with_itself():
    """An offload holds a tied weight at both of its users."""
    on = component(tied())
    claims = [Claim(Resource.PLACEMENT, "one.weight")]
    bindings = [Binding("one", Hook(), claims=claims), Binding("other", Hook(), claims=claims)]
    check_conflicts([step(toy("moves", lambda _: bindings), on)], [])


def test_the_third_technique_conflicts_with_the_first():
    on = component(nn.Sequential(nn.Identity(), nn.Identity()))
    steps = [
        step(claiming(name, [Claim(Resource.MEMORY_FORMAT)], fqn), on)
        for name, fqn in (("one", "0"), ("two", "1"), ("three", "0"))
    ]
    with pytest.raises(ConflictError, match="^three cannot claim .*: one already holds it"):
        check_conflicts(steps, [])


@pytest.mark.parametrize("existing", [False, True])
def test_siblings_conflict_over_a_weight_that_they_share(existing):
    """Neither component has a place in common with the other; the tensor is all that they share."""
    model = tied()
    steps = [
        step(claiming(name, [Claim(Resource.PLACEMENT, "weight")]), component(model[fqn], fqn))
        for name, fqn in (("moves", "one"), ("streams", "other"))
    ]
    new, old = (steps[1:], steps[:1]) if existing else (steps, [])
    with pytest.raises(ConflictError, match=r"^streams cannot claim the placement of 'other\.weight': moves"):
        check_conflicts(new, old)


@pytest.mark.parametrize("replace", [Reassigned.forward, lambda module, x: setattr(module, "steps", x)])
def test_a_place_stays_claimed_when_another_tensor_is_put_there(replace):
    """By a forward that replaces its buffer, or a load with `assign=True`."""
    model = nn.Sequential(Reassigned(2))
    first = step(claiming("moves", [Claim(Resource.PLACEMENT, "0.steps")]), component(model))
    replace(model[0], torch.ones(1, 2))
    second = step(claiming("streams", [Claim(Resource.PLACEMENT, "steps")]), component(model[0]))
    with pytest.raises(ConflictError, match="^streams cannot claim the placement of 'steps': moves already"):
        check_conflicts([second], [first])


def test_components_of_one_mapping_conflict_where_they_share_a_module():
    shared = nn.Linear(2, 2)
    one, other = nn.ModuleDict({"text": shared}), nn.ModuleDict({"also": shared})
    moves = [
        step(claiming("moves", [Claim(Resource.PLACEMENT, f"{fqn}.weight")], fqn), component(model, name))
        for model, name, fqn in ((one, "one", "text"), (other, "other", "also"))
    ]
    with pytest.raises(
        ConflictError,
        match=r"^moves cannot claim .* 'other\.also\.weight': it already does so at 'one\.text'\. Leave out",
    ):
        check_conflicts(moves, [])


@pytest.mark.parametrize("swapped", [False, True])
def test_incompatible_techniques_are_refused_on_shared_modules_only(swapped):
    module = nn.Identity()
    shy, other = claiming("shy", incompatible_with=("other",)), claiming("other")
    steps = [step(shy, component(module)), step(other, component(module))]
    new, old = (steps[:1], steps[1:]) if swapped else (steps[1:], steps[:1])
    with pytest.raises(ConflictError, match="^shy does not work together with other on 'Identity'") as caught:
        check_conflicts(new, old)
    assert {caught.value.first, caught.value.second} == {sites(it)[0] for it in steps}
    check_conflicts([step(shy, component(nn.Identity())), step(other, component(nn.Identity()))], [])


@pytest.mark.parametrize(
    ("forbids", "fqn", "claims", "hidden"),
    [
        ("*", "0.0", [], True),
        ("*", "0", [], False),
        ("*", "1", [], False),
        (Resource.ATTENTION, "0.0", [Claim(Resource.ATTENTION)], True),
        (Resource.ATTENTION, "0.0", [Claim(Resource.CODE)], False),
        (Resource.ATTENTION, "0.0", [], False),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_what_a_traced_module_hides_is_refused_below_it(forbids, fqn, claims, hidden, existing):
    on = component(nn.Sequential(nn.Sequential(nn.Identity()), nn.Identity()), "unet")
    traces = step(toy("traces", lambda _: [Binding("0", Hook(), forbids_below=[forbids])]), on)
    inner = step(claiming("inner", claims, fqn), on)
    new, old = ([traces], [inner]) if existing else ([traces, inner], [])
    if not hidden:
        check_conflicts(new, old)
        return
    with pytest.raises(ConflictError) as caught:
        check_conflicts(new, old)
    assert str(caught.value) == (
        f"traces at 'unet.0' hides the modules below it, so that inner at 'unet.{fqn}' would never run. "
        "Leave that module out of one of them"
    )


def test_a_technique_may_hide_what_is_its_own():
    on = component(nn.Sequential(nn.Identity()))
    bindings = [Binding("", Hook(), forbids_below=["*"]), Binding("0", Hook())]
    check_conflicts([step(toy("traces", lambda _: bindings), on)], [])


# Bindings

HOOK = Hook()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["forward"], r"^bad\.bind\(\) gave 'forward'; expected a Binding of a Hook, or a Skipped$"),
        ([Binding("", "no hook")], r"^bad\.bind\(\) gave Binding\(.*expected a Binding of a Hook"),
        ([Binding("nowhere", Hook())], r"^bad\.bind\(\) names a module 'nowhere' that vae lacks$"),
        (
            [Binding("0", Hook(), "decode")],
            r"^bad\.bind\(\) names an entry 'decode' that 'vae\.0' \(Linear\) lacks$",
        ),
        ([Binding("0", Hook(), "weight")], r"names an entry 'weight' that 'vae\.0' \(Linear\) lacks$"),
        (
            [Binding("0", Hook(), claims=[Claim("placement", "weight")])],
            r"^bad\.bind\(\) claims a tensor 'weight' that vae lacks$",
        ),
        ([Binding("", HOOK), Binding("0", HOOK)], r"^bad binds one hook object twice; each binding needs"),
    ],
)
def test_bindings_that_do_not_fit_are_refused(items, message):
    with pytest.raises(PluginError, match=message):
        make_step(toy("bad", lambda _: items), component(nn.Sequential(nn.Linear(1, 1)), "vae"))


def test_a_step_has_what_its_technique_bound():
    binding, skipped = (
        Binding("0", Hook(), claims=iter([Claim("placement", "0.weight")])),
        Skipped("", "root"),
    )
    made = make_step(
        toy("good", lambda _: iter([binding, skipped])), component(nn.Sequential(nn.Linear(1, 1)), "x")
    )
    assert made.technique.name == "good"
    assert made.component.name == "x"
    assert made.bindings == (binding,)
    assert made.bindings[0].claims == (Claim("placement", "0.weight"),)
    assert made.skipped == (skipped,)


def test_a_technique_without_bind_says_so():
    @frozen
    class Unfinished(Technique):
        name = "unfinished"
        phase = Phase.COMPUTE

    with pytest.raises(NotImplementedError, match=r"^Unfinished has to define bind\(\)"):
        make_step(Unfinished(), component(nn.Identity()))


def test_plan_errors_of_a_technique_go_through():
    def refuse(_):
        raise PlanError("num_blocks is too large")

    with pytest.raises(PlanError, match="^num_blocks is too large$"):
        hookcore.plan(nn.Identity(), [toy("picky", refuse)])


# The plan as a whole


@given(module_trees(), wishes())
@settings(max_examples=60)
def test_planning_touches_nothing_and_shows_the_order_in_which_things_will_stand(case, wishes):
    model = case.build()
    snapshot = ModelSnapshot.take(model)
    techniques = [
        toy(
            wish.name,
            lambda _: [Binding("", Hook()), Skipped("", "a reason")],
            phase=wish.phase,
            before=wish.before,
            after=wish.after,
        )
        for wish in wishes
    ]
    try:
        made = hookcore.plan(model, techniques)
    except OrderError:
        event("cycle")
        made = None
    snapshot.assert_restored(model, same_storage=True)
    assert hookcore.status(model).attachments == ()
    if made is None:
        return
    lines = [line for line in str(made).splitlines() if not line.startswith("skipped by")]
    assert [line.split()[1] for line in lines[2:]] == [it.technique.name for it in made.steps]
    with hookcore.apply(model, techniques):
        assert hookcore.status(model).techniques == tuple(it.technique.name for it in made.steps)
    snapshot.assert_restored(model, same_storage=True)


@given(wishes(), wishes())
@settings(max_examples=60)
def test_what_is_added_later_stands_where_its_plan_showed_it(earlier, later):
    model = nn.Identity()
    later = [wish for wish in later if wish.name not in {it.name for it in earlier}]
    try:
        for wish in earlier:
            hookcore.apply(model, [one(wish)])
        made = hookcore.plan(model, [one(wish) for wish in later])
        hookcore.apply(model, [one(wish) for wish in later])
    except OrderError:
        hookcore.remove(model)
        return
    now = hookcore.status(model).techniques
    hooks = vars(model)["forward"].hooks if now else ()
    names = [type(hook).__name__ for hook in hooks]
    hookcore.remove(model)
    assert [name for name in now if name in {wish.name for wish in later}] == [
        it.technique.name for it in made.steps
    ]
    assert names == list(now)


def one(wish):
    hook = type(wish.name, (Hook,), {"pre_forward": lambda self, module, args, kwargs: None})
    return toy(
        wish.name, lambda _: [Binding("", hook())], phase=wish.phase, before=wish.before, after=wish.after
    )


def test_a_plan_step_is_itself_only():
    on = component(nn.Identity())
    first, second = (PlanStep(toy("a"), on, ()) for _ in range(2))
    assert first != second
