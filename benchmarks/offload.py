"""What streaming weights to an accelerator costs, beside the peers and beside what is possible.

Run it with `make bench`, or `python benchmarks/offload.py`. Everything but the cost in Python runs on the
simulated accelerator in virtual time, so that the figures are the same on every machine and each time: the
device computes a pass of the model in 160 ms, and its link copies all weights in X/C times that.
Transformers of 20 equal blocks (Flux) and a UNet of unequal ones; small weights, real numerics, every race an
error.

The default is a part that takes three to six minutes; `--all` takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from attrs import asdict, frozen
from offloading import ways
from offloading.cost import OURS, THEIRS, Cost, measure, measure_simulated
from offloading.models import FAMILIES, build
from offloading.search import climb
from offloading.simulated import PASSES, Run, Setting, calibrate, host_peak, run_way
from tqdm import tqdm

import hookcore.memory.device.stream_mover
import hookcore.testing.simulator as sim
from hookcore import BudgetError
from hookcore.memory.planning.pool_layout import Layout, choose_layout
from hookcore_plugins.demo.draw import columns
from hookcore_plugins.demo.run import about_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hookcore.memory.planning.schedule import Use

RATIOS = (0.5, 1.0, 2.0, 4.0)
BUDGETS = (0.03, 0.06, 0.13, 0.25, 0.5, 0.75)
TRIAL = {(1.0, 0.25): 218, (1.0, 0.5): 173, (2.0, 0.25): 314, (2.0, 0.5): 235}
"""What a trial reached on the UNet: virtual ms a pass, by X/C and budget."""
AGAINST_PEERS = {0.13: 1.15, 0.25: 1.25, 0.5: 1.8}
"""How many times as fast as the peers' best mode within a budget, on equal blocks at X/C = 2."""
AGAINST_BLOCKS = 1.7
_FEW_RATIOS = (1.0, 2.0)
_FEW_MODES = (
    "diffusers-block-stream",
    "diffusers-block-stream-record",
    "diffusers-leaf-stream",
    "diffusers-leaf-stream-record",
    "accelerate",
)
_TRIES = {False: 1_000, True: 6_000}
_QUARTER = 0.25
_MILLI = 1e3


@frozen
class Ours:
    """hookcore within a budget.

    Attributes:
        share: The budget, of the weights' bytes.
        budget: In bytes, and more than that share where no less works.
        run: What it did.
        optimum: Seconds a pass that a search found to be possible; None where none was made.
        expected: Seconds a pass that hookcore itself expected.
        way: What was applied.
    """

    share: float
    budget: int
    run: Run
    optimum: float | None = None
    expected: float | None = None
    way: str = "GroupOffload"


@frozen
class Rival:
    """A peer's mode, and hookcore with no more memory than it used."""

    name: str
    run: Run
    ours: Ours


@frozen
class Cell:
    """One model on one link.

    Attributes:
        ratio: Copying all weights, in times of computing.
        ours: hookcore's budgets.
        rivals: The peers' modes.
    """

    ratio: float
    ours: list[Ours]
    rivals: list[Rival]


@frozen
class Family:
    """All of one model.

    Attributes:
        setting: What it runs on.
        largest: Bytes of the largest group.
        set_up: Most host bytes while hookcore is put on.
        cells: By link.
    """

    setting: Setting
    largest: int
    set_up: int
    cells: list[Cell]


@frozen
class Aim:
    """A figure beside what it should be."""

    what: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    cost = {} if arguments.no_cost else {"free": measure()}
    sim.install(devices=1)
    cost |= {} if arguments.no_cost else {"simulated": measure_simulated()}
    about = about_machine(torch.device("cpu"))
    print(f"{about['machine']}, {about['date']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    families = {name: _run_family(name, arguments) for name in arguments.models}
    for name, family in families.items():
        _show_family(name, family)
    _show_cost(cost)
    aims = [aim for name, family in families.items() for aim in _aims(name, family)]
    aims += _cost_aims(cost)
    print("\nAims\n")
    print("\n".join(columns([("", "aim", "found", ""), *map(_aim_row, aims)])))
    missed = sum(not aim.is_met for aim in aims)
    print(f"\n{len(aims) - missed} met, {missed} MISSED")
    if arguments.json is not None:
        arguments.json.write_text(f"{json.dumps(about | _as_json(families, cost, aims), indent=1)}\n")
        print(f"saved {arguments.json}")
    if not all(run.equal for family in families.values() for run in _runs(family)):
        raise SystemExit("an output differs from the resident model's")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every link and every mode of the peers")
    parser.add_argument("--models", nargs="+", choices=FAMILIES, help=f"of {FAMILIES}")
    parser.add_argument("--ratios", nargs="+", type=float, help=f"X/C; of {RATIOS}")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="default: %(default)s")
    parser.add_argument("--modes", nargs="*", metavar="MODE", help=f"of {', '.join(ways.peers())}")
    parser.add_argument("--no-cost", action="store_true", help="leave out the cost in Python")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args()
    if arguments.ratios is None:
        arguments.ratios = RATIOS if arguments.all else _FEW_RATIOS
    if arguments.models is None:
        arguments.models = [name for name in FAMILIES if arguments.all or name != "flux-single"]
    if arguments.modes is None:
        arguments.modes = [name for name in ways.peers() if arguments.all or name in _FEW_MODES]
    return arguments


# Measuring


def _run_family(name: str, arguments: argparse.Namespace) -> Family:
    model = build(name, "small")
    setting = calibrate(model)
    largest = max(
        sum(it.nbytes for it in module.parameters(recurse=False)) for module in model.module.modules()
    )
    set_up = host_peak(setting, ways.with_hookcore(int(max(arguments.budgets) * setting.nbytes)))
    # What equal blocks are held to is the bound, which needs no search.
    tries = _TRIES[arguments.all] if arguments.all or name == "unet" else 0
    cells = []
    for ratio in arguments.ratios:
        budgets = [(share, int(share * setting.nbytes)) for share in arguments.budgets]
        # Peers are compared where the link is what limits them, unless all is wanted.
        modes = arguments.modes if arguments.all or ratio == max(arguments.ratios) else []
        described = f"{model.title}, X/C {ratio:g}"
        with tqdm(total=len(budgets) + len(modes), desc=described, unit="way", leave=False) as progress:
            ours = []
            for share, budget in budgets:
                ours.append(_run_ours(setting, ratio, share, budget, tries))
                progress.update()
            rivals: list[Rival] = []
            for mode in modes:
                rivals.append(_run_rival(setting, ratio, mode, rivals))
                progress.update()
        cells.append(Cell(ratio, ours, rivals))
    return Family(setting, largest, set_up, cells)


def _run_rival(setting: Setting, ratio: float, name: str, others: list[Rival]) -> Rival:
    """Runs a peer's mode, and hookcore with no more memory: the faster of two ways.

    A budget is for weights alone, whatever activations take; layer by layer, fewer weights are there while
    activations are many.
    """
    run = run_way(setting, ratio, ways.peers()[name])
    known = [it.ours for it in others if it.run.peak == run.peak]
    if known:
        return Rival(name, run, known[0])
    budget = run.peak - setting.activations
    ours = _run_ours(setting, ratio, budget / setting.nbytes, budget)
    if ours.run.seconds > run.seconds:
        layers = run_way(setting, ratio, ways.layer_by_layer)
        if layers.peak <= run.peak and layers.seconds < ours.run.seconds:
            ours = Ours(ours.share, budget, layers, way="SequentialOffload")
    return Rival(name, run, ours)


def _run_ours(setting: Setting, ratio: float, share: float, budget: int, tries: int = 0) -> Ours:
    """Runs hookcore, and looks for a better choice of residents than it made."""
    chosen: list[tuple[Layout[Any] | None, list[Use[Any]], int]] = []
    asked: dict[str, Any] = {}

    def noting(uses: list[Use[Any]], room: int, least_ring: int, **options: Any) -> Layout[Any] | None:
        layout = choose_layout(uses, room, least_ring, **options)
        chosen.append((layout, uses, room))
        asked.update(options)
        return layout

    with patch.object(hookcore.memory.device.stream_mover, "choose_layout", noting):
        try:
            run = run_way(setting, ratio, ways.with_hookcore(budget))
        except BudgetError as error:
            least = re.search(r"smallest budget that works is (\d+) bytes", str(error))
            if least is None:
                raise
            budget = int(least[1])
            run = run_way(setting, ratio, ways.with_hookcore(budget))
    if not chosen or not tries:
        return Ours(share, budget, run)
    expected, optimum = climb(*chosen[-1], tries, **asked)
    return Ours(share, budget, run, optimum=optimum, expected=expected)


def _runs(family: Family) -> Iterator[Run]:
    for cell in family.cells:
        yield from (it.run for it in cell.ours)
        for rival in cell.rivals:
            yield from (rival.run, rival.ours.run)


def _bound(setting: Setting, ratio: float, budget: int) -> float:
    """Seconds that a pass cannot take less than."""
    copying = setting.seconds * ratio * (setting.nbytes - budget) / setting.nbytes
    return max(setting.seconds, copying)


# Aims


def _aims(name: str, family: Family) -> Iterator[Aim]:
    setting = family.setting
    for cell in family.cells:
        at = f"{name}, X/C {cell.ratio:g}"
        for ours in cell.ours:
            if ours.share < min(AGAINST_PEERS):
                continue
            where = f"{at}, {ours.share:.0%}: time"
            if name != "unet":
                bound = _bound(setting, cell.ratio, ours.budget)
                yield Aim(f"{where} / bound", ours.run.seconds / bound, 1.03 if cell.ratio <= 1 else 1.08)
            elif ours.optimum is not None:
                yield Aim(f"{where} / the best found", ours.run.seconds / ours.optimum, 1.03)
            trial = TRIAL.get((cell.ratio, ours.share))
            if name == "unet" and trial is not None:
                yield Aim(f"{where} / the trial's {trial} ms", ours.run.seconds * _MILLI / trial, 1.0)
        yield from _aims_beside_peers(name, at, cell)
    yield from _aims_of_memory(name, family)


def _aims_beside_peers(name: str, at: str, cell: Cell) -> Iterator[Aim]:
    for rival in cell.rivals:
        ours = rival.ours.run
        faster = rival.run.seconds / ours.seconds
        yield Aim(f"{at}: {rival.name}'s time / ours at its peak", faster, 1.0, at_least=True)
        yield Aim(f"{at}: our peak / {rival.name}'s", ours.peak / rival.run.peak, 1.0)
    if name != "unet" and cell.ratio == 2:
        for ours in cell.ours:
            limit = AGAINST_PEERS.get(ours.share)
            within = [it.run.seconds for it in cell.rivals if it.run.peak <= ours.run.peak]
            if within and limit is not None:
                what = f"{at}, {ours.share:.0%}: best peer's time within it / ours"
                yield Aim(what, min(within) / ours.run.seconds, limit, at_least=True)
    if name == "unet" and cell.ratio == 2:
        for rival in cell.rivals:
            if rival.name.startswith("diffusers-block-stream"):
                what = f"{at}: {rival.name}'s time / ours at its peak"
                yield Aim(what, rival.run.seconds / rival.ours.run.seconds, AGAINST_BLOCKS, at_least=True)


def _aims_of_memory(name: str, family: Family) -> Iterator[Aim]:
    setting = family.setting
    tried = [it for cell in family.cells for it in (*cell.ours, *(rival.ours for rival in cell.rivals))]
    done = [(it.budget, it.run) for it in tried]
    yield Aim(f"{name}: host waits, all runs", sum(run.waits for _, run in done), 0)
    yield Aim(f"{name}: virtual s waited by the host, all runs", sum(run.waited for _, run in done), 1e-9)
    # Copies that were begun for the pass after the last one count as well: hence to the nearest copy a pass.
    copies = max(round(run.copies) / max(1, run.streamed) for _, run in done)
    yield Aim(f"{name}: most copies a pass / streamed groups", copies, 1)
    yield Aim(f"{name}: copies back to the host, all runs", sum(run.moved_back for _, run in done), 0)
    over = max((run.peak - setting.activations) / budget for budget, run in done)
    yield Aim(f"{name}: most weights on the device / budget", over, 1)
    grown = max(max(run.peaks[1:]) / min(run.peaks[1:]) for _, run in done)
    yield Aim(f"{name}: peak, most / least of passes 2 to {len(done[0][1].peaks)}", grown, 1)
    pinned = max(run.pinned for _, run in done)
    yield Aim(f"{name}: pinned host bytes / weights", pinned / setting.nbytes, 1.01)
    allowed = 1.05 + family.largest / setting.nbytes
    yield Aim(f"{name}: host bytes at set-up / weights", family.set_up / setting.nbytes, allowed)


def _cost_aims(cost: dict[str, dict[str, Cost]]) -> Iterator[Aim]:
    for where, found in cost.items():
        for name in OURS:
            ratio = found[name].minimum / found[THEIRS].minimum
            yield Aim(f"Python a call, {where} device: {name} / {THEIRS}", ratio, _QUARTER)


# Showing


def _aim_row(aim: Aim) -> tuple[str, ...]:
    sign = ">=" if aim.at_least else "<="
    return aim.what, f"{sign} {aim.limit:.4g}", f"{aim.found:.3f}", "met" if aim.is_met else "MISSED"


def _show_family(name: str, family: Family) -> None:
    setting = family.setting
    share = setting.activations / setting.nbytes
    print(f"\n{setting.model.title}: {setting.nbytes:,} B of weights, activations of {share:.1%} of that,")
    print(f"a resident pass {setting.seconds * _MILLI:.1f} ms; virtual ms a pass, mean of {PASSES}")
    for cell in family.cells:
        print(f"\n{name}, X/C {cell.ratio:g}: hookcore within a budget for weights\n")
        print("\n".join(columns([_OURS_TITLES, *(_ours_row(name, setting, cell, it) for it in cell.ours)])))
        if cell.rivals:
            print(
                f"\n{name}, X/C {cell.ratio:g}: peers, and hookcore with no more memory (peaks of weights)\n"
            )
            print("\n".join(columns([_RIVAL_TITLES, *(_rival_row(setting, it) for it in cell.rivals)])))


_OURS_TITLES = (
    *("budget", "ms", "bound", "ratio", "best found", "ratio", "expected", "trial", "stalled ms"),
    *("peak", "copies", "groups", "waits"),
)
_RIVAL_TITLES = (
    *("", "ms", "peak", "growth", "waits", "waited ms", "copies", "back", "pinned"),
    *("hookcore ms", "peak", "times as fast", "by"),
)


def _ours_row(name: str, setting: Setting, cell: Cell, ours: Ours) -> tuple[str, ...]:
    run = ours.run
    bound = _bound(setting, cell.ratio, ours.budget)
    trial = TRIAL.get((cell.ratio, ours.share)) if name == "unet" else None
    return (
        f"{ours.share:.1%}",
        f"{run.seconds * _MILLI:.1f}",
        f"{bound * _MILLI:.1f}",
        f"{run.seconds / bound:.3f}",
        f"{ours.optimum * _MILLI:.1f}" if ours.optimum else "",
        f"{run.seconds / ours.optimum:.3f}" if ours.optimum else "",
        f"{ours.expected * _MILLI:.1f}" if ours.expected else "",
        "" if trial is None else str(trial),
        f"{run.stalled * _MILLI:.1f}",
        f"{(run.peak - setting.activations) / setting.nbytes:.1%}",
        f"{run.copies:.0f}",
        str(run.streamed),
        f"{run.waits:.0f}",
    )


def _rival_row(setting: Setting, rival: Rival) -> tuple[str, ...]:
    def weights(run: Run) -> str:
        return f"{(run.peak - setting.activations) / setting.nbytes:.1%}"

    run, ours = rival.run, rival.ours.run
    return (
        rival.name,
        f"{run.seconds * _MILLI:.1f}",
        weights(run),
        f"{run.peak / run.peaks[1]:.2f}",
        f"{run.waits:.0f}",
        f"{run.waited * _MILLI:.1f}",
        f"{run.copies:.0f}",
        f"{run.moved_back:.0f}",
        f"{run.pinned / setting.nbytes:.0%}",
        f"{ours.seconds * _MILLI:.1f}",
        weights(ours),
        f"{run.seconds / ours.seconds:.3f}",
        rival.ours.way,
    )


def _show_cost(cost: dict[str, dict[str, Cost]]) -> None:
    for where, found in cost.items():
        own = "free" if where == "free" else "simulated, at tens of us an operation"
        print(f"\nPython: us of CPU a call of a leaf, above a plain call's; the device's own work {own}\n")
        rows = [(name, f"{it.median:.1f}", f"{it.minimum:.1f}") for name, it in found.items()]
        print("\n".join(columns([("", "median", "minimum"), *rows])))


def _as_json(
    families: dict[str, Family], cost: dict[str, dict[str, Cost]], aims: list[Aim]
) -> dict[str, Any]:
    def described(family: Family) -> dict[str, Any]:
        setting = family.setting
        return {
            "model": setting.model.title,
            "nbytes": setting.nbytes,
            "resident_seconds": setting.seconds,
            "activations": setting.activations,
            "largest_group": family.largest,
            "set_up_host_peak": family.set_up,
            "cells": [asdict(cell) for cell in family.cells],
        }

    return {
        "families": {name: described(family) for name, family in families.items()},
        "python_cost_us": {
            where: {name: asdict(it) for name, it in found.items()} for where, found in cost.items()
        },
        "aims": [asdict(aim) | {"met": aim.is_met} for aim in aims],
    }


if __name__ == "__main__":
    main()
