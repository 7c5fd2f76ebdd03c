"""What a hooked call costs, and what putting hooks on and taking them off costs, beside the peers.

Run it with `make bench`, or `python benchmarks/dispatch.py`. All contestants are measured in one process,
in turns (A B C ... A B C ...) over many rounds, so that a slow moment of the machine meets all of them
alike. What counts is the cost above a plain call: medians, and minima beside them. Reads no files and
needs neither network nor accelerator; takes about half a minute.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from attrs import frozen
from diffusers.hooks import HookRegistry as DiffusersRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.hooks import apply_group_offloading
from torch import nn

import hookcore
from hookcore.report import table
from hookcore_plugins import GroupOffload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEAVES = 2_000


class NoOp(nn.Module):
    """A module whose call costs next to nothing, so that what is around it shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class HookcoreHook(hookcore.Hook):
    """Does nothing before and after a call."""

    def pre_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        return

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


@frozen
class HookEveryLeaf(hookcore.Technique):
    """Puts a hook that does nothing on each module without children."""

    name: ClassVar[str] = "hook_every_leaf"
    phase: ClassVar[hookcore.Phase] = hookcore.Phase.COMPUTE

    hooks: int = 1

    def bind(self, component: hookcore.Component) -> Iterator[hookcore.Binding]:
        for fqn, module in component.modules.items():
            if not module._modules:
                for _ in range(self.hooks):
                    yield hookcore.Binding(fqn, HookcoreHook())


class PeerDiffusersHook(DiffusersHook):
    """Does nothing before and after a call."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


class PeerAccelerateHook(AccelerateHook):
    """Does nothing before and after a call."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


def with_hookcore(module: nn.Module, hooks: int) -> None:
    hookcore.apply(module, [HookEveryLeaf(hooks)])


def with_diffusers(module: nn.Module, hooks: int) -> None:
    registry = DiffusersRegistry.check_if_exists_or_initialize(module)
    for index in range(hooks):
        registry.register_hook(PeerDiffusersHook(), f"hook_{index}")


def with_accelerate(module: nn.Module, hooks: int) -> None:
    for _ in range(hooks):
        add_hook_to_module(module, PeerAccelerateHook(), append=True)  # a SequentialHook from the second on


def with_torch(module: nn.Module, hooks: int) -> None:
    for _ in range(hooks):
        module.register_forward_pre_hook(lambda _module, _args: None)
        module.register_forward_hook(lambda _module, _args, output: output)


CONTESTANTS: dict[str, Callable[[nn.Module, int], None]] = {
    "hookcore": with_hookcore,
    "diffusers": with_diffusers,
    "accelerate": with_accelerate,
    "torch": with_torch,
}


def in_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()  # a collection would fall on whoever is next
    try:
        for _ in range(rounds):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def calls(module: nn.Module, times: int) -> Callable[[], None]:
    x = torch.zeros(1)

    def run() -> None:
        for _ in range(times):
            module(x)

    return run


def call_rows(rounds: int, times: int) -> Iterator[tuple[str, ...]]:
    """One row for each contestant and number of hooks."""
    yield "hooks", "library", "median us above a plain call", "minimum", "median / diffusers'"
    runs = {("plain", 0): calls(NoOp(), times)}
    for hooks in (1, 3):
        for name, put_on in CONTESTANTS.items():
            module = NoOp()
            put_on(module, hooks)
            runs[name, hooks] = calls(module, times)
    seconds = in_turns(runs, rounds)
    plain = seconds.pop(("plain", 0))
    # Each round has a plain run of its own, close in time to all others.
    above = {
        key: [(hooked - bare) / times * 1e6 for hooked, bare in zip(taken, plain, strict=True)]
        for key, taken in seconds.items()
    }
    for (name, hooks), microseconds in above.items():
        median = statistics.median(microseconds)
        ratio = median / statistics.median(above["diffusers", hooks])
        least = (min(seconds[name, hooks]) - min(plain)) / times * 1e6
        yield str(hooks), name, f"{median:.3f}", f"{least:.3f}", f"{ratio:.2f}"


def leaves(make: Callable[[], nn.Module] = NoOp) -> nn.Module:
    """A model of many leaves, in 40 blocks."""
    return nn.Sequential(*(nn.Sequential(*(make() for _ in range(LEAVES // 40))) for _ in range(40)))


def offload_and_back() -> dict[str, Callable[[], object]]:
    """What each library does to offload every leaf by itself, and to take that off again."""
    ours, diffusers_model, accelerate_model = (leaves(lambda: nn.Linear(4, 4)) for _ in range(3))
    device = torch.device("cpu")

    def with_diffusers_offload() -> None:
        apply_group_offloading(diffusers_model, onload_device=device, offload_type="leaf_level")
        DiffusersRegistry.check_if_exists_or_initialize(diffusers_model).remove_hook("group_offloading")

    def with_accelerate_offload() -> None:
        cpu_offload(accelerate_model, execution_device=device)
        remove_hook_from_module(accelerate_model, recurse=True)

    technique = GroupOffload(device, offload_type="leaf_level")
    return {
        "hookcore": lambda: hookcore.apply(ours, [technique]).remove(),
        "diffusers": with_diffusers_offload,
        "accelerate": with_accelerate_offload,
    }


def put_on_and_off() -> dict[str, Callable[[], object]]:
    """What each library does to put a hook on every leaf and to take it off again."""
    ours, diffusers_model, accelerate_model = leaves(), leaves(), leaves()

    def with_diffusers_hooks() -> None:
        for module in diffusers_model.modules():
            if not module._modules:
                registry = DiffusersRegistry.check_if_exists_or_initialize(module)
                registry.register_hook(PeerDiffusersHook(), "hook")
        for module in diffusers_model.modules():
            if not module._modules:
                DiffusersRegistry.check_if_exists_or_initialize(module).remove_hook("hook", recurse=False)

    def with_accelerate_hooks() -> None:
        for module in accelerate_model.modules():
            if not module._modules:
                add_hook_to_module(module, PeerAccelerateHook())
        remove_hook_from_module(accelerate_model, recurse=True)

    return {
        "hookcore": lambda: hookcore.apply(ours, [HookEveryLeaf()]).remove(),
        "diffusers": with_diffusers_hooks,
        "accelerate": with_accelerate_hooks,
    }


def put_on_rows(contestants: dict[str, Callable[[], object]], rounds: int) -> Iterator[tuple[str, ...]]:
    """One row for each contestant."""
    yield "library", f"median ms, {LEAVES:,} leaves", "minimum", "median / diffusers'"
    for run in contestants.values():
        run()  # the first run pays for imports and caches
    seconds = in_turns(contestants, rounds)
    for name, taken in seconds.items():
        ratio = statistics.median(taken) / statistics.median(seconds["diffusers"])
        yield name, f"{statistics.median(taken) * 1e3:.1f}", f"{min(taken) * 1e3:.1f}", f"{ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what hooks cost.")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of calls (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2_000, help="calls a round (default: %(default)s)")
    parser.add_argument("--put-on-rounds", type=int, default=15, help="rounds of apply and remove")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        print("A call of a module that does nothing\n")
        print(table(list(call_rows(options.rounds, options.calls))))
        print("\nA hook on every leaf, put on and taken off\n")
        print(table(list(put_on_rows(put_on_and_off(), options.put_on_rounds))))
        print("\nGroup offload of every leaf, put on and taken off\n")
        print(table(list(put_on_rows(offload_and_back(), options.put_on_rounds))))


if __name__ == "__main__":
    main()
