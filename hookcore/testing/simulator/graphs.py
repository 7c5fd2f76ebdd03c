"""Graphs, as in `torch.cuda`: captured, to find what may not be done meanwhile, but not replayed."""

from __future__ import annotations

from typing import Any

from hookcore.testing.simulator import allocation, state
from hookcore.testing.simulator.errors import UnsupportedOperationError
from hookcore.testing.simulator.streams import Stream


class CUDAGraph:
    """A graph. Kernels compute while it is captured, too, and take no virtual time."""

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        """Begin to capture what the current stream is given.

        Args:
            pool: Taken and ignored: a graph has no memory of its own.
            capture_error_mode: As of `torch.cuda.CUDAGraph`.
        """
        machine = state.get_machine()
        with machine.lock:
            machine.captures.begin(_current(), capture_error_mode)

    def capture_end(self) -> None:
        """End it."""
        machine = state.get_machine()
        with machine.lock:
            machine.captures.end(_current())

    def replay(self) -> None:
        """Is not simulated.

        Raises:
            UnsupportedOperationError: Always.
        """
        raise UnsupportedOperationError(
            "a simulated device captures graphs to find what may not be done meanwhile; it cannot replay them"
        )


class graph:  # noqa: N801 -- torch.cuda's name
    """Captures what runs within a `with` block, as `torch.cuda.graph` does.

    Args:
        cuda_graph: The graph.
        pool: Taken and ignored.
        stream: The stream to capture on; a new one by default.
        capture_error_mode: As of `torch.cuda.graph`.
    """

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._graph = cuda_graph
        self._pool = pool
        self._stream = Stream() if stream is None else stream
        self._mode = capture_error_mode

    def __enter__(self) -> None:
        machine = state.get_machine()
        with machine.lock:
            machine.synchronize(state.current.device)
            allocation.empty_cache(machine, state.current.device)
        self._stream.__enter__()
        try:
            self._graph.capture_begin(self._pool, self._mode)
        except BaseException:
            self._stream.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._graph.capture_end()
        finally:
            self._stream.__exit__()


def is_current_stream_capturing() -> bool:
    """Return whether what the current stream is given is captured."""
    return _current().capture is not None


def _current() -> Any:
    return state.current_stream_state(state.current.device)
