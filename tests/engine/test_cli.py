"""The command line, on top of plugins of every state."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
from attrs import asdict
from hypothesis import given
from hypothesis import strategies as st
from plugin_sites import FakePlugin, installed, write_site

import hookcore
from hookcore.cli import main
from hookcore.errors import HookcoreWarning
from hookcore.plugins import PluginHost, PluginInfo

words = st.text("abcdefgh_-1.", min_size=1, max_size=12)
infos = st.builds(
    PluginInfo,
    name=words,
    distribution=st.none() | words,
    version=st.none() | words,
    techniques=st.lists(words, max_size=3).map(tuple),
) | st.builds(
    PluginInfo,
    name=words,
    distribution=st.none() | words,
    version=st.none() | words,
    state=st.sampled_from(["blocked", "broken", "not found"]),
    problem=st.lists(words, min_size=1, max_size=3).map("\n".join),
)


def listed(listing: list[PluginInfo], *options: str) -> tuple[int, str]:
    """Runs `hookcore plugins`; returns its exit status and its output."""
    host = PluginHost()
    host.listing = tuple(listing)
    output = io.StringIO()
    with mock.patch("hookcore.cli.plugins", return_value=host), contextlib.redirect_stdout(output):
        return main(["plugins", *options]), output.getvalue()


def run_with(source: str, *argv: str) -> int:
    """Runs the command line with one plugin installed."""
    with installed([FakePlugin("p", source)]):
        host = PluginHost.discover()
        assert host.listing[0].problem is None
        with mock.patch("hookcore.cli.plugins", return_value=host):
            return main(argv)


def command(name: str, body: str) -> str:
    """Source of a plugin with one command."""
    return f"""
@hookimpl
def hookcore_register_commands(commands):
    parser = commands.add_parser({name!r})
    parser.add_argument("--count", type=int, default=1)
    parser.set_defaults(run=run)

def run(arguments):
    {body}
"""


@given(st.lists(infos, max_size=5))
def test_json_says_all_that_is_known(listing):
    status, output = listed(listing, "--json")
    rows = json.loads(output)
    assert [PluginInfo(**row | {"techniques": tuple(row["techniques"])}) for row in rows] == listing
    assert all(list(row) == list(asdict(listing[0])) for row in rows)
    assert status == any(info.state == "broken" for info in listing)


@given(st.lists(infos, max_size=5))
def test_the_table_has_a_line_for_each_plugin_and_then_the_problems(listing):
    status, output = listed(listing)
    heading, *lines = output.splitlines()
    starts = [heading.index(word) for word in ("NAME", "VERSION", "DISTRIBUTION", "TECHNIQUES", "STATE")]
    rows = [
        tuple(line[start:stop].rstrip() for start, stop in zip(starts, [*starts[1:], None], strict=True))
        for line in lines[: len(listing)]
    ]
    assert rows == [
        (i.name, i.version or "-", i.distribution or "-", ", ".join(i.techniques) or "-", i.state)
        for i in listing
    ]
    assert all(line == line.rstrip() for line in lines)
    below = "\n".join(lines[len(listing) :])
    assert below == "".join(
        f"\n{info.name} is {info.state}:\n{textwrap.indent(info.problem, '    ')}\n"
        for info in listing
        if info.problem
    ).removesuffix("\n")
    assert status == any(info.state == "broken" for info in listing)


@given(st.integers(0, 255))
def test_a_command_of_a_plugin_gets_its_arguments_and_returns_its_status(count):
    assert (
        run_with(command("twice", "return arguments.count * 2"), "twice", "--count", str(count)) == count * 2
    )


def test_what_hookcore_refuses_is_said_without_a_traceback(capsys):
    source = command("refuse", "raise PlanError('this does not fit')")
    assert run_with(source, "refuse") == 1
    assert capsys.readouterr() == ("", "hookcore: error: this does not fit\n")


def test_any_other_error_of_a_command_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_with(command("fail", "return 1 / 0"), "fail")


@pytest.mark.parametrize(
    "source",
    [
        "@hookimpl\ndef hookcore_register_commands(commands): raise RuntimeError('no luck')",
        "@hookimpl\ndef hookcore_register_commands(commands): raise SystemExit(7)",
        command("plugins", "return 7"),  # taken by hookcore
    ],
)
def test_a_plugin_that_fails_to_add_a_command_stops_nothing(source, capsys):
    with pytest.warns(
        HookcoreWarning, match="^plugin 'p' of fake-plugins 1.5 failed in hookcore_register_commands"
    ):
        assert run_with(source, "plugins") == 0
    assert capsys.readouterr().out.startswith("NAME")


def test_a_command_without_anything_to_run_is_an_error(capsys):
    source = "@hookimpl\ndef hookcore_register_commands(commands): commands.add_parser('idle')"
    with pytest.raises(SystemExit, match="2"):
        run_with(source, "idle")
    assert "gives it nothing to run" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "said"), [([], "required"), (["no_such_command"], "invalid choice")])
def test_a_command_line_without_a_known_command_is_an_error(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_with(command("mine", "return 0"), *argv)
    assert said in capsys.readouterr().err


def test_help_names_the_commands_of_plugins(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_with(command("mine", "return 0"), "--help")
    output = capsys.readouterr().out
    assert "mine" in output
    assert "plugins" in output


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_with(command("mine", "return 0"), "--version")
    assert capsys.readouterr().out == f"hookcore {hookcore.__version__}\n"


def test_broken_and_talkative_plugins_do_not_spoil_the_output_of_the_program(tmp_path):
    plugins = [
        FakePlugin("broken", "print('hello')\n1 / 0"),
        FakePlugin("talkative", "print('hello')" + command("mine", "return 0")),
    ]
    folders = [str(folder) for folder in write_site(plugins, tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-m", "hookcore", "plugins", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [(row["name"], row["state"]) for row in json.loads(done.stdout)] == [
        ("broken", "broken"),
        ("talkative", "active"),
    ]
    assert "ZeroDivisionError" in json.loads(done.stdout)[0]["problem"]
    assert done.stderr == "hello\nhello\n"
    assert done.returncode == 1
