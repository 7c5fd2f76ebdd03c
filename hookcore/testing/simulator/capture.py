"""Captures of graphs: what may not be done while a stream is captured, and what breaks a capture.

The rules are those of CUDA (Programming Guide, "Creating a Graph Using Stream Capture") for the streams that
torch makes, which run beside the default stream.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from hookcore.testing.simulator.cuda_errors import CudaError, cuda_error
from hookcore.testing.simulator.devices import Capture

if TYPE_CHECKING:
    from hookcore.testing.simulator.devices import StreamState

MODES = ("global", "thread_local", "relaxed")
"""Whose unsafe calls break a capture: any thread's, those of the thread that captures, or nobody's."""


class Captures:
    """The captures that are under way on all devices."""

    def __init__(self) -> None:
        self._running: list[Capture] = []

    def begin(self, stream: StreamState, mode: str) -> None:
        """Begin to capture what a stream is given.

        Raises:
            ValueError: There is no such mode.
            RuntimeError: It is the default stream; torch's own words.
            torch.AcceleratorError: The stream is captured already.
        """
        if mode not in MODES:
            raise ValueError(f"capture_error_mode is {mode!r}, expected one of {', '.join(MODES)}")
        if stream.is_default:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after capture, it's ok to "
                "replay them on the default stream.)"
            )
        if stream.capture is not None:
            raise cuda_error(CudaError.illegalState)
        capture = Capture(stream, mode, threading.get_ident())
        capture.add(stream)
        self._running.append(capture)

    def end(self, stream: StreamState) -> None:
        """End the capture that began on a stream.

        Raises:
            RuntimeError: It began on another stream, or not at all; torch's own words.
            torch.AcceleratorError: An error has broken it, or the stream does not wait for another that it
                captures.
        """
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self._close(capture)
        if capture.is_broken:
            raise cuda_error(CudaError.streamCaptureInvalidated)
        if not capture.is_joined():
            raise cuda_error(CudaError.streamCaptureUnjoined)

    def abandon(self) -> None:
        """End all captures."""
        for capture in list(self._running):
            self._close(capture)

    def _close(self, capture: Capture) -> None:
        capture.is_over = True
        self._running.remove(capture)
        for stream in capture.streams:
            stream.capture = None

    @property
    def is_running(self) -> bool:
        """Whether any stream is captured."""
        return bool(self._running)

    def check(self, stream: StreamState) -> None:
        """Check that a stream can be given work.

        Raises:
            torch.AcceleratorError: It is captured, and an error has broken the capture.
        """
        if stream.capture is not None and stream.capture.is_broken:
            raise cuda_error(CudaError.streamCaptureInvalidated)

    def waits(self, stream: StreamState, source: Capture | None) -> None:
        """Check that a stream can wait for work; it is captured, too, if that work is.

        Args:
            stream: The stream.
            source: The capture that the work was given to; None if it runs.

        Raises:
            torch.AcceleratorError: It is captured and the work is not, or is by another capture.
        """
        self.check(stream)
        if source is stream.capture:
            return
        if source is None:
            self._break(CudaError.streamCaptureIsolation, stream.capture)
        elif source.is_over:
            self._break(CudaError.capturedEvent, stream.capture)
        elif stream.capture is not None:
            self._break(CudaError.streamCaptureMerge, stream.capture, source)
        elif stream.is_default:
            self._break(CudaError.streamCaptureImplicit, source)
        else:
            source.add(stream)

    def host_waits_for(self, stream: StreamState) -> None:
        """Check that the host can wait for a stream, or ask whether it is done.

        Raises:
            torch.AcceleratorError: The stream is captured, or a capture forbids it.
        """
        if stream.capture is not None:
            self._break(CudaError.streamCaptureUnsupported, stream.capture)
        self.forbid_unsafe()

    def host_waits_for_event(self, source: Capture | None) -> None:
        """Check that the host can wait for an event, or ask whether it is done.

        Args:
            source: The capture in which it was recorded.

        Raises:
            torch.AcceleratorError: It was recorded in a capture, or a capture forbids it.
        """
        if source is not None:
            self._break(CudaError.capturedEvent, source)
        self.forbid_unsafe()

    def forbid_unsafe(self) -> None:
        """Break the captures that this thread's waiting or page-locking breaks.

        Raises:
            torch.AcceleratorError: There are some.
        """
        thread = threading.get_ident()
        broken = [
            it
            for it in self._running
            if it.mode == "global" or (it.mode == "thread_local" and it.thread == thread)
        ]
        if broken:
            self._break(CudaError.streamCaptureUnsupported, *broken)

    def _break(self, error: CudaError, *captures: Capture | None) -> None:
        for capture in captures:
            if capture is not None:
                capture.is_broken = True
        raise cuda_error(error)
