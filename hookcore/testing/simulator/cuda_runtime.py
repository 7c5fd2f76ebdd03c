"""What `cudart()` of the device module gives: the functions of CUDA's runtime that torch offers."""

from __future__ import annotations

from hookcore.testing.simulator import state
from hookcore.testing.simulator.allocation import register, unregister
from hookcore.testing.simulator.cuda_errors import MESSAGES, CudaError


class CudaRuntime:
    """The functions of `torch.cuda.cudart()`. They return error codes and raise nothing.

    As in CUDA, an error also stays pending until the next launch of a kernel, whose error torch takes it for.
    """

    cudaError = CudaError  # noqa: N815 -- the runtime's names

    @staticmethod
    def cudaHostRegister(address: int, nbytes: int, _flags: int) -> CudaError:  # noqa: N802
        """Page-lock memory where it is, in the context of the current device."""
        machine = state.get_machine()
        with machine.lock:
            return register(machine, state.current.device, address, nbytes)

    @staticmethod
    def cudaHostUnregister(address: int) -> CudaError:  # noqa: N802
        """Unlock memory that was registered; no copy from or to it may be under way."""
        machine = state.get_machine()
        with machine.lock:
            return unregister(machine, address)

    @staticmethod
    def cudaGetErrorString(error: CudaError) -> str:  # noqa: N802
        """An error in words."""
        return MESSAGES[error]
