"""A simulated accelerator: finds races, leaks and wrong peaks of offloading code on a machine without one.

    import hookcore.testing.simulator as sim

    sim.install(devices=2, memory="8GiB")
    weight = torch.randn(1000, 1000).pin_memory().to("sim", non_blocking=True)

Tensors on "sim" are plain torch tensors with the CPU's numerics. Time is virtual, and whatever runs without
waiting for what it depends on raises `RaceError`. See docs/reference/simulator.md.
"""

from hookcore.testing.simulator.control import (
    check,
    counting,
    fail_at,
    install,
    limited,
    reset,
    traced,
    violations,
    watching_host,
)
from hookcore.testing.simulator.cuda_errors import CudaError
from hookcore.testing.simulator.errors import (
    RaceError,
    SimulatorError,
    UnsupportedOperationError,
    Violation,
)
from hookcore.testing.simulator.inspection import (
    Holding,
    StreamPool,
    max_pinned_bytes,
    now,
    pinned_bytes,
    snapshot,
    stream_pools,
)
from hookcore.testing.simulator.naming import name_tensors
from hookcore.testing.simulator.profiles import (
    A100_80GB,
    CUDA,
    CUDA_CACHING,
    CUDA_NAMES,
    GENERIC,
    H100_80GB,
    L4,
    NO_STREAMS,
    RTX_4090,
    STREAM_NAMES,
    DeviceProfile,
)
from hookcore.testing.simulator.state import is_installed
from hookcore.testing.simulator.streams import Event, Stream
from hookcore.testing.simulator.trace import Span, Trace

__all__ = [
    "A100_80GB",
    "CUDA",
    "CUDA_CACHING",
    "CUDA_NAMES",
    "GENERIC",
    "H100_80GB",
    "L4",
    "NO_STREAMS",
    "RTX_4090",
    "STREAM_NAMES",
    "CudaError",
    "DeviceProfile",
    "Event",
    "Holding",
    "RaceError",
    "SimulatorError",
    "Span",
    "Stream",
    "StreamPool",
    "Trace",
    "UnsupportedOperationError",
    "Violation",
    "check",
    "counting",
    "fail_at",
    "install",
    "is_installed",
    "limited",
    "max_pinned_bytes",
    "name_tensors",
    "now",
    "pinned_bytes",
    "reset",
    "snapshot",
    "stream_pools",
    "traced",
    "violations",
    "watching_host",
]
