"""Threads that read files, and the files that they hold open: those of the process that asks for them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from hookcore.errors import CheckpointError
from hookcore.memory.files.direct_reader import DirectReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

WORKERS = 2
"""One keeps the disk busy while the other converts what was read, or lets go of the last group."""


class Task(Generic[T]):
    """Work of a thread, as a `Future`. In a forked child, which lacks the thread, it has failed."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future
        self._process = os.getpid()

    @property
    def _is_lost(self) -> bool:
        return self._process != os.getpid()

    def cancel(self) -> bool:
        """Cancel the work unless it has begun; return whether it is cancelled."""
        return not self._is_lost and self._future.cancel()

    def cancelled(self) -> bool:
        """Return whether the work was cancelled before it began."""
        return not self._is_lost and self._future.cancelled()

    def done(self) -> bool:
        """Return whether the work has ended, in whichever way."""
        return self._is_lost or self._future.done()

    def exception(self) -> BaseException | None:
        """Wait for the end of the work, and return what it raised."""
        if self._is_lost:
            return CheckpointError(
                "the thread that reads this is in the process that this one was forked from"
            )
        return self._future.exception()

    def result(self) -> T:
        """Wait for the end of the work, and return its result.

        Raises:
            BaseException: What the work raised.
        """
        error = self.exception()
        if error is not None:
            raise error
        return self._future.result()


class ReaderThreads:
    """Threads with open files. A forked child gets its own when it first asks for work.

    Files are held open until `close`, or until nobody refers to the workers any more.

    Args:
        name: A prefix for the names of threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._start()

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix=self._name)
        self._readers: dict[tuple[Path, bool], DirectReader] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Task[T]:
        """Have a thread call a function."""
        if self._process != os.getpid():
            self._start()
        return Task(self._pool.submit(function, *args, **kwargs))

    def reader(self, path: Path, *, cached: bool = False) -> DirectReader:
        """The reader of a file; see there for the arguments.

        Raises:
            CheckpointError: The file cannot be opened.
        """
        with self._lock:
            if (path, cached) not in self._readers:
                self._readers[path, cached] = DirectReader(path, cached=cached)
            return self._readers[path, cached]

    def close(self) -> None:
        """Wait for work under way, and close files; more work opens them again."""
        if self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        for reader in self._readers.values():
            reader.close()
        self._start()
