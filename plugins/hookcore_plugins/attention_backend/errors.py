"""The error of a call that a backend cannot do."""

from __future__ import annotations

from hookcore import HookcoreError


class AttentionError(HookcoreError, RuntimeError):
    """The chosen attention backend cannot do what a call asks for, and no fallback was given that can."""
