"""CUDA's error codes, and the errors that torch raises for them."""

from __future__ import annotations

from enum import IntEnum

import torch


class CudaError(IntEnum):
    """The codes of CUDA's runtime that the simulator gives (driver_types.h)."""

    success = 0
    invalidValue = 1  # noqa: N815 -- the runtime's names
    memoryAllocation = 2  # noqa: N815
    illegalState = 401  # noqa: N815
    hostMemoryAlreadyRegistered = 712  # noqa: N815
    hostMemoryNotRegistered = 713  # noqa: N815
    notSupported = 801  # noqa: N815
    streamCaptureUnsupported = 900  # noqa: N815
    streamCaptureInvalidated = 901  # noqa: N815
    streamCaptureMerge = 902  # noqa: N815
    streamCaptureUnjoined = 904  # noqa: N815
    streamCaptureIsolation = 905  # noqa: N815
    streamCaptureImplicit = 906  # noqa: N815
    capturedEvent = 907  # noqa: N815


MESSAGES = {
    CudaError.success: "no error",
    CudaError.invalidValue: "invalid argument",
    CudaError.memoryAllocation: "out of memory",
    CudaError.illegalState: "the operation cannot be performed in the present state",
    CudaError.hostMemoryAlreadyRegistered: "part or all of the requested memory range is already mapped",
    CudaError.hostMemoryNotRegistered: "pointer does not correspond to a registered memory region",
    CudaError.notSupported: "operation not supported",
    CudaError.streamCaptureUnsupported: "operation not permitted when stream is capturing",
    CudaError.streamCaptureInvalidated: "operation failed due to a previous error during capture",
    CudaError.streamCaptureMerge: "operation would result in a merge of separate capture sequences",
    CudaError.streamCaptureUnjoined: "capturing stream has unjoined work",
    CudaError.streamCaptureIsolation: "dependency created on uncaptured work in another stream",
    CudaError.streamCaptureImplicit: (
        "operation would make the legacy stream depend on a capturing blocking stream"
    ),
    CudaError.capturedEvent: "operation not permitted on an event last recorded in a capturing stream",
}
"""What `cudaGetErrorString` says."""


def cuda_error(code: CudaError) -> torch.AcceleratorError:
    """The error that torch raises for a code."""
    return torch.AcceleratorError(f"CUDA error: {MESSAGES[code]}")
