"""What a plan says that weights need is what they take when the model runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hookcore
from hookcore import BudgetError
from hookcore.testing.cases import arguments_on
from hookcore.testing.modules import Reassigned, module_trees
from hookcore_plugins import (
    DiskOffload,
    GroupOffload,
    LayerwiseCasting,
    ModelOffload,
    SequentialOffload,
)

FOR_EACH_EXAMPLE = settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def module():
    return torch.get_device_module("sim")


def needed(target, technique):
    (nbytes,) = hookcore.plan(target, [technique]).needs.values() or (0,)
    return nbytes


def taken(before):
    """Bytes of the device that are taken between two calls, when outputs are gone."""
    module().synchronize()
    return module().memory_allocated() - before


def run(case, model, times):
    arguments = arguments_on(case.inputs(), torch.device("sim"))
    with torch.no_grad():
        for _ in range(times):
            args, kwargs = arguments
            model(*args, **kwargs)
    del arguments, args, kwargs


def mover_of(model):
    return hookcore.status(model).attachments[0].bindings[0].hook._placement.mover


def lost(model):
    """What packing may add to weights: each begins at a multiple of 64 bytes."""
    return 64 * (1 + len(list(model.parameters())))


options = st.fixed_dictionaries(
    {"offload_type": st.sampled_from(["auto", "block_level", "leaf_level"])},
    optional={"prefetch": st.integers(0, 4), "memory_budget": st.floats(0, 1.2)},
)


@FOR_EACH_EXAMPLE
@given(module_trees(), options, st.integers(1, 4))
def test_streaming_takes_what_the_plan_says(sim, case, options, passes):
    model = case.build()
    if any(isinstance(it, Reassigned) for it in model.modules()):
        return  # what a call replaces is kept, for removal
    options = dict(options)
    if "memory_budget" in options:
        total = sum(it.nbytes for it in (*model.parameters(), *model.buffers()))
        options["memory_budget"] = int(options["memory_budget"] * total)
    technique = GroupOffload("sim", **options)
    before = module().memory_allocated()
    try:
        plan = hookcore.plan(model, [technique])
    except BudgetError as error:
        least = int(str(error).rsplit("works is ", 1)[1].split()[0])
        technique = GroupOffload("sim", **options | {"memory_budget": least})
        plan = hookcore.plan(model, [technique])
        assert sum(plan.needs.values()) <= least
    if not plan.needs:
        return
    (nbytes,) = plan.needs.values()
    assert module().memory_allocated() == before
    hookcore.apply(model, [technique])
    run(case, model, passes)
    found = taken(before)
    if mover_of(model).lingers is False:  # memory is there only while it is used
        assert found <= nbytes
    elif technique.memory_budget is None:
        assert found == nbytes
    else:  # as more of it stays, less of it is rounded up
        assert nbytes - lost(model) <= found <= nbytes <= technique.memory_budget + lost(model)
    hookcore.remove(model)


def stack(widths, blocks=1):
    """Layers in blocks."""
    layers = [nn.Linear(before, after) for before, after in pairwise([*widths, widths[0]])]
    size = -(-len(layers) // blocks)
    return nn.Sequential(*[nn.Sequential(*layers[at : at + size]) for at in range(0, len(layers), size)])


def peak_of(model, x):
    """The most bytes that a call takes besides its input."""
    module().synchronize()
    module().reset_peak_memory_stats()
    before = module().memory_allocated()
    with torch.no_grad():
        for _ in range(4):
            model(x)
    module().synchronize()
    return module().max_memory_allocated() - before


widths = st.lists(st.integers(1, 6).map(lambda it: 8 * it), min_size=2, max_size=8)
excluded = st.lists(st.sampled_from(["0", "0.0"]), max_size=1)
offloads = st.one_of(
    st.builds(GroupOffload, st.just("sim"), prefetch=st.none() | st.integers(0, 3), exclude_modules=excluded),
    st.builds(GroupOffload, st.just("sim"), memory_budget=st.integers(50_000, 150_000)),
    st.builds(SequentialOffload, st.just("sim"), exclude_modules=excluded),
    st.builds(
        GroupOffload,
        st.just("sim"),
        offload_type=st.sampled_from(["block_level", "leaf_level"]),
        use_stream=st.just(False),
        exclude_modules=excluded,
    ),
)


@FOR_EACH_EXAMPLE
@given(widths, st.integers(1, 3), offloads)
def test_not_even_for_a_moment_do_they_take_more(sim, widths, blocks, technique):
    model, bare = (stack(widths, min(blocks, len(widths))) for _ in range(2))
    x = torch.ones(1, widths[0], device="sim")
    activations = peak_of(bare.to("sim"), x)
    del bare
    before = module().memory_allocated()
    nbytes = needed(model, technique)
    applied = hookcore.apply(model, [technique])
    peak = module().memory_allocated() - before + peak_of(model, x)
    assert peak <= nbytes + activations
    if mover_of(model).lingers:
        assert peak >= nbytes - lost(model)
    applied.remove()


@pytest.mark.parametrize("budget", [None, 30_000, 100_000])
def test_of_whole_components_the_largest_counts_or_the_budget(sim, budget):
    models = {"text": nn.Linear(40, 40), "unet": nn.Linear(80, 80), "vae": nn.BatchNorm1d(64)}
    buffers = sum(it.nbytes for it in models["vae"].buffers())
    sizes = [sum(-(-it.nbytes // 64) * 64 for it in model.parameters()) for model in models.values()]
    technique = ModelOffload("sim", memory_budget=budget)
    plan = hookcore.plan(models, [technique])
    largest = sizes[1] + buffers
    assert plan.needs == {"sim": {None: largest, 30_000: 30_000, 100_000: sum(sizes) + buffers}[budget]}
    assert [sum(step.needs.values()) for step in plan.steps][1:] == [0, buffers]
    before = module().memory_allocated()
    applied = hookcore.apply(models, [technique])
    peaks = []
    for _ in range(2 if budget else 1):
        for name, width in (("text", 40), ("unet", 80), ("vae", 64)):
            with torch.no_grad():
                models[name].eval()(torch.ones(1, width))
            peaks.append(taken(before))
    if budget is None:
        assert max(peaks) == largest
    assert max(peaks) <= sum(plan.needs.values())
    applied.remove()


def test_a_plan_prints_what_weights_need(sim):
    models = {"unet": stack([8] * 4), "vae": stack([16] * 4)}
    technique = GroupOffload("sim", prefetch=1, exclude_modules=[])
    one, other = (needed(model, technique) for model in models.values())
    plan = hookcore.plan(models, [technique])
    assert plan.needs == {"sim:0": max(one, other)}  # they have it in turn
    assert str(plan).endswith("\nweights need 2.1 KiB of sim:0")
    assert "weights need" not in str(hookcore.plan(models, []))


@pytest.mark.parametrize("order", [["casting", "offload"], ["offload", "casting"]])
@pytest.mark.parametrize(
    "offload",
    [
        lambda: GroupOffload("sim", prefetch=1),
        lambda: GroupOffload("sim", memory_budget=20_000),
        lambda: GroupOffload("sim", use_stream=False, offload_type="leaf_level"),
        lambda: ModelOffload("sim"),
    ],
)
def test_a_plan_counts_weights_as_they_will_be_stored(sim, order, offload):
    """In either order the casting stands inside, and half of the bytes travel."""
    model = stack([32] * 8)
    plain = sum(hookcore.plan(model, [offload()]).needs.values())
    both = {"casting": LayerwiseCasting("bfloat16"), "offload": offload()}
    technique = [both[name] for name in order]
    needs = sum(hookcore.plan(model, technique).needs.values())
    # With a budget there is room for all of them then.
    half = plain / 2 if plain < 19_000 else sum(it.nbytes for it in model.parameters()) / 2
    assert half <= needs <= half + lost(model)
    before = module().memory_allocated()
    hookcore.apply(model, technique)
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 32))
    assert taken(before) <= needs
    hookcore.remove(model, allow_lossy=True)


def test_a_budget_that_is_enough_for_cast_weights_is_taken(sim):
    model = stack([32] * 4)
    budget = 32 * 33 * 2 + 64
    with pytest.raises(BudgetError):
        hookcore.apply(model, [GroupOffload("sim", memory_budget=budget)])
    hookcore.apply(model, [GroupOffload("sim", memory_budget=budget), LayerwiseCasting("bfloat16")])
    with torch.no_grad():
        assert model(torch.ones(1, 32)).shape == (1, 32)


def test_weights_from_disk_need_their_budget_of_the_host(tmp_path):
    model = stack([32] * 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    whole = sum(it.nbytes for it in model.parameters())
    for budget, expected in ((20_000, 20_000), ("1GiB", None)):
        technique = DiskOffload(tmp_path, memory_budget=budget)
        (needs,) = hookcore.plan(model, [technique]).needs.items()
        assert needs == ("cpu", expected) if expected else whole <= needs[1] < 4 * whole + 20 * 4_096
