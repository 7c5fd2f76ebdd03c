"""Moving weights: what offload techniques are made of, public for third parties."""

from __future__ import annotations

from hookcore.memory.converted_reads import (
    Conversion,
    ConvertedTensors,
    convert_reads,
    read_as,
    stop_converting_reads,
)
from hookcore.memory.copies import copy_as, copy_to, stop_copying_as, stop_copying_to
from hookcore.memory.device.device_pool import DevicePool
from hookcore.memory.device.flat_group import FlatGroup, flat_nbytes
from hookcore.memory.device.pinned_memory import PinnedMemory
from hookcore.memory.device.stream_mover import StreamMover, has_streams
from hookcore.memory.device.stream_report import StreamReport
from hookcore.memory.device.synchronous_mover import SynchronousMover
from hookcore.memory.device.timeline import Recorder, Span, Timeline, record_timeline
from hookcore.memory.device_memory import free_device_bytes
from hookcore.memory.files.checkpoint import Checkpoint
from hookcore.memory.files.file_mover import FileMover
from hookcore.memory.files.file_range import cost
from hookcore.memory.files.file_store import FileStore
from hookcore.memory.files.host_pool import HostPool
from hookcore.memory.files.leftovers import make_claimed
from hookcore.memory.files.mapped_file import find_mapping
from hookcore.memory.files.origin import origin_of, wanted_dtype
from hookcore.memory.files.origins_of_model import (
    FileOrigins,
    check_ties,
    dtype_hooks,
    known_origins,
    origins_in,
    origins_of_mapped,
)
from hookcore.memory.files.spill import can_be_written
from hookcore.memory.gradients import Gradients, move_gradient
from hookcore.memory.grouping import (
    Group,
    callable_parts,
    entries_of,
    find_blocks,
    leaf_units,
    make_groups,
    merge_neighbours,
    moving_and_staying,
    slots_below,
)
from hookcore.memory.inputs import InputMover
from hookcore.memory.model_device import ModelDevice
from hookcore.memory.model_dtype import ModelDtypeHook, models_with_dtype
from hookcore.memory.mover import ComponentGroups, GroupMover
from hookcore.memory.placement import Placement
from hookcore.memory.planning.residency import choose_residents
from hookcore.memory.shared_weights import SharedWeights
from hookcore.memory.store import PinnedStore, Store
from hookcore.memory.tensor_memory import (
    check_movable,
    current_tensors,
    go_back,
    memory_seen_elsewhere,
    move_apart,
)
from hookcore.memory.watched_reads import stop_watching, watch
from hookcore.storage import planned_nbytes

__all__ = [
    "Checkpoint",
    "ComponentGroups",
    "Conversion",
    "ConvertedTensors",
    "DevicePool",
    "FileMover",
    "FileOrigins",
    "FileStore",
    "FlatGroup",
    "Gradients",
    "Group",
    "GroupMover",
    "HostPool",
    "InputMover",
    "ModelDevice",
    "ModelDtypeHook",
    "PinnedMemory",
    "PinnedStore",
    "Placement",
    "Recorder",
    "SharedWeights",
    "Span",
    "Store",
    "StreamMover",
    "StreamReport",
    "SynchronousMover",
    "Timeline",
    "callable_parts",
    "can_be_written",
    "check_movable",
    "check_ties",
    "choose_residents",
    "convert_reads",
    "copy_as",
    "copy_to",
    "cost",
    "current_tensors",
    "dtype_hooks",
    "entries_of",
    "find_blocks",
    "find_mapping",
    "flat_nbytes",
    "free_device_bytes",
    "go_back",
    "has_streams",
    "known_origins",
    "leaf_units",
    "make_claimed",
    "make_groups",
    "memory_seen_elsewhere",
    "merge_neighbours",
    "models_with_dtype",
    "move_apart",
    "move_gradient",
    "moving_and_staying",
    "origin_of",
    "origins_in",
    "origins_of_mapped",
    "planned_nbytes",
    "read_as",
    "record_timeline",
    "slots_below",
    "stop_converting_reads",
    "stop_copying_as",
    "stop_copying_to",
    "stop_watching",
    "wanted_dtype",
    "watch",
]
