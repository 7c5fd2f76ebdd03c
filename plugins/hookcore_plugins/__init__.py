"""The techniques that ship with hookcore, and what it knows about other libraries' models.

Each module is a plugin of its own, found through its entry point as any third party's is. The technique
classes can be imported from here.
"""

from __future__ import annotations

from hookcore_plugins.disk_offload import DiskOffload
from hookcore_plugins.group_offload import GroupOffload
from hookcore_plugins.layerwise_casting import LayerwiseCasting

__all__ = ["DiskOffload", "GroupOffload", "LayerwiseCasting"]
