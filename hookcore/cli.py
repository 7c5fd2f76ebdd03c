"""The command line: `hookcore plugins`, and whatever commands the plugins bring."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from typing import TYPE_CHECKING

from attrs import asdict

from hookcore import __version__
from hookcore.errors import HookcoreError
from hookcore.hookspecs import PROJECT
from hookcore.plugins import plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hookcore.plugins import PluginHost, PluginInfo


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None takes the process's.

    Returns:
        The exit status: the command's own, or 1 when hookcore refuses what it was asked to do.

    Raises:
        SystemExit: argparse ends the command line, for `--help`, `--version` and wrong arguments.
    """
    # A plugin that prints while it is imported must not spoil a command's output, such as JSON.
    with contextlib.redirect_stdout(sys.stderr):
        parser = _parser(plugins())
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.error("the plugin that brings this command gives it nothing to run")
    try:
        status: int = arguments.run(arguments)
    except HookcoreError as error:
        sys.stderr.write(f"{PROJECT}: error: {error}\n")
        return 1
    return status


def _parser(host: PluginHost) -> argparse.ArgumentParser:
    """The arguments of hookcore's own command and of those that plugins bring."""
    parser = argparse.ArgumentParser(
        prog=PROJECT, description="Puts memory-saving techniques on torch models, and takes them off again."
    )
    parser.add_argument("--version", action="version", version=f"{PROJECT} {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", required=True)
    listing = commands.add_parser(
        "plugins",
        help="list the plugins, their techniques, and what is wrong with them",
        description="Lists all plugins; the exit status is 1 when one is broken.",
    )
    listing.add_argument("--json", action="store_true", help="write a JSON list")
    listing.set_defaults(run=lambda arguments: _list_plugins(host.listing, as_json=arguments.json))
    host.register_commands(commands)
    return parser


def _list_plugins(listing: Sequence[PluginInfo], *, as_json: bool) -> int:
    """Write all plugins; return 1 when one is broken."""
    if as_json:
        text = json.dumps([asdict(info) for info in listing], indent=2)
    else:
        text = "\n\n".join([_table(listing), *map(_problem, filter(lambda info: info.problem, listing))])
    sys.stdout.write(f"{text}\n")
    return int(any(info.state == "broken" for info in listing))


def _table(listing: Sequence[PluginInfo]) -> str:
    """One line for each plugin, under a heading, in columns as wide as they need."""
    rows = [("NAME", "VERSION", "DISTRIBUTION", "TECHNIQUES", "STATE")]
    rows += [
        (
            info.name,
            info.version or "-",
            info.distribution or "-",
            ", ".join(info.techniques) or "-",
            info.state,
        )
        for info in listing
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _problem(info: PluginInfo) -> str:
    """Return why a plugin is not active."""
    return f"{info.name} is {info.state}:\n{textwrap.indent(info.problem or '', '    ')}"
