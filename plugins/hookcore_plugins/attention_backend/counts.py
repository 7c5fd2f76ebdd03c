"""What happened to the attentions of one model."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen

from hookcore_plugins.attention_backend.constant_result import untraced

if TYPE_CHECKING:
    from collections.abc import Mapping


@frozen
class AttentionReport:
    """What computed a model's attention.

    Attributes:
        backend: Name of the backend that was chosen.
        computed: How many attentions it computed.
        fell_back: How many the fallback computed.
        otherwise: How many calls of attention modules computed it without torch's attention function.
        compiled: How many calls of attention modules were in compiled code. Who computes there was decided
            as it was compiled.
        reasons: Why the fallback did, or whose call went another way, and how often.
    """

    backend: str
    computed: int = 0
    fell_back: int = 0
    otherwise: int = 0
    compiled: int = 0
    reasons: Mapping[str, int] = field(factory=dict)


class Tally:
    """Counts attentions, for all hooks of one technique on one model.

    Args:
        backend: Name of the backend that was chosen.
    """

    def __init__(self, backend: str) -> None:
        self._lock = threading.Lock()  # this technique forbids nobody to call a model from two threads
        self._backend = backend
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        with self._lock:
            self._numbers: Counter[str] = Counter()
            self._reasons: Counter[str] = Counter()

    def count(self, what: str, reason: str = "") -> None:
        """Counts one.

        Args:
            what: The field of the report.
            reason: Why, where that has to be said.
        """
        with self._lock:
            self._numbers[what] += 1
            if reason:
                self._reasons[reason] += 1

    def note(self, reason: str) -> None:
        """Notes a reason once."""
        with self._lock:
            self._reasons[reason] = 1

    def report(self) -> AttentionReport:
        """What was counted so far."""
        with self._lock:
            return AttentionReport(self._backend, **self._numbers, reasons=dict(self._reasons))


class CompiledTally(Tally):
    """Counts for attentions in code that is compiled once and called often.

    While it is compiled, it can only be noted why the fallback is in it. What of it could not be compiled is
    counted as ever.

    Args:
        tally: What counts.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def count(self, what: str, reason: str = "") -> None:
        """Counts one, or notes the reason."""
        if not torch.compiler.is_compiling():
            self._tally.count(what, reason)
        elif reason:
            self._note(f"compiled: {reason}")

    @untraced
    def _note(self, reason: str) -> None:  # called as the code is traced, and not in it
        self._tally.note(reason)
