"""The techniques that ship with hookcore, and what it knows about other libraries' models.

Each module is a plugin of its own, found through its entry point as any third party's is. The technique
classes can be imported from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookcore_plugins.attention_backend import AttentionBackend
    from hookcore_plugins.channels_last import ChannelsLast
    from hookcore_plugins.compile import Compile
    from hookcore_plugins.disk_offload import DiskOffload
    from hookcore_plugins.group_offload import GroupOffload
    from hookcore_plugins.layerwise_casting import LayerwiseCasting
    from hookcore_plugins.model_offload import ModelOffload
    from hookcore_plugins.sequential_offload import SequentialOffload
    from hookcore_plugins.slicing import Slicing
    from hookcore_plugins.tiling import Tiling
    from hookcore_plugins.trace import Trace

__all__ = [
    "AttentionBackend",
    "ChannelsLast",
    "Compile",
    "DiskOffload",
    "GroupOffload",
    "LayerwiseCasting",
    "ModelOffload",
    "SequentialOffload",
    "Slicing",
    "Tiling",
    "Trace",
]

_ROOMS = {
    "AttentionBackend": "attention_backend",
    "ChannelsLast": "channels_last",
    "Compile": "compile",
    "DiskOffload": "disk_offload",
    "GroupOffload": "group_offload",
    "LayerwiseCasting": "layerwise_casting",
    "ModelOffload": "model_offload",
    "SequentialOffload": "sequential_offload",
    "Slicing": "slicing",
    "Tiling": "tiling",
    "Trace": "trace",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: importing one plugin imports this package, and must not need all the others.
    if name in _ROOMS:
        return getattr(import_module(f"hookcore_plugins.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
