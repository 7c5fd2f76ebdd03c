"""Moving weights: what offload techniques are made of, public for third parties."""

from __future__ import annotations

from hookcore.memory.budget import choose_residents, largest_held
from hookcore.memory.checkpoint import Checkpoint, TensorEntry
from hookcore.memory.counts import StreamReport
from hookcore.memory.device import DeviceMover
from hookcore.memory.disk import DiskMover, cost
from hookcore.memory.grouping import (
    Group,
    entries_of,
    find_blocks,
    leaf_units,
    make_groups,
    merge_neighbours,
    moving_and_staying,
    slots_below,
    spanning_groups,
)
from hookcore.memory.host import HostMemory
from hookcore.memory.keys import find_entries
from hookcore.memory.mapping import MappedFile, find_mapping, map_checkpoint
from hookcore.memory.model_dtype import ModelDtypeHook, models_with_dtype
from hookcore.memory.mover import GroupMover, Needed
from hookcore.memory.origins import Origin, origin_of, set_origin, wanted_dtype
from hookcore.memory.packed import Packed
from hookcore.memory.placement import Placement, moved
from hookcore.memory.reads import WatchedTensors, stop_watching, watch
from hookcore.memory.schedule import Layout, Use, choose_layout, pass_seconds
from hookcore.memory.stream import StreamMover, has_streams
from hookcore.memory.tensors import check_movable, current_tensors, is_on, move_apart
from hookcore.memory.timeline import Recorder, Span, Timeline, record_timeline
from hookcore.memory.together import Together

__all__ = [
    "Checkpoint",
    "DeviceMover",
    "DiskMover",
    "Group",
    "GroupMover",
    "HostMemory",
    "Layout",
    "MappedFile",
    "ModelDtypeHook",
    "Needed",
    "Origin",
    "Packed",
    "Placement",
    "Recorder",
    "Span",
    "StreamMover",
    "StreamReport",
    "TensorEntry",
    "Timeline",
    "Together",
    "Use",
    "WatchedTensors",
    "check_movable",
    "choose_layout",
    "choose_residents",
    "cost",
    "current_tensors",
    "entries_of",
    "find_blocks",
    "find_entries",
    "find_mapping",
    "has_streams",
    "is_on",
    "largest_held",
    "leaf_units",
    "make_groups",
    "map_checkpoint",
    "merge_neighbours",
    "models_with_dtype",
    "move_apart",
    "moved",
    "moving_and_staying",
    "origin_of",
    "pass_seconds",
    "record_timeline",
    "set_origin",
    "slots_below",
    "spanning_groups",
    "stop_watching",
    "wanted_dtype",
    "watch",
]
