"""Ways to run a model whose weights don't fit: hookcore's, and all modes of the peers that are installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from attrs import frozen

import hookcore
from hookcore_plugins import GroupOffload, SequentialOffload

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    PutOn = Callable[[nn.Module, torch.device], None]

RESIDENT = "resident"


@frozen
class Mode:
    """One set of options of diffusers' group offloading."""

    level: str
    use_stream: bool = False
    record_stream: bool = False
    low_cpu_mem_usage: bool = False

    @property
    def name(self) -> str:
        """As it is called in tables and on the command line."""
        options = {
            "stream": self.use_stream,
            "record": self.record_stream,
            "lowcpu": self.low_cpu_mem_usage,
        }
        return "-".join(["diffusers", self.level, *(name for name, on in options.items() if on)])

    def put_on(self, module: nn.Module, device: torch.device) -> None:
        """Puts it on a module."""
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            module,
            onload_device=device,
            offload_type=f"{self.level}_level",
            num_blocks_per_group=1 if self.level == "block" else None,
            use_stream=self.use_stream,
            record_stream=self.record_stream,
            low_cpu_mem_usage=self.low_cpu_mem_usage,
            non_blocking=self.use_stream,
        )


MODES = [
    mode
    for level in ("block", "leaf")
    for mode in (
        Mode(level),
        Mode(level, use_stream=True),
        Mode(level, use_stream=True, record_stream=True),
        Mode(level, use_stream=True, low_cpu_mem_usage=True),
        Mode(level, use_stream=True, record_stream=True, low_cpu_mem_usage=True),
    )
]


def peers() -> dict[str, PutOn]:
    """The modes of all peers that are installed, by name."""
    found: dict[str, PutOn] = {}
    if find_spec("diffusers") is not None:
        found |= {mode.name: mode.put_on for mode in MODES}
    if find_spec("accelerate") is not None:
        found["accelerate"] = with_accelerate
    return found


def with_accelerate(module: nn.Module, device: torch.device) -> None:
    """Offloads leaf by leaf, as diffusers' `enable_sequential_cpu_offload` does."""
    from accelerate import cpu_offload

    cpu_offload(module, device)


def stay(module: nn.Module, device: torch.device) -> None:
    """Moves a module to the device for good, one tensor after the other."""
    module.to(device)


def with_hookcore(budget: int | None) -> PutOn:
    """Group offloading within a budget in bytes, or in as little memory as it takes."""

    def put_on(module: nn.Module, device: torch.device) -> None:
        hookcore.apply(module, [GroupOffload(device, memory_budget=budget)])

    return put_on


def layer_by_layer(module: nn.Module, device: torch.device) -> None:
    """Sequential offloading, which takes the least memory."""
    hookcore.apply(module, [SequentialOffload(device)])
