"""Discovery, and what one plugin's fault does to the others: nothing."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st
from plugin_sites import FakePlugin, installed, write_site
from torch import nn

from hookcore import ModelConventions
from hookcore.errors import CheckpointError, HookcoreWarning, PlanError, PluginError, UnsupportedModelError
from hookcore.plugins import ALLOW_LIST, BLOCK_LIST, PluginHost, PluginInfo
from hookcore.target import Component

ANY_COMPONENT = Component("", nn.Identity(), lambda _: ModelConventions())

DESCRIBE = """
@hookimpl
def hookcore_describe_model(model):
    return ModelConventions(block_classes=(__name__,))
"""


def registering(*statements: str) -> str:
    body = "".join(f"    {statement}\n" for statement in (*statements, "yield from ()"))
    return f"\n@hookimpl\ndef hookcore_register_techniques():\n{body}"


def hooked(hook: str, arguments: str, *statements: str, options: str = "") -> str:
    body = "".join(f"    {statement}\n" for statement in statements)
    return f"\n@hookimpl({options})\ndef {hook}({arguments}):\n{body}"


@frozen
class Fault:
    """Something wrong with a plugin, where it stands, and what the listing has to say of it."""

    said: str
    at_import: str = ""
    at_registration: str = ""
    has_traceback: bool = False


FAULTS = [
    Fault("RuntimeError: no luck", at_import="raise RuntimeError('no luck')", has_traceback=True),
    Fault("SystemExit: 3", at_import="raise SystemExit(3)", has_traceback=True),
    Fault("SyntaxError", at_import="def (", has_traceback=True),
    Fault("No module named 'no_such_module'", at_import="import no_such_module", has_traceback=True),
    Fault(
        "hookcore_describe_modle", at_import=hooked("hookcore_describe_modle", "model", "raise MemoryError")
    ),
    Fault("modle", at_import=hooked("hookcore_find_foreign", "modle", "raise MemoryError")),
    Fault(
        "wrapper",
        at_import=hooked("hookcore_find_foreign", "model", "return (yield)", options="wrapper=True"),
    ),
    Fault("RuntimeError: too late", at_registration="raise RuntimeError('too late')", has_traceback=True),
    Fault("SystemExit: 4", at_registration="raise SystemExit(4)", has_traceback=True),
    Fault("<class 'int'>", at_registration="yield int"),
    Fault("is no technique", at_registration="yield technique('an_object')()"),
    Fault("the name None", at_registration="yield Technique"),
    Fault("the name None", at_registration="yield technique(None)", has_traceback=True),
    Fault("the phase None", at_registration="yield technique('without_phase', None)", has_traceback=True),
    Fault("the phase 2", at_registration="yield technique('number_for_phase', 2)", has_traceback=True),
    Fault(
        "is not decorated",
        at_registration="yield type('T', (Technique,), {'name': 't', 'phase': Phase.CAST})",
    ),
    Fault("this plugin itself", at_registration="yield from [technique('twin'), technique('twin')]"),
    *[
        Fault(repr(name), at_registration=f"yield technique({name!r})", has_traceback=True)
        for name in ("", "CamelCase", "with-dash", "1st", "_private", "trailing_", "two words", "new\n")
    ],
]
PLUGIN_NAMES = ["one", "two", "three", "four"]
faults = st.none() | st.sampled_from(FAULTS)
name_lists = st.none() | st.lists(st.sampled_from([*PLUGIN_NAMES, "ghost"]), max_size=4)


@frozen
class Drawn:
    plugin: FakePlugin
    techniques: list[str]
    fault: Fault | None


@st.composite
def drawn_plugins(draw: st.DrawFn) -> Drawn:
    techniques = draw(st.lists(st.sampled_from(["alpha", "beta", "gamma"]), unique=True))
    fault = draw(faults)
    source = DESCRIBE + registering(
        *[f"yield technique({name!r})" for name in techniques],
        fault.at_registration if fault else "",
    )
    plugin = FakePlugin(
        name=draw(st.sampled_from(PLUGIN_NAMES)),
        source=source + "\n" + (fault.at_import if fault else ""),
        distribution=draw(st.sampled_from(["zebra", "hookcore", "aardvark"])),
    )
    return Drawn(plugin, techniques, fault)


def by_distribution_and_name(drawn: Drawn) -> tuple[str, str]:
    return drawn.plugin.distribution, drawn.plugin.name


def set_list(patch: pytest.MonkeyPatch, variable: str, names: list[str] | None) -> None:
    if names is None:
        patch.delenv(variable, raising=False)
    else:
        patch.setenv(variable, " , ".join(names))


@given(st.lists(drawn_plugins(), max_size=6, unique_by=by_distribution_and_name), name_lists, name_lists)
def test_exactly_the_sound_and_permitted_plugins_are_active(drawn, allowed, disabled):
    order = sorted(
        drawn,
        key=lambda one: (one.plugin.distribution != "hookcore", one.plugin.name, one.plugin.distribution),
    )
    owners: dict[str, str] = {}
    active: dict[str, FakePlugin] = {}
    expected, said = [], []
    for one in order:
        plugin = one.plugin
        clash = [name for name in one.techniques if name in owners]
        if plugin.name in (disabled or ()):
            state, reason = "blocked", f"{BLOCK_LIST} names it"
        elif allowed is not None and plugin.name not in allowed:
            state, reason = "blocked", f"{ALLOW_LIST} does not name it"
        elif plugin.name in active:
            state, reason = "broken", f"of {active[plugin.name].distribution} 1.5 has this name already"
        elif one.fault and (one.fault.at_import or not clash):
            state, reason = "broken", one.fault.said
        elif clash:
            state, reason = "broken", repr(clash[0])
        else:
            state, reason = "active", None
            active[plugin.name] = plugin
            owners |= dict.fromkeys(one.techniques, plugin.module)
        expected.append((plugin.name, plugin.distribution, "1.5", state))
        said.append(reason)
    unknown = {*(allowed or ()), *(disabled or ())} - {one.plugin.name for one in drawn}

    with installed([one.plugin for one in drawn]), pytest.MonkeyPatch.context() as patch:
        set_list(patch, ALLOW_LIST, allowed)
        set_list(patch, BLOCK_LIST, disabled)
        host = PluginHost.discover()
        imported = {one.plugin.module for one in drawn} & set(sys.modules)

    found, missing = host.listing[: len(expected)], host.listing[len(expected) :]
    assert [(info.name, info.distribution, info.version, info.state) for info in found] == expected
    assert {info.name: (info.state, info.distribution, info.version) for info in missing} == dict.fromkeys(
        unknown, ("not found", None, None)
    )
    assert len(missing) == len(unknown)
    for info, reason in zip(found, said, strict=True):
        assert info.problem is None if reason is None else reason in info.problem
    for info in missing:
        assert info.problem.startswith(ALLOW_LIST if info.name in (allowed or ()) else BLOCK_LIST)
    assert {name: found.__module__ for name, found in host.techniques.items()} == owners
    assert {name: info.name for info in host.listing for name in info.techniques} == {
        name: plugin.name for plugin in active.values() for name in owners if owners[name] == plugin.module
    }
    assert set(host.describe(ANY_COMPONENT).block_classes) == {plugin.module for plugin in active.values()}
    blocked = {one.plugin.module for one, row in zip(order, expected, strict=True) if row[-1] == "blocked"}
    assert not imported & blocked


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.at_import or fault.at_registration)
def test_nothing_of_a_broken_plugin_stays_and_nothing_else_goes(fault):
    plugins = [
        FakePlugin("a", DESCRIBE + registering("yield technique('first')")),
        FakePlugin(
            "b",
            DESCRIBE + registering("yield technique('lost')", fault.at_registration) + "\n" + fault.at_import,
        ),
        FakePlugin("c", DESCRIBE + registering("yield technique('last')")),
    ]
    with installed(plugins):
        host = PluginHost.discover()
    assert [info.state for info in host.listing] == ["active", "broken", "active"]
    assert [info.techniques for info in host.listing] == [("first",), (), ("last",)]
    assert fault.said in host.listing[1].problem
    assert ("Traceback" in host.listing[1].problem) == fault.has_traceback
    assert set(host.techniques) == {"first", "last"}
    assert host.describe(ANY_COMPONENT).block_classes == (plugins[2].module, plugins[0].module)


@given(st.permutations(["hookcore", "aardvark", "zebra"]))
def test_the_order_does_not_depend_on_the_path(distributions):
    plugins = [
        FakePlugin(name, DESCRIBE, distribution) for distribution in distributions for name in ("b", "a")
    ]
    with installed(plugins):
        host = PluginHost.discover()
    found = [(info.distribution, info.name, info.state) for info in host.listing]
    assert found == [
        ("hookcore", "a", "active"),
        ("hookcore", "b", "active"),
        ("aardvark", "a", "broken"),
        ("zebra", "a", "broken"),
        ("aardvark", "b", "broken"),
        ("zebra", "b", "broken"),
    ]


def test_a_name_whose_first_owner_is_broken_is_free_for_the_next():
    failing = hooked("hookcore_open_target", "target", "raise OSError")
    plugins = [
        FakePlugin("same", "raise OSError", "aardvark"),
        FakePlugin("same", DESCRIBE + failing, "zebra"),
        FakePlugin("same", DESCRIBE, "zoo"),
    ]
    with installed(plugins):
        host = PluginHost.discover()
    assert [info.state for info in host.listing] == ["broken", "active", "broken"]
    assert host.listing[2].problem == "plugin 'same' of zebra 1.5 has this name already"
    assert host.describe(ANY_COMPONENT).block_classes == (plugins[1].module,)
    with pytest.raises(PluginError, match=r"^plugin 'same' of zebra"):
        host.open_target(object())


def test_a_traceback_shows_the_line_that_failed():
    plugin = FakePlugin("p", "def dig():\n    raise OSError('deep')  # here\ndig()")
    with installed([plugin]):
        (info,) = PluginHost.discover().listing
    assert f"{plugin.module}.py" in info.problem
    assert "raise OSError('deep')  # here" in info.problem


def test_one_module_under_two_names_is_one_plugin():
    plugin = FakePlugin("a", DESCRIBE)
    with installed([plugin, FakePlugin("b", DESCRIBE, module=plugin.module)]):
        host = PluginHost.discover()
    assert [info.state for info in host.listing] == ["active", "broken"]
    assert "already registered" in host.listing[1].problem
    assert host.describe(ANY_COMPONENT).block_classes == (plugin.module,)


def test_a_class_is_a_plugin_whose_hooks_are_methods():
    source = """
class Plugin:
    def __init__(self):
        self.block = "Block"

    @hookimpl
    def hookcore_describe_model(self, model):
        return ModelConventions(block_classes=(self.block, type(model).__name__))
"""
    with installed([FakePlugin("p", source, object_name="Plugin")]):
        host = PluginHost.discover()
    assert host.listing[0].problem is None
    assert host.describe(ANY_COMPONENT).block_classes == ("Block", "Identity")


@pytest.mark.parametrize("object_name", [None, "nothing", "a_number"])
def test_what_has_no_hook_is_broken(object_name):
    source = "nothing = None\na_number = 3\ndef hookcore_describe_model(model): ..."
    with installed([FakePlugin("p", source, object_name=object_name)]):
        (info,) = PluginHost.discover().listing
    assert info.state == "broken"
    assert "has no hook; mark each implementation with @hookcore.hookimpl" in info.problem


@pytest.mark.parametrize("metadata", [None, b"\xff\xff"])
def test_a_distribution_with_damaged_metadata_still_brings_its_plugins(metadata, tmp_path, monkeypatch):
    for folder in write_site([FakePlugin("p", DESCRIBE, "leftover")], tmp_path):
        monkeypatch.syspath_prepend(folder)
    file = tmp_path / "leftover" / "leftover-1.5.dist-info" / "METADATA"
    file.unlink() if metadata is None else file.write_bytes(metadata)
    assert PluginHost.discover().listing == (PluginInfo("p", None, None),)


@pytest.fixture
def hosting():
    """Returns a function that installs plugins of these sources, named a, b, c..., and discovers them."""
    opened = []

    def host_of(*sources: str) -> PluginHost:
        context = installed([FakePlugin(name, source) for name, source in zip("abc", sources, strict=False)])
        context.__enter__()
        opened.append(context)
        host = PluginHost.discover()
        assert [info.problem for info in host.listing] == [None] * len(sources)
        return host

    yield host_of
    for context in opened:
        context.__exit__(None, None, None)


def test_an_unknown_technique_is_told_with_what_is_near_it(hosting):
    host = hosting(registering("yield technique('group_offload')", "yield technique('tiling')"))
    assert host.technique("tiling").name == "tiling"
    with pytest.raises(PluginError) as raised:
        host.technique("group_ofload")
    assert str(raised.value) == (
        "no technique is named 'group_ofload' (did you mean 'group_offload'?); "
        "there are: group_offload, tiling"
    )


def test_an_unknown_technique_is_told_with_the_plugins_that_may_bring_it(monkeypatch):
    monkeypatch.setenv(BLOCK_LIST, "kept_out,ghost")
    with installed(
        [FakePlugin("kept_out", DESCRIBE), FakePlugin("ill", "1 / 0"), FakePlugin("ok", DESCRIBE)]
    ):
        host = PluginHost.discover()
    with pytest.raises(PluginError) as raised:
        host.technique("tiling")
    assert str(raised.value) == (
        "no technique is named 'tiling'; there are: none. These plugins are not active and may bring it: "
        "ill (broken), kept_out (blocked), ghost (not found); `hookcore plugins` says why"
    )


def test_an_unknown_plugin_is_told_with_what_is_near_it(monkeypatch):
    monkeypatch.setenv(BLOCK_LIST, "tilling")
    with installed([FakePlugin("tiling", DESCRIBE)]):
        host = PluginHost.discover()
    assert host.listing[1].problem == (
        f"{BLOCK_LIST} names it, and no installed plugin does (did you mean 'tiling'?)"
    )


def test_techniques_are_read_only(hosting):
    with pytest.raises(TypeError):
        hosting(registering()).techniques["x"] = None


QUESTIONS = {
    "hookcore_open_target": ("target", lambda host: host.open_target(object())),
    "hookcore_describe_model": ("model", lambda host: host.describe(ANY_COMPONENT)),
    "hookcore_find_foreign": ("model", lambda host: host.find_foreign(ANY_COMPONENT)),
    "hookcore_review_plan": ("plan", lambda host: host.review(SimpleNamespace())),
    "hookcore_build_model": ("folder", lambda host: host.build_model(nn.Identity, "folder", {})),
}


@pytest.mark.parametrize("hook", QUESTIONS)
@pytest.mark.parametrize(
    ("statement", "cause", "text"),
    [
        ("raise LookupError('lost')", LookupError, "LookupError: lost"),
        ("raise LookupError('lost'); yield", Exception, ""),  # a generator raises when it is read
        ("return 3.5", TypeError, "3.5"),
        ("return 'text'", TypeError, "'text'"),
        ("return [3.5]", TypeError, "3.5"),
    ],
)
def test_a_failing_answer_names_plugin_hook_and_fault(hosting, hook, statement, cause, text):
    arguments, ask = QUESTIONS[hook]
    host = hosting(DESCRIBE, hooked(hook, arguments, statement))
    with pytest.raises(PluginError) as raised:
        ask(host)
    assert isinstance(raised.value.__cause__, cause)
    assert str(raised.value).startswith(f"plugin 'b' of fake-plugins 1.5 failed in {hook}: ")
    assert text in str(raised.value)
    assert str(raised.value).endswith(f"{BLOCK_LIST}=b")


@pytest.mark.parametrize("hook", QUESTIONS)
@pytest.mark.parametrize("error", [PlanError, UnsupportedModelError, CheckpointError])
def test_a_refusal_passes_as_it_is(hosting, hook, error):
    arguments, ask = QUESTIONS[hook]
    host = hosting(hooked(hook, arguments, f"raise {error.__name__}('no')"))
    with pytest.raises(error, match=r"^no$"):
        ask(host)


@pytest.mark.parametrize("hook", QUESTIONS)
def test_no_answer_is_no_failure(hosting, hook):
    arguments, ask = QUESTIONS[hook]
    expected = ask(hosting())
    assert ask(hosting(hooked(hook, arguments, "return None"))) == expected
    assert expected in (None, [], ModelConventions())


def test_a_hook_may_take_fewer_arguments_and_gets_what_it_names(hosting):
    source = "from torch import nn" + hooked(
        "hookcore_build_model",
        "config_overrides, model_class",
        "return model_class(**config_overrides)",
    )
    built = hosting(source).build_model(nn.Linear, "folder", {"in_features": 2, "out_features": 3})
    assert built.weight.shape == (3, 2)


def test_a_plugin_is_given_the_modules_of_the_tree(hosting):
    inner = nn.Identity()
    model = nn.ModuleDict({"one": nn.ModuleList([inner]), "other": inner})
    source = hooked(
        "hookcore_describe_model", "modules", "return ModelConventions(block_classes=modules)"
    ) + hooked(
        "hookcore_find_foreign",
        "model, modules",
        "assert modules[''] is model",
        "return [ForeignMechanism(fqn, type(it).__name__, '') for fqn, it in modules.items()]",
    )
    host = hosting(source)
    component = Component("", model, host.describe)
    assert component.conventions.block_classes == ("", "one", "one.0")
    found = [(it.fqn, it.what) for it in host.find_foreign(component)]
    assert found == [("", "ModuleDict"), ("one", "ModuleList"), ("one.0", "Identity")]


@given(st.lists(st.none() | st.integers(0, 5), max_size=3), st.sampled_from([None, 0, 1, 2]))
def test_the_first_answer_counts_and_nobody_is_asked_after_it(answers, last):
    # Later plugins are asked earlier, unless they want to be the last.
    plugins = [
        FakePlugin(
            name,
            hooked(
                "hookcore_open_target",
                "target",
                f"target.append({name!r})",
                "return " + ("None" if answer is None else f"{{'{answer}': None}}"),
                options="trylast=True" if index == last else "",
            ),
        )
        for index, (name, answer) in enumerate(zip("abc", answers, strict=False))
    ]
    order = [index for index in reversed(range(len(answers))) if index != last]
    order += [last] if last is not None and last < len(answers) else []
    known = [index for index in order if answers[index] is not None]
    asked: list[str] = []
    with installed(plugins):
        found = PluginHost.discover().open_target(asked)
    assert (found.components if found else None) == ({str(answers[known[0]]): None} if known else None)
    assert asked == ["abc"[index] for index in order[: order.index(known[0]) + 1 if known else None]]


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=3, unique=True).map(tuple)


@given(st.lists(st.tuples(words, words, words, words), max_size=3))
def test_descriptions_are_merged(fields):
    plugins = [
        FakePlugin(name, hooked("hookcore_describe_model", "model", f"return ModelConventions(*{values})"))
        for name, values in zip("abc", fields, strict=False)
    ]
    with installed(plugins):
        found = PluginHost.discover().describe(ANY_COMPONENT)
    parts = [ModelConventions(*values) for values in reversed(fields)]
    assert found == (functools.reduce(ModelConventions.merged, parts) if parts else ModelConventions())


def test_foreign_mechanisms_and_notes_of_all_plugins_are_listed(hosting):
    def source(word: str) -> str:
        return hooked(
            "hookcore_find_foreign", "model", f"yield ForeignMechanism('{word}', 'hook', 'remedy')"
        ) + hooked("hookcore_review_plan", "plan", f"return [plan.name + '{word}', 'second']")

    host = hosting(source("x"), source("y"))
    assert [mechanism.fqn for mechanism in host.find_foreign(ANY_COMPONENT)] == ["y", "x"]
    assert host.review(SimpleNamespace(name="plan ")) == ["plan y", "second", "plan x", "second"]


@given(
    st.lists(st.sampled_from(["raise OSError('blind')", "raise SystemExit(1)", "pass"]), max_size=3),
    st.dictionaries(st.sampled_from(["event", "self", "other"]), st.integers()),
)
def test_every_observer_is_told_and_a_failing_one_is_a_warning(ends, details):
    plugins = [
        FakePlugin(
            name,
            "told = []"
            + hooked("hookcore_observe", "event, details", "told.append((event, dict(details)))", end),
        )
        for name, end in zip("abc", ends, strict=False)
    ]
    failing = [plugin.name for plugin, end in zip(plugins, ends, strict=True) if end != "pass"]
    with installed(plugins):
        host = PluginHost.discover()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            host.observe("applied", **details)
        told = [sys.modules[plugin.module].told for plugin in plugins]
    assert told == [[("applied", details)]] * len(plugins)
    assert all(warning.category is HookcoreWarning for warning in caught)
    assert [warning.filename for warning in caught] == [__file__] * len(failing)
    for warning, name in zip(caught, reversed(failing), strict=True):
        assert str(warning.message).startswith(
            f"plugin '{name}' of fake-plugins 1.5 failed in hookcore_observe: "
        )


def test_an_observer_cannot_change_what_others_are_told(hosting):
    host = hosting(hooked("hookcore_observe", "details", "details['bytes'] = 0"))
    details = {"bytes": 5}
    with pytest.warns(HookcoreWarning, match="does not support item assignment"):
        host.observe("applied", **details)


ONCE = """
import sys, threading
import hookcore.plugins
assert "{module}" not in sys.modules
hosts = []
threads = [threading.Thread(target=lambda: hosts.append(hookcore.plugins.plugins())) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(hosts) == 4 and len(set(map(id, hosts))) == 1
assert hosts[0] is hookcore.plugins.plugins()
assert sys.modules["{module}"].registered == [1], sys.modules["{module}"].registered
"""


def run_python(code: str, plugin: FakePlugin, tmp_path) -> None:
    folders = [str(folder) for folder in write_site([plugin], tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, *filter(None, sys.path)])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_plugins_are_discovered_at_the_first_use_and_once(tmp_path):
    # The pause lets the other threads come to the same point, if anything lets them.
    plugin = FakePlugin(
        "p",
        "import time\nregistered = []" + registering("registered.append(1)", "time.sleep(0.2)"),
    )
    run_python(ONCE.format(module=plugin.module), plugin, tmp_path)


def test_a_plugin_may_ask_for_the_plugins_while_it_is_imported(tmp_path):
    plugin = FakePlugin("p", DESCRIBE + "\nimport hookcore.plugins\nhookcore.plugins.plugins()")
    code = "from hookcore.plugins import plugins\nassert plugins().listing[0].state == 'active'"
    run_python(code, plugin, tmp_path)


def test_discovery_leaves_plugins_of_an_earlier_discovery_alone(tmp_path, monkeypatch):
    for folder in write_site([FakePlugin("p", DESCRIBE)], tmp_path):
        monkeypatch.syspath_prepend(folder)
    first = PluginHost.discover()
    shutil.rmtree(tmp_path / "fake-plugins")
    second = PluginHost.discover()
    assert [info.name for info in first.listing] == ["p"]
    assert second.listing == ()
    assert first.describe(ANY_COMPONENT) != second.describe(ANY_COMPONENT) == ModelConventions()
