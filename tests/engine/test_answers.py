"""What methods of techniques and hooks give is checked, and what they raise says whose it is."""

import functools

import pytest
import torch
from attrs import field, frozen
from hypothesis import given
from hypothesis import strategies as st
from plugin_sites import FakePlugin, installed
from techniques import toy
from torch import nn

import hookcore
from hookcore import (
    Binding,
    Claim,
    Hook,
    HookcoreWarning,
    JointTechnique,
    Phase,
    PlanError,
    PluginError,
    Technique,
)
from hookcore.plugins import PluginHost

AT_CALLS = (
    "pre_forward",
    "post_forward",
    "around_forward before",
    "around_forward after",
    "around_forward alone",
)
BESIDE = (
    "bind",
    "a generator",
    "skip_unless_named",
    "needs",
    "attach",
    "substitute",
    "report",
    "run_report",
    "reset",
    "loss_on_detach",
    "detach",
    "after_removal",
)


class BoomError(Exception):
    """What a method of a plugin raises."""


class Failing(Hook):
    """Passes calls on through all its methods, of which one fails."""

    def __init__(self, fails):
        self.fails = fails

    def meet(self, method):
        if self.fails == method:
            raise BoomError(method)

    def pre_forward(self, module, args, kwargs):
        self.meet("pre_forward")

    def post_forward(self, module, output):
        self.meet("post_forward")

    def attach(self, module):
        self.meet("attach")

    def detach(self, module):
        self.meet("detach")

    def after_removal(self, module):
        self.meet("after_removal")

    def reset(self, module):
        self.meet("reset")

    def substitute(self, module, entry):
        self.meet("substitute")
        return entry

    def loss_on_detach(self, module):
        self.meet("loss_on_detach")

    def report(self, module):
        self.meet("report")
        return {}

    def needs(self, module):
        self.meet("needs")
        return {}

    def run_report(self, module):
        self.meet("run_report")


class FailingAround(Failing):
    """Likewise, standing around the call, too."""

    def around_forward(self, module, call, /, *args, **kwargs):
        self.meet("around_forward before")
        if self.fails == "around_forward alone":
            return self.meet("around_forward alone")
        output = call(*args, **kwargs)
        self.meet("around_forward after")
        return output


@frozen
class Fails(Technique):
    name = "fails"
    phase = Phase.COMPUTE

    method: str
    at: str = "0"
    around: bool = True

    def skip_unless_named(self, component):
        Failing(self.method).meet("skip_unless_named")

    def bind(self, component):
        Failing(self.method).meet("bind")
        return self._bindings() if component.name == "net" else []

    def _bindings(self):
        Failing(self.method).meet("a generator")
        yield Binding(self.at, (FailingAround if self.around else Failing)(self.method))


def beside(name, around):
    """Another technique on the same modules, of another plugin, that never fails."""
    kind = FailingAround if around else Failing
    return toy(name, lambda on: [Binding(fqn, kind(None)) for fqn in on.modules])


def notes_of(error):
    return [note for note in getattr(error, "__notes__", ()) if note.startswith("hookcore: raised in")]


def run_through(model, techniques):
    """Everything that can be done with a model under techniques."""
    applied = hookcore.apply({"net": model, "other": nn.Identity()}, techniques)
    str(applied)
    model(torch.ones(1))
    str(applied.run_report())
    applied.reset()
    applied.remove()


@pytest.mark.parametrize("method", [*AT_CALLS, *BESIDE])
@given(
    outside=st.lists(st.booleans(), max_size=2),
    inside=st.lists(st.booleans(), max_size=2),
    at=st.sampled_from(["", "0"]),
    around=st.booleans(),
)
def test_an_error_says_whose_method_raised_it_and_where(method, outside, inside, at, around):
    around |= method.startswith("around")
    kind = "FailingAround" if around else "Failing"
    label = f"net.{at}".rstrip(".")
    where = f"{kind}.{method.split()[0]}() of fails at {label!r}"
    techniques = [
        *(beside(f"outside_{number}", it) for number, it in enumerate(outside)),
        Fails(method, at, around),
        *(beside(f"inside_{number}", it) for number, it in enumerate(inside)),
    ]
    if method in ("bind", "a generator", "skip_unless_named"):
        where = f"{'bind' if method == 'a generator' else method}() of fails at 'net'"
    with pytest.raises(BoomError) as caught:
        run_through(nn.Sequential(nn.Linear(1, 1)), techniques)
    assert notes_of(caught.value) == [f"hookcore: raised in {where}"]


class Fragile(nn.Module):
    """Fails by itself, in a function that it calls or not."""

    def __init__(self, deep):
        super().__init__()
        self.deep = deep

    def forward(self, x):
        if self.deep:
            self.fail()
        raise BoomError

    def fail(self):
        raise BoomError


@given(
    count=st.integers(1, 3), deep=st.booleans(), wrapped=st.booleans(), at=st.sampled_from([["", "0"], ["0"]])
)
def test_nobody_is_blamed_for_an_error_of_the_model(count, deep, wrapped, at):
    model = nn.Sequential(Fragile(deep))
    if wrapped:  # as libraries do
        model[0].forward = functools.wraps(model[0].forward)(lambda x, call=model[0].forward: call(x))
    for number in range(count):
        hookcore.apply(
            model, [toy(f"sound_{number}", lambda _: [Binding(fqn, FailingAround(None)) for fqn in at])]
        )
    with pytest.raises(BoomError) as caught:
        model(torch.ones(1))
    assert notes_of(caught.value) == []


def test_interrupts_and_refusals_carry_no_note():
    class Stopping(Hook):
        def pre_forward(self, module, args, kwargs):
            raise args[0]

    model = nn.Identity()
    hookcore.apply(model, [toy("stopping", lambda _: [Binding("", Stopping())])])
    for error in (KeyboardInterrupt(), SystemExit(3), PlanError("reset() first")):
        with pytest.raises(type(error)) as caught:
            model(error)
        assert caught.value is error
        assert notes_of(error) == []


def test_an_error_in_cleaning_up_is_noted_on_the_first():
    class Untidy(Hook):
        def on_error(self, module, error):
            raise RuntimeError("no broom")

    model = nn.Sequential(Fragile(False))
    hookcore.apply(model, [toy("untidy", lambda _: [Binding("0", Untidy())])])
    with pytest.raises(BoomError) as caught:
        model(torch.ones(1))
    (note,) = caught.value.__notes__
    assert note.endswith("Untidy.on_error() of untidy at '0' failed too: RuntimeError('no broom')")


# Reviews


class Fickle(Hook):
    """Tells what it needs once."""

    def __init__(self):
        self.asked = 0

    def needs(self, module):
        self.asked += 1
        if self.asked > 1:
            raise BoomError
        return {"cpu": 1}


REVIEW = """
@hookimpl
def hookcore_review_plan(plan):
    {statement}

@hookimpl
def hookcore_observe(event, details):
    str(details["plan"])
"""


def test_another_plugin_that_looks_at_a_plan_is_not_blamed_for_it():
    made = hookcore.plan(nn.Identity(), [toy("fickle", lambda _: [Binding("", Fickle())])])
    with installed([FakePlugin("looks", REVIEW.format(statement="return [str(plan)]"))]):
        host = PluginHost.discover()
        with pytest.raises(BoomError) as caught:
            host.review(made)
        assert notes_of(caught.value) == ["hookcore: raised in Fickle.needs() of fickle at 'Identity'"]
        with pytest.warns(HookcoreWarning) as warned:
            host.observe("applied", plan=made)
    (message,) = [str(it.message) for it in warned]
    assert message == "BoomError: \nhookcore: raised in Fickle.needs() of fickle at 'Identity'"


def test_a_review_that_fails_by_itself_is_blamed():
    made = hookcore.plan(nn.Identity(), [])
    with installed([FakePlugin("looks", REVIEW.format(statement="raise ValueError('own fault')"))]):
        with pytest.raises(
            PluginError, match="^plugin 'looks' of .* failed in hookcore_review_plan: ValueError"
        ):
            PluginHost.discover().review(made)


# Answers


@frozen
class Gives(Technique):
    """Has one of its hook's methods give something."""

    name = "gives"
    phase = Phase.COMPUTE

    method: str
    given: object = field(eq=False)

    def skip_unless_named(self, component):
        return self.given if self.method == "skip_unless_named" else None

    def bind(self, component):
        if self.method == "bind":
            return self.given
        methods = {self.method: lambda *_: self.given} if hasattr(Hook, self.method) else {}
        return [Binding("", type("GivingHook", (Hook,), methods)())]


SOMETHING = st.sampled_from(
    [3, "text", [1], (1, 2), torch.ones(2, 2), {"x": "y"}, {3: 4}, {"x": 1.5}, [Binding], [None]]
)
"""What no method may give."""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("bind", "Bindings and Skippeds, in a list or yielded|a Binding of a Hook, or a Skipped"),
        ("needs", "a mapping from text to bytes"),
        ("report", "a mapping from text to bytes"),
        ("run_report", "an object of an attrs class, or None"),
        ("pre_forward", r"\(args, kwargs\), a tuple and a dict, or None"),
        ("loss_on_detach", "what is lost as text, or None"),
        ("skip_unless_named", "a reason as text, or None"),
    ],
)
@given(given_=SOMETHING)
def test_an_answer_of_another_kind_is_refused_with_the_right_one(method, expected, given_):
    if isinstance(given_, str) and method in ("loss_on_detach", "skip_unless_named"):
        given_ = given_.encode()
    model = nn.Sequential(nn.Identity())
    with pytest.raises(PluginError, match=rf"(?s)\.?{method}\(\) gave .*; expected ({expected})") as caught:
        run_through(model, [Gives(method, given_)])
    if method == "pre_forward":
        assert notes_of(caught.value) == ["hookcore: raised in GivingHook.pre_forward() of gives at 'net'"]
    else:
        assert str(caught.value).startswith("gives.")


@pytest.mark.parametrize(
    "changed",
    [
        (torch.ones(2, 3), {}),  # whose rows would be two arguments
        ((1,), [("a", 1)]),
        ((1,), None),
        (1,),
        ((1,), {}, 3),
    ],
)
def test_what_could_be_taken_for_arguments_is_refused(changed):
    model = nn.Identity()
    hookcore.apply(model, [Gives("pre_forward", changed)])
    with pytest.raises(PluginError, match="expected .args, kwargs., a tuple and a dict"):
        model(0)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (lambda: Binding(nn.Identity(), Hook()), r"names a module Identity\(\) that"),
        (lambda: Binding([""], Hook()), r"names a module \[''\] that"),
        (lambda: Binding("", Hook, "forward"), "expected a Binding of a Hook, or a Skipped"),
        (lambda: Binding("", Hook(), 3), "names an entry 3 that"),
        (lambda: Binding("", Hook(), claims=["placement"]), "expected Claims as its claims, not 'placement'"),
        (lambda: Binding("", Hook(), forbids_below="code"), "expected a tuple of resources as forbids_below"),
    ],
)
def test_bindings_of_other_kinds_are_refused(binding, message):
    with pytest.raises(PluginError, match=rf"^gives\.bind\(\) .*{message}"):
        hookcore.plan(nn.Identity(), [Gives("bind", [binding()])])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[]], "hooks for 1 components, expected 2"),
        (None, "hooks for 0 components, expected 2"),
        ([[], None], "None; expected Bindings and Skippeds, in a list or yielded"),
        ([[], [3]], "3; expected a Binding of a Hook, or a Skipped"),
    ],
)
def test_answers_for_several_components_are_checked(answer, message):
    @frozen
    class Joint(JointTechnique):
        name = "joint"
        phase = Phase.COMPUTE

        @classmethod
        def bind_jointly(cls, places):
            return answer

    with pytest.raises(PluginError, match=rf"^joint\.bind(_jointly)?\(\) gave {message}"):
        hookcore.plan({"one": nn.Identity(), "other": nn.Identity()}, [Joint()])


def test_an_error_for_several_components_names_them():
    @frozen
    class Joint(JointTechnique):
        name = "joint"
        phase = Phase.COMPUTE

        @classmethod
        def bind_jointly(cls, places):
            raise BoomError

    with pytest.raises(BoomError) as caught:
        hookcore.plan({"one": nn.Identity(), "other": nn.Identity()}, [Joint()])
    assert notes_of(caught.value) == ["hookcore: raised in bind_jointly() of joint at 'one, other'"]


def test_claims_that_are_no_list_are_refused():
    with pytest.raises(TypeError, match="claims of a Binding is Claim.*expected a list of Claims"):
        Binding("", Hook(), claims=Claim("placement"))
