"""Classes of plugins are refused when they are made, if something in them would never be used or not work."""

import inspect
from typing import ClassVar

import pytest
from attrs import define, field, frozen
from attrs.exceptions import FrozenInstanceError
from hypothesis import assume, given
from hypothesis import strategies as st

from hookcore import Hook, JointTechnique, Phase, Technique
from hookcore.overriding import _SHORTEST

BASES = {"Hook": Hook, "Technique": Technique}
METHODS = [
    (base, name)
    for base in BASES.values()
    for name, it in vars(base).items()
    if name[0] != "_" and callable(it)
]


def make(base, attributes):
    """A class that derives from a base."""
    if base is Technique:
        return frozen(type("Made", (base,), {"name": "made", "phase": Phase.COMPUTE, **attributes}))
    return type("Made", (base,), attributes)


# Names


@st.composite
def slips(draw):
    """A base, one of its names, and the same with one slip of the finger."""
    base = draw(st.sampled_from(list(BASES.values())))
    name = draw(st.sampled_from([it for it in vars(base) if it[0] != "_" and len(it) >= _SHORTEST]))
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from("aeinrst"))
    wrong = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
                name.replace("_", ""),
                name.title().replace("_", ""),
            ]
        )
    )
    assume(wrong[0] != "_" and not hasattr(base, wrong))
    return base, name, wrong


@given(slips(), st.sampled_from(["method", "flag", "mixin"]))
def test_a_misspelt_name_is_refused_with_the_right_one(slip, how):
    base, name, wrong = slip
    value = True if how == "flag" else lambda *_: None
    with pytest.raises(TypeError, match=rf"^test_overriding\.Made has '{wrong}', .* expected '{name}'\."):
        if how == "mixin":
            type("Made", (type("Mixin", (), {wrong: value}), base), {"name": "made", "phase": Phase.COMPUTE})
        else:
            make(base, {wrong: value, "__module__": __name__})


def test_names_of_the_classs_own_are_fine():
    class Own(Hook):
        attached: ClassVar[bool] = False
        reports_kept = 3

        def __init__(self):
            self.resets = 0

        def _post_foward(self):
            pass

        def detached(self):
            pass

    @frozen
    class Options(Technique):
        name: ClassVar[str] = "options"
        phase: ClassVar[Phase] = Phase.CAST

        replan: bool = True
        befores: tuple = field(default=())

        def find(self):
            pass

    assert Own().resets == 0
    assert Options(replan=False, befores=("x",)) == Options(replan=False, befores=("x",))


# Signatures


def function_with(kinds):
    """A function that returns its parameters' values; None if there is no such function."""
    order = ["positional", "default", "rest", "keyword", "keyword with default", "keywords"]
    if [order.index(it) for it in kinds] != sorted(order.index(it) for it in kinds):
        return None
    if kinds.count("rest") > 1 or kinds.count("keywords") > 1:
        return None
    star = (
        ["*"]
        if "rest" not in kinds and any(it.startswith("keyword") and it != "keywords" for it in kinds)
        else []
    )
    written = []
    for number, kind in enumerate(kinds):
        form = {
            "default": "p{}=None",
            "keyword with default": "p{}=None",
            "rest": "*p{}",
            "keywords": "**p{}",
        }
        if star and kind.startswith("keyword"):
            written += star
            star = []
        written.append(form.get(kind, "p{}").format(number))
    made = {}
    exec(f"def method(self, {', '.join(written)}): return dict(locals())", made)  # noqa: S102
    return made["method"]


kinds_of_parameters = st.tuples(
    st.integers(0, 4), st.integers(0, 2), st.booleans(), st.integers(0, 1), st.integers(0, 1), st.booleans()
).map(
    lambda many: [
        kind
        for kind, count in zip(
            ["positional", "default", "rest", "keyword", "keyword with default", "keywords"],
            many,
            strict=True,
        )
        for _ in range(int(count))
    ]
)


def gets_each_argument(function, count):
    """Whether a call with so many arguments gives each of them to a parameter of its own, or all to one."""
    given_ = [object() for _ in range(count)]
    try:
        got = function(None, *given_)
    except TypeError:
        return False
    values = [value for name, value in got.items() if name != "self"]
    rest = next((value for value in values if isinstance(value, tuple)), ())
    return list(rest) == given_ or [it for it in values if it in given_] == given_


@given(st.sampled_from(METHODS), kinds_of_parameters)
def test_a_method_is_taken_exactly_if_it_gets_each_argument(method, kinds):
    base, name = method
    wanted = inspect.signature(getattr(base, name)).parameters.values()
    count = sum(it.kind in (it.POSITIONAL_ONLY, it.POSITIONAL_OR_KEYWORD) for it in wanted) - 1
    variadic = any(it.kind is it.VAR_POSITIONAL for it in wanted)
    function = function_with(kinds)
    if variadic:  # a plugin that knows its module may name what that is called with
        named = kinds.count("positional") + kinds.count("default")
        fits = named >= count or (named == 0 and "rest" in kinds)
    else:
        fits = gets_each_argument(function, count)
    if fits:
        make(base, {name: function})
    else:
        with pytest.raises(
            TypeError, match=rf"cannot call .*Made\.{name}: found {name}\(self.*, expected {name}\("
        ):
            make(base, {name: function})


def test_static_and_class_methods_and_what_is_no_method():
    class Fine(Hook):
        @staticmethod
        def reset(module):
            pass

        @classmethod
        def detach(cls, module):
            pass

        post_forward = Hook.post_forward

    assert Fine().reset(None) is None
    with pytest.raises(TypeError, match=r"found @staticmethod reset\(self, module\), expected reset\(self"):
        make(Hook, {"reset": staticmethod(lambda self, module: None)})
    with pytest.raises(
        TypeError, match=r"found pre_forward = 3, expected pre_forward\(self, module, args, kwargs\)"
    ):
        make(Hook, {"pre_forward": 3})


def test_the_peers_way_of_passing_arguments_is_refused():
    """Diffusers and accelerate pass `*args, **kwargs`; here these would be a tuple of two."""
    with pytest.raises(TypeError, match=r"found pre_forward\(self, module, \*args, \*\*kwargs\), expected"):

        class Ported(Hook):
            def pre_forward(self, module, *args, **kwargs):
                return args, kwargs


# What a technique declares


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"phase": Phase.CAST}, r"Made has the name None, expected snake_case. Write name: ClassVar"),
        ({"phase": Phase.CAST, "name": "Made"}, "has the name 'Made', expected snake_case"),
        ({"phase": Phase.CAST, "name": field()}, "has the name _CountingAttr.*, expected snake_case"),
        ({"name": "made"}, "has the phase None, expected one of SPLIT, PLACE, CAST, COMPUTE. Write phase"),
        ({"name": "made", "phase": 2}, "has the phase 2, expected one of SPLIT"),
        ({"name": "made", "phase": Phase.CAST, "before": "tiling"}, r"before = 'tiling', .* \('tiling',\)$"),
        ({"name": "made", "phase": Phase.CAST, "after": (Technique,)}, r"after = \(<class"),
        ({"name": "made", "phase": Phase.CAST, "incompatible_with": "x"}, "incompatible_with = 'x'"),
    ],
)
def test_an_incomplete_technique_is_refused_when_its_class_is_made(declared, message):
    with pytest.raises(TypeError, match=message):
        type("Made", (Technique,), declared)


def test_a_base_of_techniques_needs_neither_name_nor_phase():
    class Base(Technique):
        def bind(self, component):
            return []

    @frozen
    class Made(Base):
        name = "made"
        phase = Phase.CAST

    assert list(Made().bind(None)) == []
    with pytest.raises(TypeError, match="Base has the name None"):
        Base()
    with pytest.raises(TypeError, match="Technique has the name None"):
        Technique()


@pytest.mark.parametrize("options", [{}, {"__annotations__": {"size": "int"}, "size": 3}])
def test_a_technique_that_is_not_decorated_cannot_be_made(options):
    kind = type("Made", (Technique,), {"name": "made", "phase": Phase.CAST, **options})
    with pytest.raises(TypeError, match=r"Made is not decorated\. Write @attrs\.frozen above the class"):
        kind()
    decorated = frozen(kind)
    assert decorated() == decorated()


@pytest.mark.parametrize("decorate", [frozen, define, frozen(slots=False), define(kw_only=True)])
def test_a_technique_is_frozen_whatever_made_it(decorate):
    technique = decorate(
        type(
            "Made",
            (Technique,),
            {"name": "made", "phase": Phase.CAST, "__annotations__": {"size": "int"}, "size": 3},
        )
    )()
    with pytest.raises(FrozenInstanceError):
        technique.size = 4


def test_a_class_method_has_to_stay_one():
    class Joint(JointTechnique):
        @classmethod
        def bind_jointly(cls, places):
            return [[] for _ in places]

    with pytest.raises(
        TypeError, match=r"found bind_jointly\(self, places\), expected @classmethod bind_jointly\(cls"
    ):

        class Wrong(JointTechnique):
            def bind_jointly(self, places):
                return []

    with pytest.raises(TypeError, match="has 'bind_joint[yl]+', .* expected 'bind_jointly'"):

        class Misspelt(JointTechnique):
            @classmethod
            def bind_jointyl(cls, places):
                return []
