"""Tracing: what a call gives is the same, in class and value, and never that of another call."""

import copy
import types

import pytest
import torch
from attrs import frozen
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import hookcore
from hookcore import Binding, ConflictError, Hook, Phase, PlanError, Technique, UnsupportedModelError
from hookcore.testing.cases import tensors_in
from hookcore.testing.models import autoencoder, bert, flux, unet
from hookcore.testing.snapshot import ModelSnapshot
from hookcore_plugins import ChannelsLast, Compile, GroupOffload, LayerwiseCasting, ModelOffload, Trace


def count(model):
    """Traces, traced calls and untraced calls."""
    (found,) = (it.counted for it in hookcore.status(model).run_report().entries if it.technique == "trace")
    assert sum(found.reasons.values()) == found.untraced_calls
    return found.traces, found.traced_calls, found.untraced_calls


def arguments(case, entry="forward", seed=0):
    """Arguments by name, for an output of the library's own class."""
    _, kwargs = case.inputs(entry, seed)
    return kwargs | {"return_dict": True}


def called(model, entry, kwargs):
    with torch.no_grad():
        return model(**kwargs) if entry == "forward" else getattr(model, entry)(**kwargs)


def same(got, expected):
    return type(got) is type(expected) and all(
        torch.allclose(one, other, atol=1e-5)
        for one, other in zip(tensors_in(got), tensors_in(expected), strict=True)
    )


class Model(nn.Module):
    """Whose calls look at everything that a trace would freeze."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x, factor=1, *, as_dict=False):
        y = self.layer(x) * factor + x.shape[0] + self.shift
        if self.training:
            y = -y
        return {"y": y, "factor": factor} if as_dict else y


# Real models


@pytest.mark.parametrize(
    ("make", "entry"),
    [(unet, "forward"), (autoencoder, "encode"), (autoencoder, "decode"), (bert, "forward")],
)
def test_outputs_keep_their_class_and_files_give_the_same(make, entry, tmp_path):
    case = make()
    model, bare = case.build(), case.build()
    path = tmp_path / "trace.pt"
    for _ in range(2):
        handle = hookcore.apply(model, [Trace(arguments(case, entry, 5), entry=entry, path=path)])
        for seed in (1, 2):
            kwargs = arguments(case, entry, seed)
            assert same(called(model, entry, kwargs), called(bare, entry, kwargs))
        assert count(model) == (1, 2, 0)
        written = path.stat().st_mtime_ns
        assert (model.config, model.dtype, model.device) == (bare.config, bare.dtype, bare.device)
        handle.remove()
    assert path.stat().st_mtime_ns == written  # the second time it was read


def test_a_file_holds_no_weights_and_serves_other_ones(tmp_path):
    path = tmp_path / "trace.pt"
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 500))
    x = torch.randn(2, 500)
    with hookcore.apply(model, [Trace(x, path=path)]):
        assert torch.equal(model(x), model[1](model[0](x)))
    assert path.stat().st_size < 50_000
    other = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 500))
    with hookcore.apply(other, [Trace(x, path=path)]), torch.no_grad():
        assert torch.allclose(other(x), other[1](other[0](x)))
        other[0].weight.mul_(3)
        other[1].bias.data = torch.ones(500)
        assert torch.allclose(other(x), other[1](other[0](x)))


def test_with_model_offloading_and_channels_last():
    case = flux()
    model, bare = case.build(), case.build()
    hookcore.apply(model, [Trace(arguments(case)), ModelOffload("cpu"), ChannelsLast()])
    kwargs = arguments(case, seed=1)
    assert same(called(model, "forward", kwargs), called(bare, "forward", kwargs))
    assert count(model)[1] == 1


def test_a_model_that_goes_to_a_device_is_traced_there(sim):
    """A small one: kernels of the simulator that call others are constants to torch.jit."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    bare = copy.deepcopy(model)
    hookcore.apply(model, [ModelOffload("sim")])
    hookcore.apply(model, [Trace(torch.randn(2, 4))])
    assert count(model)[0] == 0  # its weights are elsewhere by now
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 4)
            assert torch.equal(model(x).cpu(), bare(x))
    assert count(model) == (1, 2, 0)


# Never another call's


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shown=st.sampled_from([1, 2, 3, None]),
    factor=st.sampled_from([1, 2, 1.0, None]),
    modes=st.tuples(*[st.booleans()] * 4),
)
@example(rows=2, dtype=torch.float32, shown=3, factor=2, modes=(False,) * 4)
@example(rows=2, dtype=torch.float32, shown=None, factor=None, modes=(False, True, False, False))
def test_a_call_that_is_not_like_the_example_runs_untraced(rows, dtype, shown, factor, modes):
    as_dict, training, by_name, gradients = modes
    torch.manual_seed(0)
    model = Model().eval()
    bare = copy.deepcopy(model)
    inputs = (torch.randn(2, 4),) if shown is None else (torch.randn(2, 4), shown)
    hookcore.apply(model, [Trace(inputs)])
    for it in (model, bare):
        it.train(training).to(dtype)
    x = torch.randn(rows, 4, dtype=dtype)
    args, kwargs = ((), {"x": x}) if by_name else ((x,), {})
    kwargs |= {"as_dict": as_dict} | ({} if factor is None else {"factor": factor})
    with torch.set_grad_enabled(gradients):
        got, expected = model(*args, **kwargs), bare(*args, **kwargs)
    assert type(got) is type(expected)
    if as_dict:
        assert got.pop("factor") is expected.pop("factor")
    assert all(map(torch.equal, tensors_in(got), tensors_in(expected)))
    assert [it.requires_grad for it in tensors_in(got)] == [gradients]
    same_factor = type(factor) is not float and (factor or 1) == (shown or 1)
    is_traced = rows == 2 and not as_dict and same_factor and dtype is torch.float32
    assert count(model)[1:] == (is_traced, not is_traced)


def test_why_a_call_was_not_traced_is_said():
    model = Model()
    handle = hookcore.apply(model, [Trace(torch.randn(2, 4))])
    for x, factor in ((torch.randn(3, 4), 1), (torch.randn(2, 4), 7)):
        model(x, factor)
    assert count(model) == (1, 0, 2)
    text = " ".join(str(handle.run_report()).split())
    told = "it has a tensor of float32 (3, 4) where the example has a tensor of float32 (2, 4)"
    assert f"Model: 1 x not traced: {told}" in text
    assert "Model: 1 x not traced: it has 7 where the example has 1, as factor" in text
    handle.reset()
    assert count(model)[2] == 0


def test_weights_may_change_between_calls():
    model = Model()
    hookcore.apply(model, [Trace(torch.randn(2, 4))])
    bare = Model()
    x = torch.randn(2, 4)
    changes = (
        lambda it: it.layer.weight.mul_(2),
        lambda it: setattr(it.layer.bias, "data", torch.ones(4)),
        lambda it: it.load_state_dict({name: value * 2 for name, value in it.state_dict().items()}),
        lambda it: setattr(it.layer, "weight", nn.Parameter(torch.ones(4, 4))),
        lambda it: it.load_state_dict(copy.deepcopy(it.state_dict()), assign=True),
        lambda it: setattr(it, "layer", nn.Linear(4, 4, bias=False).apply(ones)),
    )
    bare.load_state_dict(model.state_dict())
    with torch.no_grad():
        for change in changes:
            change(model), change(bare)
            assert torch.equal(model(x), bare(x))
    assert count(model)[2] == 0


def ones(module):
    nn.init.ones_(module.weight)


def test_gradients_flow_through_a_trace():
    model = Model()
    bare = copy.deepcopy(model)
    hookcore.apply(model, [Trace(torch.randn(2, 4))])
    x = torch.randn(2, 4)
    for it in (model, bare):
        it(x).square().sum().backward()
    assert torch.equal(model.layer.weight.grad, bare.layer.weight.grad)
    assert count(model)[1] == 1


def test_tracing_leaves_buffers_and_random_numbers_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    before = ModelSnapshot.take(model)
    state = torch.random.get_rng_state()
    handle = hookcore.apply(model, [Trace(torch.randn(3, 4, generator=torch.Generator()))])
    assert torch.equal(torch.random.get_rng_state(), state)
    handle.remove()
    before.assert_restored(model, same_storage=True)


# Refused


@frozen
class Watching(Technique):
    name = "watching"
    phase = Phase.COMPUTE

    def bind(self, component):
        hook = type("Watcher", (Hook,), {"pre_forward": lambda *_: None})()
        yield Binding("layer", hook)


@pytest.mark.parametrize(
    "other",
    [
        GroupOffload("cpu", offload_type="leaf_level"),
        LayerwiseCasting("bfloat16"),
        Watching(),
        Compile(backend="eager", regional=False),
    ],
)
def test_hooks_that_a_trace_would_freeze_are_refused(other):
    model = Model()
    for first, second in ((Trace(torch.randn(2, 4)), other), (other, Trace(torch.randn(2, 4)))):
        handle = hookcore.apply(model, [first])
        before = ModelSnapshot.take(model)
        with pytest.raises(ConflictError):
            hookcore.apply(model, [second])
        before.assert_restored(model, same_storage=True)
        handle.remove(allow_lossy=True)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: object(), "its output holds a object, which a trace cannot give back"),
        (lambda self, x: self.layer(x) + torch.rand(()), r"cannot trace Model\.forward\(\): Output nr 1"),
        (lambda self, x: setattr(self, "shift", self.shift + 1) or x, "puts another tensor in the place of"),
    ],
)
def test_what_a_trace_would_not_do_is_refused_and_leaves_no_trace(forward, message):
    model = Model()
    model.forward = types.MethodType(forward, model)
    before = ModelSnapshot.take(model)
    with pytest.raises(UnsupportedModelError, match=message):
        hookcore.apply(model, [Trace(torch.randn(2, 4))])
    before.assert_restored(model, same_storage=True)


def test_examples_are_checked_before_anything_is_touched():
    with pytest.raises(TypeError, match="example_inputs is a list"):
        Trace([torch.zeros(1)])
    with pytest.raises(ValueError, match="entry is '2x'"):
        Trace(torch.zeros(1), entry="2x")
    for options, message in (
        ({"example_inputs": {"z": torch.zeros(1)}}, r"do not fit Model\.forward\(\): missing a required"),
        ({"example_inputs": (), "entry": "decode"}, "has no method 'decode'"),
        ({"example_inputs": (1,)}, "has no tensor"),
    ):
        with pytest.raises(PlanError, match=message):
            hookcore.plan(Model(), [Trace(**options)])
    assert Trace(torch.ones(2)) == Trace(torch.ones(2)) != Trace(torch.zeros(2))
    assert hash(Trace({"x": torch.ones(2)})) == hash(Trace({"x": torch.ones(2)}))


def test_a_plan_says_what_torch_recommends():
    with pytest.warns(DeprecationWarning, match=r"switch to `torch\.compile` or `torch\.export`"):
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    assert "torch.jit.trace is deprecated" in str(hookcore.plan(Model(), [Trace(torch.zeros(2, 4))]))


def test_a_file_of_another_call_is_refused(tmp_path):
    path = tmp_path / "trace.pt"
    with hookcore.apply(Model(), [Trace(torch.randn(2, 4), path=path)]):
        pass
    other = Model()
    other.layer = nn.Linear(4, 4, bias=False)
    cases = [
        (Model(), torch.randn(3, 4), "its inputs is"),
        (other, torch.randn(2, 4), "its tensors is"),
        (nn.Linear(4, 4), torch.randn(2, 4), "its model is"),
        (Model().eval(), torch.randn(2, 4), "its training is True, expected False"),
    ]
    for model, x, message in cases:
        with pytest.raises(PlanError, match=f"does not fit: {message}"):
            hookcore.apply(model, [Trace(x, path=path)])
        assert not hookcore.status(model).attachments
    path.write_bytes(b"nothing")
    with pytest.raises(PlanError, match="is no trace that was saved here"):
        hookcore.apply(Model(), [Trace(torch.randn(2, 4), path=path)])


# The same call in another form


class Forms(nn.Module):
    """A model whose calls can be written in many ways."""

    defaults = {"factor": 1, "sizes": (2, [3.0]), "options": None, "shift": None, "kind": "plus"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, factor=1, sizes=(2, [3.0]), options=None, *, shift=None, kind="plus", **more):
        y = self.layer(x) * factor + sizes[0] * sizes[1][0]
        tensors = tensors_in([shift, *more.values(), options])
        return y + sum(tensors) if kind == "plus" else y - sum(tensors)


@st.composite
def values(draw):
    """The arguments of a call of `Forms`, by name."""
    tensor = torch.randn(2, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    values = {
        "x": tensor,
        "factor": draw(st.sampled_from([1, 2, 1.5])),
        "sizes": draw(st.sampled_from([(2, [3.0]), (2, [4.0]), [2, [3.0]]])),
        "options": draw(st.sampled_from([None, {}, {"a": tensor, "b": 1}, {"b": {"c": [tensor]}}])),
        "shift": draw(st.sampled_from([None, tensor])),
        "kind": draw(st.sampled_from(["plus", "minus"])),
    }
    return values | dict.fromkeys(draw(st.sets(st.sampled_from("uvw"))), tensor)


def written(draw, values):
    """A way to write a call: positional arguments, and named ones in any order, with or without defaults."""
    named = copy.deepcopy(values)
    names = draw(st.permutations(list(named)))
    at = draw(st.integers(0, 4))
    args = tuple(named[name] for name in list(values)[:at])
    for name in list(values)[:at]:
        del named[name]
    for name, default in Forms.defaults.items():
        if name in named and equal(named[name], default) and draw(st.booleans()):
            del named[name]
    return args, {name: named[name] for name in names if name in named}


def equal(value, default):
    return type(value) is type(default) and value == default


@settings(max_examples=60, deadline=None)
@given(values(), st.data())
def test_a_call_in_another_form_is_traced(example, data):
    model = Forms().eval()
    example_args, example_kwargs = written(data.draw, example)
    inputs = example_kwargs if not example_args else example_args if not example_kwargs else example
    with torch.no_grad():
        handle = hookcore.apply(model, [Trace(inputs)])
        for _ in range(3):
            args, kwargs = written(data.draw, example)
            assert torch.equal(model(*args, **kwargs), Forms.forward(model, *args, **kwargs))
    assert count(model) == (1, 3, 0)
    handle.remove()


@settings(max_examples=20, deadline=None)
@given(values(), st.data())
def test_a_file_fits_the_same_call_in_another_form(tmp_path_factory, example, data):
    """Also where a default is an object that each process makes anew."""
    path = tmp_path_factory.mktemp("trace") / "trace.pt"
    contents = []
    for _ in range(2):
        args, kwargs = written(data.draw, example)
        inputs = kwargs if not args else args if not kwargs else example
        with hookcore.apply(Forms().eval(), [Trace(inputs, path=path)]):
            contents.append(path.read_bytes())
    assert contents[0] == contents[1]


@settings(max_examples=100, deadline=None)
@given(values(), values(), st.data())
def test_the_first_difference_of_a_call_is_said_and_it_runs_untraced(example, other, data):
    """By the argument's name, its place in it, and both values."""
    model = Forms().eval()
    args, kwargs = written(data.draw, other)
    with torch.no_grad():
        handle = hookcore.apply(model, [Trace(example)])
        assert torch.equal(model(*args, **kwargs), Forms.forward(model, *args, **kwargs))
    (entry,) = handle.run_report().entries
    differing = [
        name
        for name in dict.fromkeys([*example, *other])
        if name != "x" and shape_of(example.get(name, ...)) != shape_of(other.get(name, ...))
    ]
    assert bool(differing) == (entry.counted.untraced_calls == 1)
    if differing:
        (reason,) = entry.counted.reasons
        assert any(
            f"as {name}" in reason or f"{name}[" in reason or f"[{name!r}]" in reason for name in differing
        )
    handle.remove()


def shape_of(value):
    """What a trace relies on in a value."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, dict):
        return [(key, shape_of(item)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return type(value), list(map(shape_of, value))
    return type(value), value


@pytest.mark.parametrize(
    ("example", "other", "said"),
    [
        ({"factor": 1}, {"factor": 1.0}, "it has 1.0 where the example has 1, as factor"),
        ({"options": {"a": 1}}, {}, "it has None where the example has a dict of 1, as options"),
        (
            {"options": {"a": {"b": [1, 2]}}},
            {"options": {"a": {"b": [1, 3]}}},
            "it has 3 where the example has 2, as options['a']['b'][1]",
        ),
        ({"options": {"a": 1}}, {"options": {"b": 1}}, "it has no options['a']"),
        ({"options": {}}, {"options": {"b": 1}}, "the example has no options['b']"),
        (
            {"options": {"a": 1, "b": 2}},
            {"options": {"b": 2, "a": 1}},
            "the keys of options are in another order than in the example",
        ),
        (
            {"sizes": (2, [3.0])},
            {"sizes": [2, [3.0]]},
            "it has a list of 2 where the example has a tuple of 2, as sizes",
        ),
        (
            {"options": {"a": [1]}},
            {"options": {"a": [1, 1]}},
            "it has 2 items where the example has 1, as options['a']",
        ),
        ({}, {"w": torch.zeros(2, 4)}, "the example has no more['w']"),
        (
            {"kind": "minus"},
            {"kind": "x" * 1000},
            f"it has '{'x' * 99}... where the example has 'minus', as kind",
        ),
    ],
)
def test_what_is_said_of_a_difference(example, other, said):
    model, x = Forms(), torch.zeros(2, 4)
    handle = hookcore.apply(model, [Trace({"x": x, **example})])
    model(x, **other)
    (entry,) = handle.run_report().entries
    assert dict(entry.counted.reasons) == {f"not traced: {said}": 1}


def test_positional_arguments_of_any_number_are_traced_and_told_apart():
    class Sum(nn.Linear):
        def forward(self, first, /, scale=2, *rest):
            return super().forward(first) * scale + sum(rest)

    model, x = Sum(4, 4).eval(), torch.randn(2, 4)
    handle = hookcore.apply(model, [Trace((x, 3, x))])
    y = torch.randn(2, 4)
    with torch.no_grad():
        for args in ((y, 3, x), (y, 3), (y, 3, x, x), (y,)):
            assert torch.allclose(model(*args), Sum.forward(model, *args))
    (entry,) = handle.run_report().entries
    assert entry.counted.traced_calls == 1
    assert dict(entry.counted.reasons) == {
        "not traced: it has 0 items where the example has 1, as rest": 1,
        "not traced: it has 2 items where the example has 1, as rest": 1,
        "not traced: it has 2 where the example has 3, as scale": 1,
    }


def test_reasons_are_bounded_however_calls_differ():
    model, x = Model().eval(), torch.zeros(2, 4)
    hookcore.apply(model, [Trace(x)])
    for factor in range(2, 202):
        model(x, factor)
    (entry,) = hookcore.status(model).run_report().entries
    assert len(entry.counted.reasons) == 51
    assert count(model) == (1, 0, 200)
