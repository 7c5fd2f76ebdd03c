"""Counts the attentions of one model for its run report."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen

from hookcore_plugins.attention_backend.constant_result import constant_result

if TYPE_CHECKING:
    from collections.abc import Mapping


@frozen
class AttentionReport:
    """The numbers of attentions by the function that computed them.

    Attributes:
        backend: Name of the chosen backend.
        computed: Attentions that the backend computed.
        fell_back: Attentions that the fallback computed.
        otherwise: Calls of attention modules that did not call torch's attention function.
        compiled: Calls of attention modules in compiled code, where the function was chosen when the code was
            compiled.
        reasons: Why the fallback computed, or which module did not call torch's function, and how often.
    """

    backend: str
    computed: int = 0
    fell_back: int = 0
    otherwise: int = 0
    compiled: int = 0
    reasons: Mapping[str, int] = field(factory=dict)


class AttentionCounts:
    """Counts attentions for all hooks of one technique on one model.

    Args:
        backend: Name of the chosen backend.
    """

    def __init__(self, backend: str) -> None:
        self._lock = threading.Lock()  # a model with this technique may be called from several threads
        self._backend = backend
        self.clear()

    def clear(self) -> None:
        """Set all counts to zero."""
        with self._lock:
            self._numbers: Counter[str] = Counter()
            self._reasons: Counter[str] = Counter()

    def count(self, what: str, reason: str = "") -> None:
        """Add one.

        Args:
            what: A field of `AttentionReport`.
            reason: The reason to report; empty for none.
        """
        with self._lock:
            self._numbers[what] += 1
            if reason:
                self._reasons[reason] += 1

    def note(self, reason: str) -> None:
        """Record a reason as given once, however often it is noted."""
        with self._lock:
            self._reasons[reason] = 1

    def report(self) -> AttentionReport:
        """Return the counts so far."""
        with self._lock:
            return AttentionReport(self._backend, **self._numbers, reasons=dict(self._reasons))


class CompiledCounts(AttentionCounts):
    """Counts attentions in code that is compiled once and called often.

    While torch.compile traces the code, only the reason for a fallback in it can be noted. Where the code
    could not be compiled and runs in Python, its attentions are counted as usual.

    Args:
        counts: The counts of the model.
    """

    def __init__(self, counts: AttentionCounts) -> None:
        self._counts = counts

    def count(self, what: str, reason: str = "") -> None:
        """Add one, or note the reason while code is traced."""
        if not torch.compiler.is_compiling():
            self._counts.count(what, reason)
        elif reason:
            self._note(f"compiled: {reason}")

    @constant_result
    def _note(self, reason: str) -> None:  # runs when the code is traced, and is no part of it
        self._counts.note(reason)
