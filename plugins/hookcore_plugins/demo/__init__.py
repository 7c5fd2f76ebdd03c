"""`hookcore demo`: one model, four ways to run it, and what each costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hookcore import hookimpl

if TYPE_CHECKING:
    import argparse


@hookimpl
def hookcore_register_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Bring `hookcore demo`."""
    parser = commands.add_parser(
        "demo",
        help="run a model that is larger than a memory budget, and compare with other ways to run it",
        description=(
            "Builds a diffusers transformer with random weights, runs denoising steps in memory, streamed "
            "from disk by hookcore, streamed in a smaller dtype, and with accelerate's disk_offload, checks "
            "that the outputs are equal, and shows what each way took. Exits with 1 if they are not."
        ),
    )
    parser.add_argument("--size", default="2GiB", help="bytes of weights (default: %(default)s)")
    parser.add_argument(
        "--budget", default="400MiB", help="bytes of memory for weights (default: %(default)s)"
    )
    parser.add_argument("--model", choices=("flux", "sd3"), default="flux", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        help="folder for the picture and the figures (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/hookcore"),
        help="folder for the model, which is kept for the next run (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # Only now: other commands must not wait for torch models and pictures to be imported.
    from hookcore_plugins.demo.run import run_demo

    return run_demo(
        size=arguments.size,
        budget=arguments.budget,
        family=arguments.model,
        steps=arguments.steps,
        out=arguments.out,
        cache=arguments.cache.expanduser(),
    )
