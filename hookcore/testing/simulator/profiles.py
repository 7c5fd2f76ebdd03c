"""What a device can do: sizes, bandwidths, latencies, rates. The figures behind the virtual time.

The figures of a real device are peaks from its maker's public data sheet, bandwidths of links for one
direction. Latencies are in no data sheet: they are the defaults below for all devices, typical of CUDA. So
virtual times compare two ways of doing something on a device; they don't foretell seconds.
"""

from __future__ import annotations

from typing import Any

from attrs import evolve, field, frozen, validators

from hookcore.testing.simulator.cuda_errors import CudaError
from hookcore.units import parse_bytes

GB = 1e9
TERA = 1e12
_positive: Any = validators.gt(0)
_not_negative: Any = validators.ge(0)


def _bytes(size: int | str | None) -> int | None:
    return None if size is None else parse_bytes(size)


CUDA_NAMES = frozenset(("CUDAGraph", "cudart", "graph", "is_current_stream_capturing"))
"""Names of a device module that only CUDA's has."""


@frozen(kw_only=True)
class DeviceProfile:
    """The figures of one device.

    Attributes:
        name: What it is called.
        memory: Bytes, as a number or as "24GiB"; None for no limit.
        memory_bandwidth: Of the device's own memory, bytes a second.
        flops_16: Dense operations a second on types of two bytes or less.
        flops_32: Operations a second on wider types.
        host_to_device: Bandwidth of a copy from pinned memory, bytes a second.
        device_to_host: Bandwidth of a copy to pinned memory, bytes a second.
        pageable: Bandwidth of copies from and to other host memory, bytes a second.
        peer: Bandwidth of copies to another device, bytes a second.
        copy_latency: Seconds before the first byte of a copy.
        kernel_latency: Seconds that the shortest kernel takes.
        launch_latency: Seconds of the host's time to launch anything.
        lacks: Names that `torch.get_device_module("sim")` doesn't have, such as "Stream".
        lockable: Bytes of host memory that can be page-locked; None for no limit. WSL, Tegra and systems that
            are low on memory have a limit, which may be 0.
        lock_error: What `cudaHostRegister` returns above the limit.
        pins: Whether host memory can be page-locked. Without, to pin memory gives ordinary memory.
        caching: Whether torch's caching allocator is simulated, which rounds sizes up and keeps freed memory
            for its stream. Otherwise sizes are exact, and freed memory is everybody's.
        launch_queue: How many operations of a stream can wait; the host waits for room. None for any number.
        first_launch: Seconds of the host's time that the first launch of each kernel takes, besides.
        times_only_done_events: Whether `elapsed_time` raises for an event that the device has not reached.
        source: Where the figures are published.
    """

    name: str
    memory: int | None = field(default=None, converter=_bytes)
    memory_bandwidth: float = field(default=1500 * GB, validator=_positive)
    flops_16: float = field(default=100 * TERA, validator=_positive)
    flops_32: float = field(default=25 * TERA, validator=_positive)
    host_to_device: float = field(default=25 * GB, validator=_positive)
    device_to_host: float = field(default=25 * GB, validator=_positive)
    pageable: float = field(default=6 * GB, validator=_positive)
    peer: float = field(default=50 * GB, validator=_positive)
    copy_latency: float = field(default=10e-6, validator=_not_negative)
    kernel_latency: float = field(default=3e-6, validator=_not_negative)
    launch_latency: float = field(default=5e-6, validator=_not_negative)
    lacks: frozenset[str] = CUDA_NAMES
    lockable: int | None = field(default=None, converter=_bytes)
    lock_error: CudaError = CudaError.memoryAllocation
    pins: bool = True
    caching: bool = False
    launch_queue: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    first_launch: float = field(default=0.0, validator=_not_negative)
    times_only_done_events: bool = False
    source: str = ""

    def with_memory(self, memory: int | str | None) -> DeviceProfile:
        """The same device with another amount of memory."""
        return evolve(self, memory=memory)


GENERIC = DeviceProfile(name="generic", source="round figures, no real device; no limit of memory")

STREAM_NAMES = frozenset(
    ("Event", "Stream", "current_stream", "default_stream", "set_stream", "stream"),
)
"""Names of a device module that are about streams."""

NO_STREAMS = evolve(
    GENERIC,
    name="no streams",
    lacks=STREAM_NAMES | GENERIC.lacks,
    pins=False,
    source="round figures; the names that PyPI's torchvulkan 0.2 lacks, and torch's own MPS but for Event",
)

CUDA = evolve(
    GENERIC,
    name="as CUDA",
    lacks=frozenset(),
    launch_queue=1000,
    first_launch=200e-6,
    times_only_done_events=True,
    source="round figures, with the rules that CUDA has beyond those of every device with streams",
)
CUDA_CACHING = evolve(CUDA, name="as CUDA, caching", caching=True)

# NVIDIA states links in both directions together; half of it is one direction. PCIe 4.0 x16 gives 32 GB/s
# and PCIe 5.0 x16 gives 64 GB/s a direction.
A100_80GB = DeviceProfile(
    name="NVIDIA A100 80GB SXM",
    memory="80GB",
    memory_bandwidth=2039 * GB,
    flops_16=312 * TERA,
    flops_32=19.5 * TERA,
    host_to_device=32 * GB,
    device_to_host=32 * GB,
    peer=300 * GB,
    source="NVIDIA A100 Tensor Core GPU data sheet (June 2021)",
)
H100_80GB = DeviceProfile(
    name="NVIDIA H100 80GB SXM",
    memory="80GB",
    memory_bandwidth=3350 * GB,
    flops_16=989 * TERA,
    flops_32=67 * TERA,
    host_to_device=64 * GB,
    device_to_host=64 * GB,
    peer=450 * GB,
    source="NVIDIA H100 Tensor Core GPU data sheet; 16-bit rate without sparsity",
)
L4 = DeviceProfile(
    name="NVIDIA L4",
    memory="24GB",
    memory_bandwidth=300 * GB,
    flops_16=121 * TERA,
    flops_32=30.3 * TERA,
    host_to_device=32 * GB,
    device_to_host=32 * GB,
    peer=32 * GB,
    source="NVIDIA L4 Tensor Core GPU data sheet; 16-bit rate without sparsity",
)
RTX_4090 = DeviceProfile(
    name="NVIDIA GeForce RTX 4090",
    memory="24GB",
    memory_bandwidth=1008 * GB,
    flops_16=165.2 * TERA,
    flops_32=82.6 * TERA,
    host_to_device=32 * GB,
    device_to_host=32 * GB,
    peer=32 * GB,
    source="NVIDIA Ada GPU Architecture white paper, appendix A; 16-bit rate with 32-bit sums, no sparsity",
)
