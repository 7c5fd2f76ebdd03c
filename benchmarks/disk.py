"""What streaming a model from disk costs, beside the peers, with its files cached and not.

Run it with `make bench`, or `python benchmarks/disk.py`. It measures what `hookcore demo` shows, with more
ways and rounds: each way runs in a process of its own, in turns (A B C ... A B C ...), so that a slow moment
of the machine meets all of them alike. Warm: the files are read before each process. Cold: they are dropped
from the system's cache before each process and before each of its steps, with all that a peer wrote.
Takes about ten minutes; needs 5 GiB of disk.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, frozen
from tqdm import tqdm

from hookcore import format_bytes, parse_bytes
from hookcore_plugins.demo.child import Request, drop_from_cache, read_into_cache
from hookcore_plugins.demo.draw import columns
from hookcore_plugins.demo.model import DemoModel, build
from hookcore_plugins.demo.run import Difference, about_machine, choose_device, run_way, scratch_folder, wrong
from hookcore_plugins.demo.ways import WAYS, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hookcore_plugins.demo.child import Measurement

_MIB = 1024**2
_CHUNK = 8 * _MIB
_RESULTS = Path(__file__).parent / "results"
_PEERS = ("accelerate", "diffusers-block", "diffusers-leaf")


@frozen
class Samples:
    """All processes of one way with one state of the cache, in order."""

    processes: list[Measurement]

    @property
    def steps(self) -> list[float]:
        """Seconds of all steps."""
        return [seconds for one in self.processes for seconds in one.steps]

    def step(self, pick: Callable[[list[float]], float]) -> float:
        """Seconds of a step: their median or minimum."""
        return pick(self.steps)

    def median(self, value: Callable[[Measurement], float]) -> float:
        """Median of something over the processes."""
        return statistics.median(map(value, self.processes))


@frozen
class Findings:
    """All that was measured.

    Attributes:
        model: What was run.
        budget: Bytes of memory for weights.
        samples: By state of the cache and way.
        differences: Of each way's output to the resident model's.
        speeds: Bytes a second of reading the files, each time it was tried, by how.
    """

    model: DemoModel
    budget: int
    samples: Mapping[str, Mapping[str, Samples]]
    differences: dict[str, Difference]
    speeds: Mapping[str, list[float]]


@frozen
class Ratio:
    """A figure beside what it should be."""

    what: str
    aim: float
    median: float
    minimum: float | None = None


def main() -> None:
    arguments = _arguments()
    device, dtype = choose_device()
    model = DemoModel("flux", parse_bytes(arguments.size), dtype)
    cache = arguments.cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    checkpoints = build(model, cache, lambda _: None)
    samples: dict[str, dict[str, Samples]] = {}
    findings = Findings(model, parse_bytes(arguments.budget), samples, {}, {"direct": [], "buffered": []})
    states = [state for state in ("warm", "cold") if state in arguments.states]
    turns = [(state, way) for state in states for _ in range(arguments.rounds) for way in arguments.ways]
    with scratch_folder(cache) as folder:
        reference = None
        for number, (state, way) in enumerate(tqdm(turns, unit="process")):
            if way == arguments.ways[0]:
                findings.speeds["direct"].append(_speed(checkpoints.full, _read_past_cache))
                drop_from_cache([checkpoints.full])
                findings.speeds["buffered"].append(_speed(checkpoints.full, read_into_cache))
            setting = Setting(model, checkpoints, device, findings.budget, folder / str(number))
            request = Request(way, setting, arguments.steps, arguments.threads, cold=state == "cold")
            one, output = run_way(request, lambda _event, _seconds: None)
            samples.setdefault(state, {}).setdefault(way, Samples([])).processes.append(one)
            reference = output if way == "resident" else reference
            if reference is not None:
                findings.differences[way] = Difference.of(output, reference)
    about = about_machine(device) | {"threads": arguments.threads or torch.get_num_threads()}
    _show(about, findings)
    path = _RESULTS / f"disk-{about['date'].replace(':', '')[:15]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{json.dumps(about | asdict(findings), indent=1)}\n")
    print(f"\nsaved {path}")
    if faults := wrong(findings.differences, dtype):
        raise SystemExit("\n".join(faults))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="2GiB", help="bytes of weights (default: %(default)s)")
    parser.add_argument("--budget", default="400MiB", help="bytes of memory for them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps a process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}"
    )
    parser.add_argument(
        "--states", nargs="+", choices=("warm", "cold"), default=("warm", "cold"), help="of the cache"
    )
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/hookcore"), help="default: %(default)s")
    return parser.parse_args()


def _speed(folder: Path, read: Callable[[Path], None]) -> float:
    """Bytes a second of reading a folder's files one after another."""
    nbytes = sum(file.stat().st_size for file in folder.iterdir())
    begin = time.perf_counter()
    read(folder)
    return nbytes / (time.perf_counter() - begin)


def _read_past_cache(folder: Path) -> None:
    """Reads all files of a folder from the disk itself."""
    with mmap.mmap(-1, _CHUNK) as buffer:
        for path in folder.iterdir():
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                while os.readv(file, [buffer]) == _CHUNK:
                    pass
            finally:
                os.close(file)


def _show(about: Mapping[str, Any], findings: Findings) -> None:
    print(f"{about['machine']}, {about['threads']} threads, {about['date']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    model, samples = findings.model, findings.samples
    print(f"{format_bytes(model.nbytes)} of {model.dtype}, a budget of {format_bytes(findings.budget)}")
    for how, found in findings.speeds.items():
        spread = f"{format_bytes(min(found))} to {format_bytes(max(found))}"
        print(f"reading the files, {how}: {format_bytes(statistics.median(found))}/s ({spread})")
    rows = [("", "set-up s", "step s", "fastest", "weights MiB", "in steps", "written MiB", "difference")]
    for state, of_state in samples.items():
        for way, one in of_state.items():
            rows.append(
                (
                    f"{state}: {WAYS[way].title}",
                    f"{one.median(lambda it: it.setup):.2f}",
                    f"{one.step(statistics.median):.2f}",
                    f"{one.step(min):.2f}",
                    f"{one.median(lambda it: it.weights_peak) / _MIB:,.0f}",
                    f"{one.median(lambda it: (it.peak_steps or it.peak) - it.rss_before) / _MIB:,.0f}",
                    f"{one.median(lambda it: it.written) / _MIB:,.0f}",
                    str(findings.differences.get(way, "")),
                )
            )
    print("\n".join(["", *columns(rows), ""]))
    print("\n".join(columns([("", "aim", "of medians", "of minima", ""), *map(_row, _ratios(findings))])))


def _row(ratio: Ratio) -> tuple[str, ...]:
    reached = "reached" if ratio.median <= ratio.aim else "MISSED"
    minimum = "" if ratio.minimum is None else f"{ratio.minimum:.3f}"
    return ratio.what, f"<= {ratio.aim:g}", f"{ratio.median:.3f}", minimum, reached


def _ratios(findings: Findings) -> Iterator[Ratio]:
    """All figures that there are samples for."""
    warm, cold = findings.samples.get("warm", {}), findings.samples.get("cold", {})

    def compared(what: str, aim: float, ours: Samples, peers: list[Samples], least: float = 0.0) -> Ratio:
        median, minimum = (
            ours.step(pick) / max(least, min(peer.step(pick) for peer in peers))
            for pick in (statistics.median, min)
        )
        return Ratio(what, aim, median, minimum)

    if "hookcore" in warm and "resident" in warm:
        yield compared("warm: a step / resident", 1.06, warm["hookcore"], [warm["resident"]])
    if "hookcore" in warm and "accelerate" in warm:
        yield compared("warm: a step / accelerate", 0.9, warm["hookcore"], [warm["accelerate"]])
    if "hookcore" in cold and "resident" in cold:
        # At most the budget stays in memory, so at least this much is read in a step.
        speed = max(map(statistics.median, findings.speeds.values()))
        least = (findings.model.nbytes - findings.budget) / speed
        what = f"cold: a step / max(resident, {least:.2f} s to read it)"
        yield compared(what, 1.1, cold["hookcore"], [cold["resident"]], least)
    if "hookcore" in cold and (peers := [cold[way] for way in _PEERS if way in cold]):
        yield compared("cold: a step / the fastest peer", 0.7, cold["hookcore"], peers)
    for state, of_state in findings.samples.items():
        # What the resident model takes beyond its weights is activations, which all ways have alike.
        resident = of_state.get("resident")
        whole = resident.median(lambda it: it.weights_peak) if resident else findings.model.nbytes
        activations = whole - findings.model.nbytes
        if ours := of_state.get("hookcore"):
            weights = max(one.weights_peak for one in ours.processes) - activations
            yield Ratio(f"{state}: weights in memory / budget", 1.1, weights / findings.budget)
            yield Ratio(f"{state}: bytes written", 0, max(one.written for one in ours.processes))
            if peer := of_state.get("accelerate"):
                theirs = peer.median(lambda it: it.weights_peak) - activations
                yield Ratio(f"{state}: weights in memory / accelerate", 0.2, weights / theirs)
                setup = ours.median(lambda it: it.setup) / peer.median(lambda it: it.setup)
                yield Ratio(f"{state}: set-up / accelerate", 0.05, setup)


if __name__ == "__main__":
    main()
